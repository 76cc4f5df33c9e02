"""The way out of every stage here: chats, sealed as a ``dataset`` artifact with the table by source that others read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.artifact import Draft
from criadero.data.build import JsonlWriter, Source, Table, as_row, hash_of
from criadero.data.chats import read_chats
from criadero.data.docset import DocumentTable
from criadero.data.documents import Document
from criadero.data.filters import Tally
from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.chat import Message

SEEDS = Path(__file__).parent / "seeds.jsonl"


@dataclass(frozen=True)
class Chat:
    """One chat of the dataset to be. Chats of one `group` fall on the same side of the split; `made` tells how it came about."""

    id: str
    messages: Sequence[Message]
    lang: str
    source: str
    licence: str
    group: str = ""
    made: Mapping[str, Any] = field(default_factory=dict)


def write_chats(
    draft: Draft, chats: Iterable[Chat], tally: Tally, sources: Sequence[Source], read: Mapping[str, int], *, held_out: float,
    seed: int, synthetic: Mapping[str, bool],
) -> Counter[str]:  # fmt: skip
    """Write the splits, the table of documents and sources.json, and fill the passport's tables. Chats by split are returned.

    `read`: how many candidates each source had; `synthetic`: which sources a model wrote. UserError when nothing is left.
    """
    table = Table(sources)
    table.documents_in.update(read)
    counts: Counter[str] = Counter()
    made_by_model = total = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(JsonlWriter(draft.path / f"{split}-00000.jsonl.zst"))
            for split in ("train", "held_out")
        }
        documents = DocumentTable(draft.path)
        for chat in chats:
            text = "\n".join(m["content"] for m in chat.messages)
            document = Document(chat.id, text, chat.lang, chat.source, chat.licence, {"messages": list(chat.messages)})
            split = "held_out" if hash_of(seed, "split", chat.group or text) < int(held_out * 2**64) else "train"
            row = as_row(document) | ({"made": dict(chat.made)} if chat.made else {})
            writer = writers[split]
            documents.add(document, split=split, shard=writer.path.name, offset=writer.write(row))
            table.count(split, document)
            table.bytes_in[chat.source] += len(text.encode())
            counts[split] += 1
            total += len(text)
            made_by_model += len(text) if synthetic.get(chat.source) else 0
        draft.data.update(documents.close())
    rows = table.rows(tally)
    if not counts["train"]:
        reasons: Counter[str] = Counter()
        for row in rows:
            reasons.update(row["removed"])
        said = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()) or "nothing came in"
        raise UserError(f"no chat is left to learn from (removed: {said}): loosen the filters, or find a better source")
    if not counts["held_out"]:
        (draft.path / "held_out-00000.jsonl.zst").unlink()
    (draft.path / "sources.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    draft.data |= {
        "by_source": rows,
        "by_language": table.by_language(),
        "synthetic_share": round(made_by_model / total, 4),
    }
    draft.metrics += [{"name": f"{split} chats", "value": counts[split]} for split in ("train", "held_out")]
    return counts


def chat_source(name: str, licence: str, *, url: str = "", attribution: str = "") -> Source:
    """A row of the table by source."""
    return Source(name=name, path="", licence=licence, kind="chat", url=url, attribution=attribution)


def removed_line(tally: Tally, source: str) -> str:
    """What was removed from a source, most first, in words."""
    reasons = Counter(tally.by_reason(source))
    return ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()) or "nothing"


@dataclass(frozen=True)
class Task:
    """An instruction, perhaps with an input, and an answer ("" when it has none yet)."""

    id: str
    lang: str
    instruction: str
    input: str = ""
    output: str = ""

    @property
    def question(self) -> str:
        """What the user says: the instruction and, below it, the input."""
        return f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction


def read_tasks(path: str | Path, *, limit: int = 0) -> list[Task]:
    """The tasks of a file of chats in any shape, or of a dataset artifact's training split: the first question of each chat."""
    from criadero.data.filters import identify

    given = Path(path)
    if given.is_dir() and (given / "passport.json").is_file():
        files = sorted(given.glob("train-*.jsonl.zst"))
        if not files:
            raise UserError(f"{path}: this artifact holds no training chats")
    else:
        files = [given]
    tasks = []
    for file in files:
        found = read_chats(file, keep_rows=True)
        for place, messages, row in zip(found.places, found.chats, found.rows, strict=True):
            turns = [m for m in messages if m["role"] != "system"]
            lang = str(row.get("lang") or "") or identify(" ".join(m["content"] for m in turns))[0]
            instruction, extra = turns[0]["content"], ""
            if found.shape.name == "alpaca":
                instruction = str(row["instruction"])
                extra = str(row.get(dict(found.shape.fields).get("input", "")) or "")
            output = turns[1]["content"] if len(turns) > 1 else ""
            id = str(row.get("id") or place.rpartition("/")[2])
            tasks.append(Task(id, lang if lang in ("en", "es") else "en", instruction.strip(), extra.strip(), output))
    if not tasks:
        raise UserError(f"{path}: there is no task in it")
    return tasks[:limit] if limit else tasks


def pair(question: str, answer: str) -> list[Message]:
    """A chat of one question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
