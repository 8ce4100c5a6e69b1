"""One corpus, in the same form for every script that reads text."""

from dataclasses import dataclass
from typing import Literal

from recipe.arguments.checks import check_values
from recipe.base.errors import UserError


@dataclass(kw_only=True)
class CorpusArguments:
    name: str
    """What logs, counters and the model card call this corpus."""
    path: str
    """A hub data set id, or local `.jsonl`, `.json` (one object a line) or `.txt`, plain or `.gz`, `.zst`, `.xz`, or
    `.parquet` or `.arrow`: a file, a folder or a glob; or the folder of a token store."""
    config_name: str | None = None
    """Configuration of the hub data set, `20231101.en` say."""
    split: str = "train"
    """Split of the hub data set."""
    revision: str | None = None
    """Revision of the hub data set; `refs/convert/parquet` opens one that is still a script."""
    text_column: str = "text"
    """The column that holds the documents."""
    sample_by: Literal["document", "paragraph"] = "document"
    """What one document of a `.txt` is: the whole file, or what stands between blank lines."""
    weight: float | None = None
    """Relative share of this corpus; without it, its size. Give it to all corpora or to none."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"`path` of corpus {self.name!r} is empty; name a data set, a file, a folder or a glob")
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise UserError(f"`weight` of corpus {self.name!r} is {self.weight}; give a positive number or none")
        check_values(self)


def check_corpora(name: str, corpora: list[CorpusArguments]) -> None:
    names = [corpus.name for corpus in corpora]
    if doubled := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"`{name}` holds two corpora named {doubled[0]!r}; give each a name of its own")
    unweighted = [corpus.name for corpus in corpora if corpus.weight is None]
    if 0 < len(unweighted) < len(corpora):
        raise UserError(
            f"`{name}`: {', '.join(unweighted)} has no `weight` while others have; "
            "a default weight is a size and cannot be mixed with given ones: give all or none"
        )
