"""Every option of the recipe: one dataclass a script, and the parser that fills it.

An option exists once, as a field: its annotation holds the type and the bounds, its docstring is its `--help`. Imports
`recipe.base` only, and neither torch nor transformers, so that `--help` and a misspelt field are answered at once.
"""

from recipe.arguments.checks import identity_of, recorded_values
from recipe.arguments.corpus import CorpusArguments
from recipe.arguments.glue import GlueArguments
from recipe.arguments.parser import parse_config
from recipe.arguments.pretraining import PretrainArguments
from recipe.arguments.tokenizer import TokenizerArguments

__all__ = [
    "CorpusArguments",
    "GlueArguments",
    "PretrainArguments",
    "TokenizerArguments",
    "identity_of",
    "parse_config",
    "recorded_values",
]
