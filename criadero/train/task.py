"""A small task beside the held-out loss: questions with one right answer, asked before, while and after tuning.

One JSON object a line: ``{"question": ..., "answer": ...}``, or with ``"choices": [...]``. Without choices the model answers, greedily, and
is right when that is the answer, blanks, case and a full stop at the end aside. With them it is right when the choice that is the answer
has the lowest mean loss a token of all, each read as the assistant's turn. ``"task": NAME`` in a line makes it part of one of several
tasks, which are counted by themselves too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from criadero.chat import Example, Template, render
from criadero.errors import UserError
from criadero.model import Llama
from criadero.tokenizer import Tokenizer
from criadero.train.answers import ROOM, Asked, answers
from criadero.train.batches import IGNORE, pack_examples, rows_to_batch
from criadero.train.loss import CHUNK, learned_rows

RESERVED = ("accuracy", "questions")  # what stands beside the names in a measurement
LENGTH, ROWS = 256, 8  # of the packed rows in which choices are read, or as long as the longest; and how many at once


@dataclass(frozen=True)
class Item:
    """A question, and its choices as chats (none: it is answered in words). ``right`` is the place of the right choice."""

    asked: Asked
    choices: tuple[Example, ...] = ()
    right: int = 0
    task: str = ""  # of which it is a part


def read_task(path: Path, tokenizer: Tokenizer, template: Template | None, context: int) -> list[Item]:
    """The questions of a file, rendered. UserError for whatever cannot be asked, with its line."""
    if template is None:
        raise UserError(
            f"{path}: a task is asked in chats, and the base has no chat template; give one with --template"
        )
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"eval_task: {path} cannot be read ({why}); give a .jsonl file of questions") from None
    items = [
        _item(line, f"{path}, line {n}", tokenizer, template, context)
        for n, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not items:
        raise UserError(f"{path}: no question is in it; give one JSON object a line, with a question and an answer")
    return items


def _item(line: str, where: str, tokenizer: Tokenizer, template: Template, context: int) -> Item:
    try:
        read: Any = json.loads(line)
    except ValueError:
        raise UserError(f"{where}: not JSON; each line is an object with a question and an answer") from None
    keys = read.keys() if isinstance(read, dict) else set()
    if not {"question", "answer"} <= keys <= {"question", "answer", "choices", "task"}:
        raise UserError(
            f"{where}: an object with question, answer and perhaps choices and task is needed, and nothing else"
        )
    question, answer, choices, task = read["question"], read["answer"], read.get("choices", []), read.get("task", "")
    if not isinstance(task, str) or len(task) > 40 or task in RESERVED:
        raise UserError(f"{where}: task must be a name of at most 40 letters, and none of {', '.join(RESERVED)}")
    if not isinstance(question, str) or not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise UserError(f"{where}: the question must be text, and the choices a list of texts")
    if "choices" in keys and (len(choices) < 2 or choices.count(answer) != 1):
        raise UserError(f"{where}: the answer must be one of at least two different choices, word for word")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"{where}: the answer must be text, and not empty")
    turn = {"role": "user", "content": question}
    ids = tuple(render([turn], tokenizer, template, add_generation_prompt=True).ids)  # type: ignore[list-item]
    asked = Asked(ids, question, answer, "")
    chats = [[turn, {"role": "assistant", "content": choice}] for choice in choices]
    read_as = tuple(render(chat, tokenizer, template) for chat in chats)  # type: ignore[arg-type]
    longest = max((len(example.ids) for example in read_as), default=len(ids) + ROOM)
    if longest > context:
        raise UserError(
            f"{where}: {longest} tokens with the answer, and the context is {context}; shorten the question"
        )
    return Item(asked, read_as, choices.index(answer) if choices else 0, task)


@torch.no_grad()
def score(
    model: Llama, items: Sequence[Item], tokenizer: Tokenizer, ends: Sequence[int], dtype: torch.dtype
) -> dict[str, Any]:
    """``{"accuracy": part that is right, "questions": count}``, and such a table by name for each of several tasks."""
    was = model.training
    model.eval()
    in_words = [item for item in items if not item.choices]
    longest = max((len(tokenizer.encode(item.asked.reference)) for item in in_words), default=0) + 4
    said = answers(model, [item.asked for item in in_words], tokenizer, ends, longest)
    in_words_right = iter([_plain(a) == _plain(item.asked.reference) for a, item in zip(said, in_words, strict=True)])
    losses = iter(mean_losses(model, [choice for item in items for choice in item.choices], dtype))
    right: list[bool] = []
    for item in items:
        each = [next(losses) for _ in item.choices]
        right.append(each.index(min(each)) == item.right if each else next(in_words_right))
    model.train(was)
    parts = {"": right} | {
        name: [yes for yes, item in zip(right, items, strict=True) if item.task == name] for name in names(items)
    }
    found = {name: {"accuracy": sum(part) / len(part), "questions": float(len(part))} for name, part in parts.items()}
    return {**found.pop(""), **found}


def names(items: Sequence[Item]) -> list[str]:
    """The tasks that the questions are parts of, in their order."""
    return [name for name in dict.fromkeys(item.task for item in items) if name]


def work(items: Sequence[Item], tokenizer: Tokenizer) -> tuple[int, int]:
    """What asking takes: tokens that are read, and tokens that are generated at most."""
    words = [len(tokenizer.encode(item.asked.reference)) + 4 for item in items if not item.choices]
    return sum(len(choice.ids) for item in items for choice in item.choices), max(words, default=0) * len(words)


@torch.no_grad()
def mean_losses(model: Llama, examples: Sequence[Example], dtype: torch.dtype) -> list[float]:
    """The mean loss in nats a learned token of each example, read together in packed rows."""
    length = max([LENGTH, *(len(example.ids) for example in examples)])
    packed, weight = pack_examples([len(example.ids) for example in examples], length), model.lm_head.weight
    found = [0.0] * len(examples)
    for start in range(0, len(packed), ROWS):
        rows = packed[start : start + ROWS]
        batch = rows_to_batch([[examples[i] for i in row] for row in rows], length, 0, dtype, str(weight.device))
        aims = batch.targets[batch.targets != IGNORE]  # [M]
        hidden = learned_rows(model, batch)  # [M, D]
        parts = zip(hidden.split(CHUNK), aims.split(CHUNK), strict=True)
        losses = torch.cat([F.cross_entropy((h @ weight.T).float(), aim, reduction="none") for h, aim in parts])
        order = [i for row in rows for i in row]
        counts = [sum(examples[i].loss_mask[1:]) for i in order]
        for i, part in zip(order, losses.split(counts), strict=True):
            found[i] = float(part.mean())
    return found


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")
