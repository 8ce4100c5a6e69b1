"""What the dataclasses of options share: kinds of numbers with their bounds, marks on fields, and checks of values."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin

from recipe.base.errors import UserError
from recipe.base.files import is_path

NUMBER_LIMIT = 2**48  # numbers below it can be multiplied with each other, and their divisors found, in no time
PLAN_FIELDS = ("num_gpus", "gpu", "price_per_gpu_hour")  # they mean something with `dry_run` only; no run records them


@dataclass(frozen=True, repr=False)
class Rule:
    """What the values of an option must be, as a part of its annotation; `--help` shows the words beside the type."""

    words: str
    accepts: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.words


FINITE = Rule(f"a number below 2**{math.log2(NUMBER_LIMIT):g}", lambda n: abs(n) < NUMBER_LIMIT)
SEED = Rule("0 or more and less than 2**63", lambda n: 0 <= n < 2**63)
PathName = Annotated[str, Rule("a valid path", is_path)]
PositiveInt = Annotated[int, Rule("1 or more", lambda n: n >= 1)]
NonNegativeInt = Annotated[int, Rule("0 or more", lambda n: n >= 0)]
Seed = Annotated[int, SEED]
SequenceLength = Annotated[int, Rule("8 or more", lambda n: n >= 8)]
PositiveFloat = Annotated[float, Rule("more than 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, Rule("0 or more", lambda x: x >= 0)]
Share = Annotated[float, Rule("more than 0 and less than 1", lambda x: 0 < x < 1)]
DecayRate = Annotated[float, Rule("0 or more and less than 1", lambda x: 0 <= x < 1)]
DropoutRate = DecayRate


def identity(**kwargs: Any) -> Any:
    """Make a dataclass field that must not change between a checkpoint and its resume."""
    return field(metadata={"identity": True}, **kwargs)


def identity_of(arguments: Any) -> dict[str, Any]:
    """Return the values of the fields that define the experiment."""
    values = asdict(arguments)
    return {f.name: values[f.name] for f in fields(arguments) if f.metadata.get("identity")}


def recorded_values(arguments: Any) -> dict[str, Any]:
    """Return the values that a run records in its config.yaml: all but those of a plan."""
    return {name: value for name, value in asdict(arguments).items() if name not in PLAN_FIELDS}


def rules(kind: Any) -> Iterator[Rule]:
    """Yield the rules in an annotation, also of the elements of a list and beside None."""
    if get_origin(kind) is Annotated:
        yield from kind.__metadata__
    else:
        for part in get_args(kind):
            yield from rules(part)


def check_values(arguments: Any, owner: str = "") -> None:
    """Raise a `UserError` if a value, or one in a list or dictionary, breaks a rule of its annotation or is not finite.

    `owner` tells one such dataclass from others in the error, such as ` of corpus 'books'`.
    """
    for f in fields(arguments):
        value, own_rules = getattr(arguments, f.name), list(rules(f.type))
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for item in items:
            is_limited = isinstance(item, int | float) and SEED not in own_rules
            for rule in [*own_rules, FINITE] if is_limited else own_rules:
                if item is not None and not rule.accepts(item):
                    verb = "holds" if isinstance(value, list | dict) else "is"
                    raise UserError(f"`{f.name}`{owner} {verb} {item!r:.100}; give {rule}")


def check_repo_id(name: str, repo_id: str) -> None:
    """Raise a `UserError` unless the hub could have a repository of this name."""
    # Importing it takes longer than answering `--help`, and few runs name a repository.
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"`{name}` is {repo_id!r}; write user/name or organisation/name. {error}") from None


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, ascending; 0 has none here."""
    small = [n for n in range(1, math.isqrt(number) + 1) if not number % n]
    return sorted({*small, *(number // n for n in small)})
