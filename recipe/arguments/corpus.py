"""One corpus, in the same form for every script that reads text."""

from dataclasses import dataclass
from typing import Literal

from recipe.arguments.checks import PathName, PositiveFloat, check_values
from recipe.base.errors import UserError


@dataclass(kw_only=True)
class CorpusArguments:
    """One entry of `corpora` or `eval_corpora`."""

    name: str
    """Logs, counters and the model card call the corpus by this name."""
    path: PathName
    """Id of a data set on the hub; or a local file, folder or glob of `.jsonl`, `.json` (one object a line) or `.txt`,
    plain or `.gz`, `.zst`, or of `.parquet` or `.arrow`; or the folder of a token store."""
    config_name: str | None = None
    """Configuration of a data set on the hub, such as `20231101.en`."""
    split: str = "train"
    """Split of a data set on the hub, or of a local folder that has splits, which are found as by `load_dataset` and
    `load_from_disk`."""
    revision: str | None = None
    """Revision of a data set on the hub; `refs/convert/parquet` opens one that is still a loading script."""
    text_column: str = "text"
    """Name of the column that holds the documents."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What counts as one document of a `.txt`: the whole file, each paragraph between blank lines, or each line."""
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
