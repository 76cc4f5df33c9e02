"""Stage ``tokens``: documents and chats -> token shards with a table of where each document lies.

``train.bin`` and ``held_out.bin`` hold the ids of all documents end to end (little-endian uint16 below 65 536 entries, else uint32);
``*.docs.npy`` is uint64 ``[documents, 3]``: start, end, source number. How often a source is read is not decided here: it is the
pretraining recipe's ``mix``, so that one tokens artifact serves many mixes.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.artifact import Artifact, create, open_artifact, resolve
from criadero.data.build import read_dataset
from criadero.data.documents import Document
from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.chat import Template
    from criadero.tokenizer import Tokenizer

CHUNK = 512
SPLITS = ("train", "held_out")


@dataclass(frozen=True)
class TokensRecipe:
    """Which documents, encoded by which tokenizer."""

    data: str = field(metadata={"help": "a dataset artifact"})
    tokenizer: str = field(metadata={"help": "a tokenizer artifact, a model, or any folder with a tokenizer"})
    template: str = field(default="", metadata={"help": "built-in chat template for chats; empty: the tokenizer's own"})


def build_tokens(recipe: TokensRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Encode a dataset into a ``tokens`` artifact; it takes a minute or so and has nothing to resume.

    A document is bos, its text, eos; a chat is what the template renders, between bos and eos when those are not there yet.
    UserError: a tokenizer without bos or eos, no template for chats, a chat that the template refuses.
    """
    from criadero.chat import builtin_template, load_template
    from criadero.tokenizer import load_tokenizer

    data, folder = open_artifact(recipe.data), resolve(recipe.tokenizer)
    tokenizer = load_tokenizer(folder)
    if tokenizer.bos_id is None or tokenizer.eos_id is None:
        raise UserError(
            f"{folder}: the tokenizer has no bos or eos token, so documents cannot be told apart; use another"
        )
    has_chats = any(row.get("kind") == "chat" for row in data.sources())
    template: Template | None = None
    if recipe.template:
        template = builtin_template(recipe.template)
    elif has_chats:
        template = load_template(folder)
    dtype = np.dtype("<u2" if tokenizer.vocab_size < 65536 else "<u4")
    with create(out, kind="tokens", recipe=recipe, overwrite=overwrite) as draft:
        draft.add_input("converted_from", recipe.data)
        encoded_by = draft.add_input("tokenizer_of", recipe.tokenizer)
        sources: dict[tuple[str, str, str], int] = {}  # (name, lang, kind) -> source number
        counts: Counter[tuple[str, int, str]] = Counter()  # split, source number, documents | bytes | tokens
        for split in SPLITS:
            print(f"tokens: encoding {split}", file=sys.stderr, flush=True)
            write_split(draft.path, split, read_dataset(data.path, split), tokenizer, template, dtype, sources, counts)
        if not sum(n for (split, _, what), n in counts.items() if split == "train" and what == "tokens"):
            raise UserError(f"{recipe.data}: its training split is empty; nothing to encode")
        tokenizer.save(draft.path, chat_template=template.source if template else None)
        table: list[dict[str, Any]] = [
            {
                "name": name, "lang": lang, "kind": kind,
                **{split: {w: counts[split, number, w] for w in ("documents", "bytes", "tokens")} for split in SPLITS},
            }
            for (name, lang, kind), number in sources.items()
        ]  # fmt: skip
        about: dict[str, Any] = {
            "dtype": dtype.name, "vocab_size": tokenizer.vocab_size, "tokenizer": encoded_by.id, "sources": table,
            "by_language": by(table, "lang"), "by_kind": by(table, "kind"),
        }  # fmt: skip
        (draft.path / "tokens.json").write_text(
            json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        draft.data["by_source"] = [with_tokens(row, table) for row in data.sources()]
        draft.data["by_language"], draft.data["by_kind"] = about["by_language"], about["by_kind"]
        for split in SPLITS:
            total = sum(row[split]["tokens"] for row in table)
            draft.metrics.append({"name": f"{split} tokens", "value": total})
    return open_artifact(out)


def write_split(
    folder: Path, split: str, documents: Iterable[Document], tokenizer: Tokenizer, template: Template | None, dtype: np.dtype,
    sources: dict[tuple[str, str, str], int], counts: Counter[tuple[str, int, str]],
) -> None:  # fmt: skip
    """Write one split's ``.bin`` and ``.docs.npy``; new sources get the next number, ``counts`` is added to."""
    borders: list[tuple[int, int, int]] = []
    at = 0
    with (folder / f"{split}.bin").open("wb") as file:
        for document, ids in encode(documents, tokenizer, template):
            number = sources.setdefault((document.source, document.lang, document.kind), len(sources))
            file.write(np.asarray(ids, dtype).tobytes())
            borders.append((at, at + len(ids), number))
            at += len(ids)
            for what, n in (("documents", 1), ("bytes", len(document.text.encode())), ("tokens", len(ids))):
                counts[split, number, what] += n
    np.save(folder / f"{split}.docs.npy", np.asarray(borders, np.uint64).reshape(-1, 3), allow_pickle=False)


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, template: Template | None
) -> Iterator[tuple[Document, list[int]]]:
    """Each document with its ids, in order; texts are encoded in batches, chats one by one."""
    from criadero.chat import render

    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos is not None
    assert eos is not None
    stream = iter(documents)
    while chunk := list(itertools.islice(stream, CHUNK)):
        texts = iter(tokenizer.encode_batch([d.text for d in chunk if d.kind == "text"]))
        for document in chunk:
            if document.kind == "text":
                yield document, [bos, *next(texts), eos]
                continue
            if template is None:
                raise UserError(f"{document.id}: a chat, but there is no chat template; name one with template")
            try:
                ids = render(document.meta["messages"], tokenizer, template).ids
            except UserError as error:
                raise UserError(f"{document.source} {document.id}: {error}") from error
            yield document, [bos] * (ids[:1] != [bos]) + ids + [eos] * (ids[-1:] != [eos])


def by(table: Iterable[dict[str, Any]], key: str) -> dict[str, dict[str, dict[str, int]]]:
    """Counts summed by language or kind: ``{"en": {"train": {"documents": ...}, ...}}``."""
    out: dict[str, dict[str, Counter[str]]] = {}
    for row in table:
        for split in SPLITS:
            out.setdefault(row[key], {}).setdefault(split, Counter()).update(row[split])
    return {name: {split: dict(n) for split, n in splits.items()} for name, splits in sorted(out.items())}


def with_tokens(row: dict[str, Any], table: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A dataset's row of a source with its tokens beside it."""
    mine = [t for t in table if t["name"] == row["name"]]
    tokens = {split: sum(t[split]["tokens"] for t in mine) for split in SPLITS}
    return {
        **row,
        "tokens": sum(tokens.values()),
        "train_tokens": tokens["train"],
        "held_out_tokens": tokens["held_out"],
    }
