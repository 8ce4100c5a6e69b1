"""Text, code and tables as Markdown, whatever is in them."""

import re
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

# Markdown's characters, those of mathematics, and those without which no address becomes a link.
MARKUP = re.compile(r"[\\`*_~\[\]<>|&$#:@]|(?<=www)\.", re.IGNORECASE)


def as_text(text: str) -> str:
    """Write a text of the user's as Markdown that shows it as it is: no tags, links, emphasis or line breaks in it."""
    return MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def code_block(code: str, language: str) -> str:
    """Format code, whatever is in it, as Markdown."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code}\n{fence}"


def table(rows: list[list[Any]]) -> str:
    """Format rows as Markdown; the first is the head."""
    head, *body = [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in [head, " | ".join(["---"] * len(rows[0])), *body])


def two_columns(values: dict[str, Any]) -> str:
    """Format names and values as a table without a head."""
    return table([["", ""], *map(list, values.items())])


def as_card(head: ModelCardData, sections: list[str]) -> str:
    """Join a head and sections into the text of a card."""
    text = "\n\n".join([f"---\n{head.to_yaml()}\n---", *sections]) + "\n"
    return re.sub(r"\n{3,}", "\n\n", str(ModelCard(text)))
