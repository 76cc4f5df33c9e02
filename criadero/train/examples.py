"""From a recipe's data to rendered examples: chats or documents read, a part kept apart, long ones split, dropped or cut; all counted."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from criadero.artifact import open_artifact
from criadero.chat import Example, Message, Template, render
from criadero.data.chats import ChatFile, Shape, read_chats, split_rounds
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer
from criadero.train.preflight import Report, languages_of, near_questions
from criadero.train.texts import keep_apart, pieces_of, read_texts

if TYPE_CHECKING:
    from criadero.train.sft import SftRecipe


@dataclass(frozen=True)
class Prepared:
    """Rendered chats, ready to batch, and what the pre-flight says of them."""

    train: list[Example]
    held_out: list[Example]
    report: Report
    chat_file: ChatFile
    kept_apart: Sequence[list[Message]] = ()  # the chats of held_out, not rendered
    places: Sequence[str] = ()  # where each of train stands


def find_data(ref: str) -> Path:
    """The file or folder that a recipe names; UserError when it is not there."""
    path = Path(ref)
    if not path.exists():
        raise UserError(f"{ref}: no such file; give a .jsonl, .json, .csv or .parquet file of chats")
    return path


def prepare(recipe: SftRecipe, data: Path, tokenizer: Tokenizer, template: Template | None, context: int) -> Prepared:
    """Read, split and render the chats; counts of everything that happened to them stand in the report."""
    if recipe.train_on == "text":
        return _prepare_texts(recipe, data, tokenizer, context)
    assert template
    learn: Literal["all", "last"] = "last" if recipe.train_on == "last" else "all"
    chat_file = read_dataset_chats(data, "train", skip_bad=recipe.skip_bad)
    places = dict(zip(map(id, chat_file.chats), chat_file.places, strict=True))
    chats: Sequence[list[Message]] = chat_file.chats
    kept_apart: Sequence[list[Message]]
    if recipe.held_out or _split_files(data, "held_out"):
        other_file = read_dataset_chats(find_data(recipe.held_out or str(data)), "held_out", skip_bad=recipe.skip_bad)
        kept_apart = other_file.chats
        places |= zip(map(id, kept_apart), other_file.places, strict=True)
        how = recipe.held_out or "the dataset's held-out split"
    else:
        chats, kept_apart = split(chats, recipe.held_out_share, recipe.seed)
        how = f"{len(kept_apart)} of {len(chat_file.chats)} chats kept apart by a hash of their first question"
    report = Report(
        data=str(data), shape=chat_file.shape.sentence, bad=len(chat_file.bad), held_out_from=how, context=context
    )
    seen = {repr(chat) for chat in chats}
    report.contaminated = sum(repr(chat) in seen for chat in kept_apart)
    report.near_contaminated, report.near_example = near_questions(chats, kept_apart)
    report.duplicates = len(chats) - len(seen)
    report.languages = languages_of([*chats, *kept_apart])

    def drawn(chat: list[Message]) -> Example:
        try:
            return render(chat, tokenizer, template, train_on=learn)
        except UserError as error:
            raise UserError(f"{places[id(chat)]}: {error}") from None

    def examples(these: Sequence[list[Message]], policy: str, counts: Report) -> list[tuple[Example, str]]:
        found = []
        for chat in these:
            parts = [drawn(chat)]
            if policy == "split" and len(parts[0].ids) > context:
                parts = _split_long(chat, parts[0], lambda m: render(m, tokenizer, template, train_on=learn),
                                    context, counts)  # fmt: skip
            for example in parts:
                if fitting := _fit(example, context, policy, counts):
                    found.append((fitting, places[id(chat)]))
        return found

    kept = examples(chats, recipe.too_long, report)
    train_examples = [example for example, _ in kept]
    # what it is measured on is cut, never refused: no weights depend on it
    apart = Report("", "", 0, "", context)
    held_out = [example for example, _ in examples(kept_apart, "truncate", apart)]
    report.held_out_cut = apart.too_long
    report.count(train_examples, held_out)
    return Prepared(train_examples, held_out, report, chat_file, kept_apart, [place for _, place in kept])


def _split_long(
    chat: list[Message], whole: Example, draw: Callable[[Sequence[Message]], Example], context: int, report: Report
) -> list[Example]:
    """A chat that is too long as parts of whole rounds, counted; none when each of its rounds is too long by itself."""
    parts, long_rounds = split_rounds(chat, lambda messages: len(draw(messages).ids), context)
    report.too_long += 1
    report.longest = max(report.longest, len(whole.ids))
    report.parts += len(parts)
    report.long_rounds += long_rounds
    report.dropped += not parts
    return [draw(part) for part in parts]


def _prepare_texts(recipe: SftRecipe, data: Path, tokenizer: Tokenizer, context: int) -> Prepared:
    """Plain documents, cut into pieces of the context; nothing of them is left out."""
    texts, bad = read_texts(data, "train", skip_bad=recipe.skip_bad)
    total = len(texts)
    if recipe.held_out or _split_files(data, "held_out"):
        apart, _ = read_texts(find_data(recipe.held_out or str(data)), "held_out", skip_bad=recipe.skip_bad)
        how = recipe.held_out or "the dataset's held-out split"
    else:
        texts, apart = keep_apart(texts, recipe.held_out_share, recipe.seed)
        how = f"{len(apart)} of {total} documents kept apart by a hash of their text"
    report = Report(str(data), "plain documents, all of their tokens learned", len(bad), how, context, noun="piece")
    seen = {one.text for one in texts}
    report.duplicates, report.contaminated = len(texts) - len(seen), sum(one.text in seen for one in apart)
    kept = [(example, one.place) for one in texts for example in pieces_of(one.text, tokenizer, context)]
    train_examples = [example for example, _ in kept]
    held_out = [example for one in apart for example in pieces_of(one.text, tokenizer, context)]
    report.count(train_examples, held_out)
    counts = {"documents": len(texts), "pieces": len(train_examples), "bad": len(bad)}
    nothing = ChatFile([], Shape("text", ()), counts, bad)
    return Prepared(train_examples, held_out, report, nothing, [], [place for _, place in kept])


def _fit(example: Example, context: int, policy: str, report: Report) -> Example | None:
    """Apply the policy for examples longer than the context, and count; an example with nothing to learn is left out."""
    if len(example.ids) <= context:
        return _supervised(example, report)
    report.too_long += 1
    report.longest = max(report.longest, len(example.ids))
    if policy == "truncate":
        report.truncated_tokens += len(example.ids) - context
        cut = dataclasses.replace(example, ids=example.ids[:context], loss_mask=example.loss_mask[:context])
        return _supervised(cut, report)
    if policy == "drop":
        report.dropped += 1
        return None
    report.refused_for_length = True
    return example


def _supervised(example: Example, report: Report) -> Example | None:
    if any(example.loss_mask[1:]):  # nothing predicts the first token
        return example
    report.unsupervised += 1
    return None


def read_dataset_chats(path: Path, split_name: str, *, skip_bad: bool) -> ChatFile:
    """Chats of a file, or of a ``dataset`` artifact's split."""
    if path.is_dir() and (path / "passport.json").is_file():
        files = _split_files(path, split_name)
        if not files:
            raise UserError(
                f"{path}: this artifact holds no {split_name} chats: it is of kind {open_artifact(path).kind}"
            )
        parts = [read_chats(file, skip_bad=skip_bad) for file in files]
        first = parts[0]
        return ChatFile(
            [c for p in parts for c in p.chats], first.shape, first.counts, [b for p in parts for b in p.bad],
            [place for p in parts for place in p.places],
        )  # fmt: skip
    return read_chats(path, skip_bad=skip_bad)


def _split_files(path: Path, split_name: str) -> list[Path]:
    """The files of one split of a ``dataset`` artifact; none where ``path`` is something else."""
    if not (path / "passport.json").is_file():
        return []
    return sorted(path.glob(f"{split_name}-*.jsonl.zst"))


def split(chats: Sequence[list[Message]], share: float, seed: int) -> tuple[list[list[Message]], list[list[Message]]]:
    """Keep a share apart by a hash of each chat's first turn, so equal questions fall on the same side."""
    kept: list[list[Message]] = []
    apart: list[list[Message]] = []
    for chat in chats:
        first = next((m["content"] for m in chat if m["role"] == "user"), "")
        number = int.from_bytes(hashlib.sha256(f"{seed}\n{first.strip().casefold()}".encode()).digest()[:8], "big")
        (apart if number < share * 2**64 else kept).append(chat)
    return kept, apart
