"""Look at what a run reads: the rows of an update, one text in every packing, or the masks of several visits.

python -m recipe.show recipe/configs/pretrain/tiny.yaml
python -m recipe.show runs/demo --update 500 --rows 2 --png rows.png
python -m recipe.show recipe/configs/pretrain/tiny.yaml --compare packing
python -m recipe.show recipe/configs/pretrain/tiny.yaml --compare masking --max_seq_length 64

All flags of pretrain.py may follow, another --config too.

1. `recipe/data/rows.py` has the run's own code make an update, or pack what stands at the heads of the corpora.
2. `find_roles` says what each position of these rows is, and in which document or part of a pair.
3. `to_tiles` writes a row as coloured tiles, and `recipe/run/tiles.py` lays them out and shows them.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from recipe.arguments import PretrainArguments, parse_config
from recipe.base.errors import UserError, require, run_script
from recipe.run.tiles import Line, Style, Tile, draw_page, has_colours, lay_out, lay_out_text, to_text, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from recipe.data.masking import DynamicMaskingCollator
    from recipe.data.preprocessor import Preprocessor

PACKINGS = next(get_args(field.type) for field in fields(PretrainArguments) if field.name == "packing")
HEAD_CHARACTERS, DOCUMENT_CHARACTERS = 200_000, 20_000  # that are packed of a corpus, and of a document of it
# Of a document, for each position of a row, where packings are compared: half a row, so that rows hold several.
CHARACTERS_PER_POSITION = 2
COMPARED_VISITS = (0, 1, 10)  # static masks are those of ten visits, in turn
PNG_COLUMNS = 116

Batch = dict[str, np.ndarray]


class Role(IntEnum):
    """What a position of a row is."""

    PADDING = 0
    SPECIAL = 1
    TEXT = 2  # read as it is, and not predicted
    MASKED = 3
    REPLACED = 4  # by a random token
    KEPT = 5  # read as it is, and predicted


PREDICTED = (Role.MASKED, Role.REPLACED, Role.KEPT)
STYLES = {
    Role.PADDING: Style("222"),
    Role.SPECIAL: Style("000", "444"),
    Role.MASKED: Style("555", "000"),
    Role.REPLACED: Style("555", "410"),
    Role.KEPT: Style("555", "020"),
}
PART_STYLES = [Style("000", background) for background in ("345", "542", "353", "534")]  # documents take turns


def find_roles(batch: Batch, collator: "DynamicMaskingCollator") -> tuple[np.ndarray, np.ndarray]:
    """Say what each position of a batch is, given the collator that made it.

    Returns:
        (rows, length) int64 each: the `Role`; and the number in its row, from 0 on, of the document or, in pairs, the
        part that a position belongs to. A separator belongs to the document that it ends.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    if "document_ids" in batch:
        is_text, parts = batch["document_ids"] > 0, np.maximum(batch["document_ids"] - 1, 0)
    else:
        is_text, is_end = batch.get("attention_mask", np.ones_like(ids)) > 0, ids == collator.tokenizer.sep_token_id
        parts = batch.get("token_type_ids", np.cumsum(is_end, axis=1) - is_end)
    predicted = np.where(ids == labels, Role.KEPT, Role.REPLACED)
    predicted[ids == collator.tokenizer.mask_token_id] = Role.MASKED
    roles = np.where(labels == -100, np.where(collator.is_special[ids], Role.SPECIAL, Role.TEXT), predicted)
    return np.where(is_text, roles, Role.PADDING), parts


def unmasked(batch: Batch) -> Batch:
    """Return a batch with the tokens that stand in the text, and nothing to predict."""
    ids, labels = batch["input_ids"], batch["labels"]
    return batch | {"input_ids": np.where(labels == -100, ids, labels), "labels": np.full_like(labels, -100)}


def token_writer(tokenizer: "PreTrainedTokenizerFast") -> Callable[[int], str]:
    """Return a function that writes the token of an id so that it can be seen, broken characters as their bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    # In the byte-level alphabet most printable bytes stand for themselves; letters from 256 on are the other bytes.
    letters = sorted(ByteLevel.alphabet())
    selves = [ord(letter) for letter in letters if ord(letter) < 256]
    byte_of = dict(zip(letters, [*selves, *sorted(set(range(256)) - set(selves))], strict=True))

    def write(index: int) -> str:
        if index in added:
            return visible(added[index])
        token = str(tokenizer.convert_ids_to_tokens(index) or f"?{index}")
        if is_byte_level and set(token) <= byte_of.keys():
            return visible(bytes(byte_of[letter] for letter in token).decode("utf-8", "backslashreplace"))
        return visible(token.replace("▁", " "))  # Unigram's space

    return write


def to_tiles(batch: Batch, collator: "DynamicMaskingCollator") -> list[Line]:
    """Write each row as tiles, one for a position, with braces around what is predicted, and one for all padding."""
    write = token_writer(collator.tokenizer)  # type: ignore[arg-type]  # `load_tokenizer` has let no other pass
    arrays = batch["input_ids"], batch["labels"], *find_roles(batch, collator)
    rows = []
    for row in zip(*(array.tolist() for array in arrays), strict=True):
        tiles = []
        for index, label, role, part in zip(*row, strict=True):
            if role in PREDICTED:
                read = {Role.MASKED: "", Role.REPLACED: f"→{write(index)}", Role.KEPT: "="}[role]
                tiles.append(Tile(f"{{{write(label)}{read}}}", STYLES[role]))
            elif role != Role.PADDING:
                tiles.append(Tile(write(index), STYLES.get(role) or PART_STYLES[part % len(PART_STYLES)]))
        if padding := row[2].count(Role.PADDING):
            tiles.append(Tile(f"{write(collator.tokenizer.pad_token_id)}×{padding}", STYLES[Role.PADDING]))
        rows.append(tiles)
    return rows


def explain_tiles(batch: Batch, collator: "DynamicMaskingCollator") -> Line:
    """Make a legend of the tiles that occur in a batch."""
    roles, parts = find_roles(batch, collator)
    unit = "part" if "token_type_ids" in batch else "document"
    number = parts[roles != Role.PADDING].max() + 1
    tiles = [Tile(f"{unit} {place}", style) for place, style in enumerate(PART_STYLES[:number], start=1)]
    words = {Role.SPECIAL: "special", Role.MASKED: "{masked}", Role.REPLACED: "{replaced→read}", Role.KEPT: "{kept=}"}
    return tiles + [Tile(words[role], STYLES[role]) for role in words if (roles == role).any()]


def count_roles(batch: Batch, collator: "DynamicMaskingCollator") -> str:
    """Say how many of the positions of a batch are what."""
    roles, parts = find_roles(batch, collator)
    counts = {role: int((roles == role).sum()) for role in Role}
    predicted = sum(counts[role] for role in PREDICTED)
    text = counts[Role.TEXT] + predicted
    named = {"text": text, "special tokens": counts[Role.SPECIAL], "padding": counts[Role.PADDING]}
    said = [f"{len(roles):,} rows of {roles.shape[1]:,} positions"]
    said += [f"{count / roles.size:.1%} {name}" for name, count in named.items()]
    unit = "parts" if "token_type_ids" in batch else "documents"
    said += [f"{unit} a row: {np.where(roles == Role.PADDING, 0, parts + 1).max(axis=1).mean():.2f}"]
    if predicted:
        said += [f"{predicted / text:.1%} of the text predicted"]
        said[-1] += f" ({', '.join(f'{counts[role] / predicted:.0%} {role.name.lower()}' for role in PREDICTED)})"
    unknown = int((unmasked(batch)["input_ids"] == collator.tokenizer.unk_token_id).sum())
    said += [f"{unknown:,} {collator.tokenizer.unk_token}"] if unknown else []
    return "; ".join(said)


def lay_out_rows(batch: Batch, origins: list[str], collator: "DynamicMaskingCollator", width: int) -> list[Line]:
    """Lay out the figures of a batch, a legend, and as many of its rows as have an origin."""
    shown = {name: array[: len(origins)] for name, array in batch.items()}
    second = "swapped" if collator.packing == "sentence_order" else "the second part is from another document"
    pairs = {-100: "a single part", 0: "the second part follows the first", 1: second}
    page = lay_out_text(count_roles(batch, collator), width) + lay_out({"": explain_tiles(shown, collator)}, width)
    for number, (origin, tiles) in enumerate(zip(origins, to_tiles(shown, collator), strict=True)):
        said = [origin] if origin else []
        said += [pairs[int(shown["pair_label"][number])]] if "pair_label" in shown else []
        page += lay_out_text(f"row {number}: {'; '.join(said)}".rstrip(": "), width) + lay_out({" ": tiles}, width)
    return page


def show_update(preprocessor: "Preprocessor", options: argparse.Namespace, width: int) -> list[Line]:
    """Lay out rows of an update or, where it would have to be waited for, of the heads of the corpora."""
    from recipe.data.rows import collate, has_update, read_heads, read_update

    args, collator = preprocessor.args, preprocessor.train_collator(options.update)
    if has_update(preprocessor):
        if args.streaming:
            filling = f"fills its buffers first, with up to {args.shuffle_buffer_size:,} blocks"
            print(f"`streaming` {filling}, and makes the updates before {options.update}", file=sys.stderr)
        heading = f"update {options.update:,}"
        batch, origins = read_update(preprocessor, options.update)
    else:
        heading = "blocks of the first text, since the corpora have no token stores yet: --prepare_only makes them"
        preprocessor.format = preprocessor.format_of(collator.max_seq_length)
        examples, origins = read_heads(preprocessor, len(args.corpora), HEAD_CHARACTERS, DOCUMENT_CHARACTERS)
        batch = collate(collator, examples)
    return lay_out_text(heading, width) + lay_out_rows(batch, origins[: options.rows], collator, width)


def compare_packings(preprocessor: "Preprocessor", options: argparse.Namespace, width: int) -> list[Line]:
    """Lay out the same text, of the first corpus, in rows of every packing, unmasked."""
    from recipe.data.preprocessor import Preprocessor
    from recipe.data.rows import collate, read_heads

    characters = CHARACTERS_PER_POSITION * preprocessor.args.max_seq_length
    page: list[Line] = []
    for packing in PACKINGS:
        args = replace(preprocessor.args, packing=packing, objective="masked_lm", phases=[])
        changed = Preprocessor(args, preprocessor.tokenizer)
        examples, origins = read_heads(changed, 1, 2 * options.rows * characters, characters)
        batch = unmasked(collate(changed.collator, examples))
        page += page and [[Tile("")]]
        page += lay_out_text(f"packing {packing}: {origins[0]}", width)
        page += lay_out_rows(batch, [""] * min(options.rows, len(examples)), changed.collator, width)
    return page


def compare_visits(preprocessor: "Preprocessor", options: argparse.Namespace, width: int) -> list[Line]:
    """Lay out the first block of the first corpus and, below its tokens, what is predicted in several visits."""
    from recipe.data.rows import collate_visits, read_heads

    (example, *_), (origin, *_) = read_heads(preprocessor, 1, HEAD_CHARACTERS, DOCUMENT_CHARACTERS)
    collator = replace(preprocessor.collator, max_seq_length=len(example["input_ids"]))
    batch = collate_visits(collator, example, COMPARED_VISITS)
    names = [f"{masking}, visit {visit + 1}" for masking in ("dynamic", "static") for visit in COMPARED_VISITS]
    is_predicted = batch["labels"] != -100
    shared = zip(names, (is_predicted & is_predicted[0]).sum(axis=1), strict=True)
    heading = f"{origin}; {is_predicted[0].sum()} tokens are predicted in the first visit, and of these "
    page = lay_out_text(heading + ", ".join(f"{number} in {name}" for name, number in shared), width)
    stack = {"": to_tiles(unmasked(batch), collator)[0]}
    for name, tiles, predicted in zip(names, to_tiles(batch, collator), is_predicted.tolist(), strict=True):
        stack[name] = [tile if own else Tile("") for tile, own in zip(tiles, predicted, strict=True)]
    return page + lay_out({"": explain_tiles(batch, collator)}, width) + lay_out(stack, width)


def parse_options(arguments: list[str] | None = None) -> tuple[argparse.Namespace, PretrainArguments]:
    """Read the options of this command and those of the run, from `sys.argv[1:]` or the arguments given instead.

    Raises:
        UserError: they are wrong, or there is no such run.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("config", metavar="CONFIG_OR_RUN", type=Path, help="YAML of pretrain.py, or folder of a run")
    parser.add_argument("--update", type=int, default=0, help="update to show rows of, from 0 on (default: 0)")
    parser.add_argument("--rows", type=int, default=4, help="rows to show, of each packing (default: 4)")
    parser.add_argument(
        "--compare", choices=("packing", "masking"), help="show a text in all packings, a block's masks"
    )
    parser.add_argument("--png", type=Path, help="file to draw into")
    options, flags = parser.parse_known_args(arguments)
    config = options.config / "config.yaml" if options.config.is_dir() else options.config
    if not config.is_file():
        raise UserError(f"CONFIG_OR_RUN: there is no {config}; name the `output_dir` of a run, or the YAML of one")
    args = parse_config(PretrainArguments, "show", ["--config", str(config), *flags])
    require(0 <= options.update < args.max_steps, "--update", options.update, f"give 0 to {args.max_steps - 1}")
    require(options.rows > 0, "--rows", options.rows, "give 1 or more")
    can_draw = options.png is None or (options.png.parent.is_dir() and not options.png.is_dir())
    require(can_draw, "--png", options.png, "name a file in a folder that exists")
    return options, replace(args, prepare_only=False)


def main() -> None:
    """Show what is asked for."""
    options, args = parse_options()
    # What takes seconds to import comes after the options.
    from recipe.data.preprocessor import Preprocessor
    from recipe.data.tokenizer import load_tokenizer

    named_by = "tokenizer_name" if args.tokenizer_name else "model_name_or_path"
    preprocessor = Preprocessor(args, load_tokenizer(args.tokenizer_name or str(args.model_name_or_path), named_by))
    lay_out_page = {None: show_update, "packing": compare_packings, "masking": compare_visits}[options.compare]
    page = lay_out_page(preprocessor, options, PNG_COLUMNS if options.png else shutil.get_terminal_size().columns)
    if options.png:
        draw_page(page, options.png)
    print(options.png or to_text(page, has_colours()))


if __name__ == "__main__":
    run_script(main)
