"""What `python -m recipe.show` says of the rows of a run."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from recipe.arguments import PretrainArguments, parse_config
from recipe.base.errors import UserError
from recipe.data.cached import CachedData
from recipe.data.preprocessor import Preprocessor
from recipe.data.rows import read_update
from recipe.data.tokenizer import load_tokenizer
from recipe.data.trainers import save_tokenizer, train_byte_level_bpe
from recipe.run.tiles import Tile
from recipe.show import (
    PACKINGS,
    PART_STYLES,
    STYLES,
    Role,
    count_roles,
    explain_tiles,
    find_roles,
    main,
    to_tiles,
    token_writer,
    unmasked,
)
from testing.helpers import ROOT, command_line, write_jsonl


@pytest.fixture
def config(flags, tmp_path: Path) -> Path:
    """A config file of `flags`."""
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in flags.items()))
    return path


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """A function that returns what the command prints, in 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["show", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def update_of(flags: dict[str, object], tokenizer, update: int = 0):
    args = parse_config(PretrainArguments, "test", command_line(flags))
    preprocessor = Preprocessor(args, tokenizer)
    batch, _ = read_update(preprocessor, update)
    return args, preprocessor, batch


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("model_type", ["roberta", "roberta-prelayernorm", "bert", "albert"])
def test_roles_are_those_of_ids_and_labels(flags, tokenizer_dirs, packing: str, model_type: str):
    """Position by position, against the blocks that the rows are made of."""
    tokenizer = load_tokenizer(str(tokenizer_dirs[model_type]))
    flags |= {"packing": packing, "model_type": model_type, "tokenizer_name": tokenizer_dirs[model_type]}
    args, preprocessor, batch = update_of(flags | {"max_seq_length": 48, "mlm_probability": 0.4}, tokenizer)
    roles, parts = find_roles(batch, preprocessor.collator)
    data = CachedData(args, preprocessor, 0)
    seen = set()
    for row, where in enumerate(data.rows(0)):
        example = data.example(where)
        text = example["input_ids"].tolist()
        part = 0
        part_of_span = np.repeat(np.arange(len(example["spans"])), example["spans"])
        for place in range(48):
            index, label, role = (int(array[row, place]) for array in (batch["input_ids"], batch["labels"], roles))
            seen.add(role)
            if place >= len(text):
                expected = Role.PADDING
            elif text[place] in tokenizer.all_special_ids:
                expected = Role.SPECIAL
            elif label == -100:
                expected = Role.TEXT
            elif index == tokenizer.mask_token_id:
                expected = Role.MASKED
            else:
                expected = Role.KEPT if index == text[place] else Role.REPLACED
            assert role == expected, (row, place)
            if place < len(text):
                spans = packing not in ("full_sentences", "contiguous")
                assert parts[row, place] == (part_of_span[place] if spans else part)
                part += text[place] == tokenizer.sep_token_id
    assert seen >= {Role.SPECIAL, Role.TEXT, Role.MASKED, Role.REPLACED, Role.KEPT}


def test_tiles_say_role_text_and_document(flags, tokenizer):
    _, preprocessor, batch = update_of(flags | {"mlm_probability": 0.4, "packing": "doc_sentences"}, tokenizer)
    write = token_writer(tokenizer)
    roles, parts = find_roles(batch, preprocessor.collator)
    texts = {
        Role.TEXT: lambda index, label: write(index),
        Role.SPECIAL: lambda index, label: tokenizer.convert_ids_to_tokens(index),
        Role.MASKED: lambda index, label: f"{{{write(label)}}}",
        Role.REPLACED: lambda index, label: f"{{{write(label)}→{write(index)}}}",
        Role.KEPT: lambda index, label: f"{{{write(label)}=}}",
    }
    for row, tiles in enumerate(to_tiles(batch, preprocessor.collator)):
        length = int((roles[row] != Role.PADDING).sum())
        for place, tile in enumerate(tiles[:length]):
            index, label, role = (int(array[row, place]) for array in (batch["input_ids"], batch["labels"], roles))
            style = PART_STYLES[parts[row, place] % 4] if role == Role.TEXT else STYLES[Role(role)]
            assert tile == Tile(texts[Role(role)](index, label), style)
        padding = batch["input_ids"].shape[1] - length
        assert tiles[length:] == ([Tile(f"<pad>×{padding}", STYLES[Role.PADDING])] if padding else [])


def test_figures_are_those_of_all_rows(flags, tokenizer):
    _, preprocessor, batch = update_of(flags, tokenizer)
    text = count_roles(batch, preprocessor.collator)
    labels, ids = batch["labels"], batch["input_ids"]
    special = np.isin(ids, [tokenizer.cls_token_id, tokenizer.sep_token_id]).sum()
    padding = (ids == tokenizer.pad_token_id).sum()
    predicted = (labels != -100).sum()
    assert text.startswith("8 rows of 32 positions; ")
    assert f"{special / ids.size:.1%} special tokens; {padding / ids.size:.1%} padding" in text
    share = predicted / (ids.size - special - padding)
    masked = (ids == tokenizer.mask_token_id).sum() / predicted
    assert f"{share:.1%} of the text predicted ({masked:.0%} masked, " in text
    assert f"documents a row: {((ids == tokenizer.sep_token_id).sum(1)).mean():.2f}" in text
    assert "predicted" not in count_roles(unmasked(batch), preprocessor.collator)


def test_figures_tell_unknown_tokens(flags, tokenizer_dirs, tmp_path: Path):
    path = write_jsonl(tmp_path / "text.jsonl", ["the cat 你 and 好 they . " * 30] * 40)
    flags |= {"corpora": json.dumps([{"name": "mixed", "path": str(path)}]), "model_type": "bert"}
    tokenizer = load_tokenizer(str(tokenizer_dirs["bert"]))
    _, preprocessor, batch = update_of(flags | {"tokenizer_name": tokenizer_dirs["bert"]}, tokenizer)
    unknown = (batch["input_ids"] == tokenizer.unk_token_id).sum()
    assert unknown > 8
    assert count_roles(batch, preprocessor.collator).endswith(f"; {unknown} [UNK]")


def test_legend_explains_what_occurs(flags, tokenizer):
    _, preprocessor, batch = update_of(flags | {"packing": "segment_pair", "mlm_probability": 0.4}, tokenizer)
    words = ["part 1", "part 2", "special", "{masked}", "{replaced→read}", "{kept=}"]
    assert [tile.text for tile in explain_tiles(batch, preprocessor.collator)] == words
    assert [tile.text for tile in explain_tiles(unmasked(batch), preprocessor.collator)] == words[:3]


def test_byte_level_tokens_are_written_as_text(tmp_path: Path):
    """Whole characters as they are, their parts as bytes, and what was added in its own letters."""
    text = "the the dog. 你好 é \x1b[31m"
    trained = train_byte_level_bpe([[text] * 50], 290, 2, add_prefix_space=False, max_document_characters=1000)
    trained.add_tokens(["Ġnaïve", "<url>"])
    save_tokenizer(trained, tmp_path, add_prefix_space=False, model_max_length=64)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.add_tokens(["Ġnaïve"])
    write = token_writer(tokenizer)
    by_token = {token: write(index) for token, index in tokenizer.get_vocab().items()}
    assert by_token["Ġthe"] == "␣the"
    assert by_token["Ã"] == "\\xc3"  # the first byte of é
    assert by_token["Ċ"] == "⏎"
    assert by_token["ě"] == "\\x1b"
    assert by_token["Ġnaïve"] == "Ġnaïve"  # an added token is text, whatever alphabet the others have
    assert by_token["<mask>"] == "<mask>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    written = "".join(map(write, ids))
    assert written.startswith("the␣the␣dog.␣")
    assert written.endswith("␣\\x1b[31m")
    assert write(10_000) == "?10000"


def test_other_tokenizers_are_written_as_they_are(tokenizer_dirs):
    wordpiece, unigram = (load_tokenizer(str(tokenizer_dirs[name])) for name in ("bert", "albert"))
    ids = wordpiece("zebras", add_special_tokens=False)["input_ids"]
    assert list(map(token_writer(wordpiece), ids)) == wordpiece.convert_ids_to_tokens(ids)
    ids = unigram("the and", add_special_tokens=False)["input_ids"]
    assert "".join(map(token_writer(unigram), ids)) == "␣the␣and"


def test_command_shows_the_first_rows_of_an_update(show, config: Path, flags, tokenizer, capsys):
    _, preprocessor, batch = update_of(flags, tokenizer, update=3)
    capsys.readouterr()  # of the preparation
    lines = show(config, "--update", 3, "--rows", 2).splitlines()
    assert lines[0] == "update 3"
    assert max(map(len, lines)) <= 80
    starts = [number for number, line in enumerate(lines) if line.startswith("row ")]
    assert [re.sub(r"block [\d,]+,", "block,", lines[start]) for start in starts] == [
        f"row {number}: sample, block, visit 1" for number in (0, 1)
    ]
    for row, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True)):
        tiles = to_tiles(batch, preprocessor.collator)[row]
        assert " ".join(lines[start + 1 : end]).split() == [tile.text for tile in tiles]


def test_command_reads_the_config_of_a_run(show, finished_run: Path, config: Path):
    assert show(finished_run, "--update", "5") == show(config, "--update", "5")
    assert show(finished_run, "--mlm_probability", "0.3") == show(config, "--mlm_probability=0.3")


def test_command_reads_streams(show, config: Path):
    lines = show(config, "--streaming", "--num_lanes=2", "--shuffle_buffer_size=16", "--update=2").splitlines()
    assert [line for line in lines if line.startswith("row ")][:2] == ["row 0: sample, lane 0", "row 1: sample, lane 1"]


def test_command_shows_the_first_text_of_what_is_too_large(show, config: Path, tmp_path: Path, texts, monkeypatch):
    monkeypatch.setattr("recipe.data.rows.SMALL_BYTES", 1000)
    text = show(config, "--token_store_dir", tmp_path / "stores", "--mlm_probability=0.1")
    assert text.startswith("blocks of the first text, since the corpora have no token stores yet")
    assert "row 0: sample, of the first 20,000 characters of 120 documents" in text
    phases = ["--max_steps=10", "--phases=[{steps: 1, max_seq_length: 16}, {steps: 9}]"]
    text = show(config, "--token_store_dir", tmp_path / "stores", "--mlm_probability=0.1", *phases)
    assert " rows of 16 positions; " in text
    assert not (tmp_path / "stores").exists()


def test_packings_are_compared_on_the_same_text(show, config: Path):
    page = show(config, "--compare", "packing", "--rows", "2")
    sections = re.split(r"^packing (\w+): sample, of the first 64 characters of (\d+) documents\n", page, flags=re.M)[
        1:
    ]
    assert sections[::3] == list(PACKINGS)
    assert len(set(sections[1::3])) == 1
    for packing, section in zip(sections[::3], sections[2::3], strict=True):
        assert len(re.findall(r"^row \d", section, re.M)) == 2
        assert "{" not in section
        assert ("part 1" in section) == ("pair" in packing or packing == "sentence_order")
    first, contiguous = (sections[2 + 3 * PACKINGS.index(name)] for name in ("full_sentences", "contiguous"))
    rows = [" ".join(re.split(r"^row \d\n", section, flags=re.M)[1].split()) for section in (first, contiguous)]
    start = min(len(row.split(" </s>")[0]) for row in rows)
    assert rows[0][:start] == rows[1][:start]


def test_masks_of_visits_are_compared_below_the_block(show, config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "2000")  # one line for the block and each visit
    head, _, block, *visits = show(config, "--compare", "masking", "--max_seq_length=64").splitlines()
    masks = dict(line[:18].split(", ") and (line[:17].strip(), line[17:]) for line in visits)
    assert masks["static, visit 11"] == masks["static, visit 1"] == masks["dynamic, visit 1"]
    assert masks["dynamic, visit 2"] == masks["static, visit 2"]
    assert len({masks[f"dynamic, visit {visit}"] for visit in (1, 2, 11)}) == 3
    number = len(re.findall(r"\{", masks["dynamic, visit 1"]))
    assert f"; {number} tokens are predicted in the first visit, and of these {number} in dynamic, visit 1, " in head
    assert head.endswith(f"{number} in static, visit 11")
    for mask in masks.values():
        for found in re.finditer(r"\{([^→=}]+)", mask):  # each stands below its token
            assert block[17:][found.start() :].startswith(found[1])


def test_picture_is_drawn_without_a_terminal(show, config: Path, tmp_path: Path):
    for flags in ([], ["--compare", "packing"], ["--compare", "masking"]):
        file = tmp_path / "page.png"
        assert show(config, "--png", file, *flags).endswith(f"{file}\n")
        assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--update", "6"], "`--update` is 6; give 0 to 5"),
        (["--update", "-1"], "`--update` is -1"),
        (["--png", "nowhere/page.png"], "`--png` is nowhere/page.png; name a file in a folder that exists"),
        (["--rows", "0"], "`--rows` is 0; give 1 or more"),
        (["--mask_probability", "0.1"], "there is no field `mask_probability` .*`mlm_probability`"),
        (["--tokenizer_name", "nowhere"], "nowhere"),
    ],
)
def test_wrong_flags_are_named(show, config: Path, words: list[str], message: str):
    with pytest.raises(UserError, match=message):
        show(config, *words)


def test_folder_that_is_no_run_is_named(show, tmp_path: Path):
    for name in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"CONFIG_OR_RUN: there is no .*; name the `output_dir` of a run"):
            show(name)


def test_shipped_config_is_shown_with_the_sample_data(
    show, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(ROOT)
    flags = ["--tokenizer_name", tokenizer_dir, "--token_store_dir", tmp_path / "stores"]
    text = show("recipe/configs/pretrain/tiny.yaml", "--rows=1", *flags)
    assert "update 0\n128 rows of 32 positions; " in text
    assert "\x1b" not in text  # the output is no terminal
