"""Stage ``tokenizer``: train a byte-level BPE vocabulary on a sample of a dataset's training split."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.build import hash_of, read_dataset
from criadero.data.documents import Document
from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerRecipe:
    """How large a vocabulary, and from how much of which text."""

    data: str = field(metadata={"help": "a dataset artifact"})
    vocab_size: int = field(default=8192, metadata={"help": "entries, special tokens and the 256 bytes included"})
    sample_bytes: int = field(
        default=40_000_000, metadata={"help": "bytes of text to learn from, an equal share of each language (0: all)"}
    )
    template: str = field(default="criadero", metadata={"help": "chat template that travels with it"})
    seed: int = field(default=0, metadata={"help": "of the sample"})


def build_tokenizer(
    recipe: TokenizerRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True
) -> Artifact:
    """Train a ``tokenizer`` artifact; it takes a minute or so and has nothing to resume.

    Metrics: bytes a token on the held-out documents by language and kind. UserError: a vocabulary too small for bytes and special
    tokens, a dataset that is not one.
    """
    from criadero.chat import builtin_template
    from criadero.tokenizer import SPECIAL, train_bpe

    least = 256 + len(SPECIAL)
    if recipe.vocab_size < least:
        raise UserError(
            f"vocab_size {recipe.vocab_size}: at least {least} are needed (256 bytes, {len(SPECIAL)} special tokens)"
        )
    template = builtin_template(recipe.template)
    with create(out, kind="tokenizer", recipe=recipe, seeds={"sample": recipe.seed}, overwrite=overwrite) as draft:
        draft.add_input("trained_on", recipe.data)
        draft.data["sample"] = {}
        texts = sample(recipe, draft.data["sample"])
        print(f"tokenizer: learning {recipe.vocab_size} entries", file=sys.stderr, flush=True)
        tokenizer = train_bpe(texts, recipe.vocab_size, SPECIAL)
        tokenizer.save(draft.path, chat_template=template.source)
        for (lang, kind), (size, tokens) in sorted(measure(tokenizer, recipe.data).items()):
            draft.metrics.append({"name": f"bytes per token, held out, {lang} {kind}", "value": size / max(tokens, 1)})
    return open_artifact(out)


def sample(recipe: TokenizerRecipe, counts: dict[str, dict[str, int]]) -> Iterator[str]:
    """Texts of the training split: of each language a random part, at most its equal share of ``sample_bytes``.

    A language that has less than its share leaves the rest to the others. ``counts`` is filled with documents and bytes by language.
    """
    sizes: Counter[str] = Counter()
    for document in read_dataset(recipe.data, "train"):
        sizes[document.lang] += len(document.text.encode())
    if not sizes:
        raise UserError(f"{recipe.data}: no training documents to learn a vocabulary from")
    shares: dict[str, float] = dict.fromkeys(sizes, 1.0)
    if recipe.sample_bytes:
        left = float(recipe.sample_bytes)
        for n, (lang, size) in enumerate(sorted(sizes.items(), key=lambda pair: pair[1])):
            share = min(size, left / (len(sizes) - n))
            shares[lang], left = share / size, left - share
    for document in read_dataset(recipe.data, "train"):
        if hash_of(recipe.seed, "tokenizer", document.text) < shares[document.lang] * 2**64:
            row = counts.setdefault(document.lang, {"documents": 0, "bytes": 0})
            row["documents"] += 1
            row["bytes"] += len(document.text.encode())
            yield document.text


def measure(tokenizer: Tokenizer, data: str | Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(bytes, tokens) of the held-out documents by (language, kind)."""
    groups: dict[tuple[str, str], list[Document]] = {}
    for document in read_dataset(data, "held_out"):
        groups.setdefault((document.lang, document.kind), []).append(document)
    return {
        group: (
            sum(len(d.text.encode()) for d in documents),
            sum(map(len, tokenizer.encode_batch([d.text for d in documents]))),
        )
        for group, documents in groups.items()
    }
