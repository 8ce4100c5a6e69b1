"""Write small GLUE folders in the official files' formats, easy enough for a small model to learn."""

import random
from pathlib import Path

WORDS = "the of a to and in that was he it his is with as had for she not at but be on they".split()  # noqa: SIM905


def sentence(rng: random.Random, word: str) -> str:
    """Make a sentence with a word at a random place."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(2, 9))]
    words[rng.randrange(len(words))] = word
    return " ".join(words) + "."


def write(path: Path, header: str | None, rows: list[list[object]], encoding: str = "utf-8") -> None:
    """Write a TSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding)


def write_cola(folder: Path, train: int = 48, dev: int = 21, test: int = 7) -> None:
    """Write CoLA; acceptable sentences have the word `belda`, the others `rive`."""
    rng = random.Random(0)
    for name, size in (("train", train), ("dev", dev)):
        labels = [rng.randrange(2) for _ in range(size)]
        write(
            folder / "CoLA" / f"{name}.tsv",
            None,
            [["made", label, "", sentence(rng, "belda" if label else "rive")] for label in labels],
        )
    rows = [[index, sentence(rng, "belda")] for index in range(test)]
    write(folder / "CoLA" / "test.tsv", "index\tsentence", rows)


def write_rte(folder: Path, train: int = 40, dev: int = 13, test: int = 5) -> None:
    """Write RTE; the second sentence of an entailment has the word `belda`, that of the others `rive`."""
    rng = random.Random(1)
    header = "index\tsentence1\tsentence2\tlabel"
    for name, size in (("train", train), ("dev", dev), ("test", test)):
        rows = []
        for index in range(size):
            label = rng.choice(["entailment", "not_entailment"])
            second = sentence(rng, "belda" if label == "entailment" else "rive")
            rows.append([index, sentence(rng, "mor"), second, *([label] if name != "test" else [])])
        write(folder / "RTE" / f"{name}.tsv", header if name != "test" else header.removesuffix("\tlabel"), rows)


def write_stsb(folder: Path, train: int = 40, dev: int = 13) -> None:
    """Write STS-B; similar pairs have the word `belda` twice, the others `belda` and `rive`."""
    rng = random.Random(2)
    for name, size in (("train", train), ("dev", dev)):
        rows = []
        for index in range(size):
            same = rng.randrange(2)
            rows.append([index, sentence(rng, "belda"), sentence(rng, "belda" if same else "rive"), 5.0 * same])
        write(folder / "STS-B" / f"{name}.tsv", "index\tsentence1\tsentence2\tscore", rows)


def write_mnli(folder: Path, train: int = 60, dev: int = 15) -> None:
    """Write MNLI; a word of the second sentence is the label."""
    rng = random.Random(3)
    words = {"entailment": "belda", "neutral": "mor", "contradiction": "rive"}
    for name, size in (("train", train), ("dev_matched", dev), ("dev_mismatched", dev + 2)):
        rows = []
        for index in range(size):
            label = rng.choice(list(words))
            rows.append([index, sentence(rng, "tan"), sentence(rng, words[label]), label])
        write(folder / "MNLI" / f"{name}.tsv", "index\tsentence1\tsentence2\tgold_label", rows)
