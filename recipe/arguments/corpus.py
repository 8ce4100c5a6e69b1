"""One corpus, in the same form for every script that reads text."""

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipe.arguments.checks import PathName, PositiveFloat, check_values
from recipe.base.errors import UserError

# What the name of a local file may end in; which of them are read how is decided in `recipe/data/corpora.py`.
LINES, TEXTS, TABLES = (".jsonl", ".json"), (".txt",), (".parquet", ".arrow")
CODECS = {".gz": "gzip", ".zst": "zstd"}  # pyarrow's names
SUFFIXES = tuple(kind + packed for kind in LINES + TEXTS for packed in ("", *CODECS)) + TABLES
TEXTLESS_FILES = {"dataset_info.json", "state.json", "dataset_dict.json"}  # written by `save_to_disk` beside its tables


@dataclass(kw_only=True)
class CorpusArguments:
    """One entry of `corpora` or `eval_corpora`."""

    name: str
    """Logs, counters and the model card call the corpus by this name."""
    path: PathName
    """Id of a data set on the hub; or a local file, folder or glob of `.jsonl`, `.json` (one object a line) or `.txt`,
    plain or `.gz`, `.zst`, or of `.parquet` or `.arrow`; or the folder of a token store."""
    config_name: str | None = None
    """Configuration of the hub's data set, such as `20231101.en`."""
    split: str = "train"
    """Split of the hub's data set."""
    revision: str | None = None
    """Revision of the hub's data set; `refs/convert/parquet` opens one that is still a loading script."""
    text_column: str = "text"
    """Name of the column that holds the documents."""
    sample_by: Literal["document", "paragraph"] = "document"
    """What counts as one document of a `.txt`: the whole file, or each paragraph between blank lines."""
    weight: PositiveFloat | None = None
    """Share of this corpus in training, relative to the weights of others; all have one or none. Null: its size."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"`path` of corpus {self.name!r} is empty; name a data set, a file, a folder or a glob")
        check_values(self, f" of corpus {self.name!r}")


def check_corpora(name: str, corpora: list[CorpusArguments]) -> None:
    """Raise a `UserError` unless the corpora have different names, and weights for all of them or for none."""
    names = [corpus.name for corpus in corpora]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"`{name}` holds two corpora named {doubled[0]!r}; give each a name of its own")
    unweighted = [corpus.name for corpus in corpora if corpus.weight is None]
    if 0 < len(unweighted) < len(corpora):
        raise UserError(
            f"`{name}`: {', '.join(unweighted)} has no `weight` while others have; "
            "a default weight is a size and cannot be mixed with given ones: give all or none"
        )


def local_files(corpus: CorpusArguments) -> list[Path] | None:
    """List the local files of a corpus, sorted, or return None for a hub id; raise a `UserError` if it is neither."""
    path = Path(corpus.path).expanduser()
    place = f"`path` of corpus {corpus.name!r}: {corpus.path}"
    if path.is_file():
        files = [path]
    elif path.is_dir():
        # `glob` follows links to folders and leaves out what is hidden.
        below = map(Path, sorted(set(glob.glob(f"{glob.escape(str(path))}/**", recursive=True))))
        files = [f for f in below if f.is_file() and f.name.endswith(SUFFIXES) and f.name not in TEXTLESS_FILES]
    elif glob.has_magic(corpus.path):
        files = [Path(file) for file in sorted(set(glob.glob(str(path), recursive=True))) if Path(file).is_file()]
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", corpus.path) and not corpus.path.endswith(SUFFIXES):
        return None
    else:
        raise UserError(f"{place} does not exist; give a file, a folder, a pattern or the id of a hub data set")
    wrong = [file for file in files if not file.name.endswith(SUFFIXES)]
    if wrong or not files:
        problem = f"holds {wrong[0]}, which does not end" if wrong else "holds no file that ends"
        raise UserError(f"{place} {problem} in one of {', '.join(SUFFIXES)}")
    return files
