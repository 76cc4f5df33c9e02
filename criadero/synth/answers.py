"""Stage ``answers``: the questions of some chats, answered by a teacher: distillation by text (Kim and Rush 2016, arXiv 1606.07947).

Every answer of a chat is asked for anew, round after round, each with what the teacher itself said before. An answer that does not
come, or is cut off, takes its chat's later rounds with it, and is counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.chats import read_chats
from criadero.data.documents import Document
from criadero.data.filters import Tally, identify
from criadero.errors import UserError
from criadero.synth.dataset import Chat, chat_source, removed_line, write_chats
from criadero.synth.self_instruct import check_held_out
from criadero.synth.teacher import Ask, TeacherFields, described, open_teacher, say
from criadero.synth.terms import check_terms

if TYPE_CHECKING:
    from criadero.chat import Message

SOURCE = "answers"


@dataclass(frozen=True, kw_only=True)
class AnswersRecipe(TeacherFields):
    """Whose questions, and how the teacher is to answer."""

    data: str = described("chats whose questions are asked: a file in any shape, or a dataset artifact")
    limit: int = described("take only so many chats (0: all)", 0)
    answer_tokens: int = described("longest answer, in tokens", 512)
    temperature: float = described("of the teacher; 0 takes the likeliest word always", 0.7)
    data_licence: str = described("licence of the questions", "unknown")
    held_out: float = described("share of the chats held out", 0.1)
    licence: str = described("licence you give the dataset", "")
    seed: int = described("of the draws", 0)


def answers(recipe: AnswersRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Ask `recipe.teacher` the questions of `recipe.data` and seal the chats as a ``dataset``.

    Killed at any moment, the same call goes on: answers are kept as they come. UserError before the first request: bad settings or
    data, terms that forbid it.
    """
    check_held_out(recipe.held_out)
    for name in ("limit", "answer_tokens", "temperature"):
        if getattr(recipe, name) < (1 if name == "answer_tokens" else 0):
            raise UserError(f"{name} is too small: {getattr(recipe, name):g}")
    asked = _questions(recipe)
    teacher = open_teacher(recipe)
    terms = check_terms(teacher, recipe)
    tally = Tally()
    with create(
        out, kind="dataset", recipe=recipe, seeds={"seed": recipe.seed}, inputs=teacher.inputs,
        licence=recipe.licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        draft.add_input("contains", recipe.data, licence=recipe.data_licence)
        said: list[list[Message]] = [[m for m in chat[:1] if m["role"] == "system"] for _, chat in asked]
        left = {n: [m for m in chat if m["role"] == "user"] for n, (_, chat) in enumerate(asked)}
        counts: Counter[str] = Counter()
        while left:
            numbers = list(left)
            for n in numbers:
                said[n].append(left[n].pop(0))
            requests = [
                Ask(
                    tuple((m["role"], m["content"]) for m in said[n]), max_tokens=recipe.answer_tokens,
                    temperature=recipe.temperature, seed=recipe.seed + n,
                )
                for n in numbers
            ]  # fmt: skip
            for n, answer in zip(numbers, teacher.answer(requests), strict=True):
                counts["asked"] += 1
                text = answer.text.strip()
                reason = (
                    "unanswered" if answer.problem or not text else "cut_off" if answer.finish == "length" else None
                )
                if reason:
                    said[n].pop()
                    counts[reason] += 1
                    if len(said[n]) < 2:
                        tally.drop(Document(asked[n][0], "", "", SOURCE, ""), reason)
                    del left[n]
                    continue
                said[n].append({"role": "assistant", "content": text})
                if not left[n]:
                    del left[n]
            say(f"{SOURCE}: {counts['asked']} questions asked")
        chats = [
            Chat(f"{SOURCE}-{n:06d}", messages, _language(messages), SOURCE, teacher.licence)
            for n, messages in enumerate(said)
            if messages and messages[-1]["role"] == "assistant"
        ]
        source = chat_source(SOURCE, teacher.licence, attribution=teacher.made_by.name)
        written = write_chats(
            draft, chats, tally, [source], {SOURCE: len(asked)}, held_out=recipe.held_out, seed=recipe.seed,
            synthetic={SOURCE: True},
        )  # fmt: skip
        teacher.write_recording(draft.path / "answers.jsonl")
        draft.step["teacher"] = teacher.report() | {"terms": terms}
        draft.step["derived"] = dict(counts)
        say(f"{SOURCE}: {len(chats)} chats of {len(asked)}; removed: {removed_line(tally, SOURCE)}")
        say(teacher.summary())
        say(f"{written['train']} chats to learn, {written['held_out']} held out")
    return open_artifact(out)


def _questions(recipe: AnswersRecipe) -> list[tuple[str, list[Message]]]:
    """Each chat and where it stands."""
    given = Path(recipe.data)
    if not given.exists():
        raise UserError(f"{recipe.data}: no such file; give a file of chats, or a dataset artifact")
    sealed = given.is_dir() and (given / "passport.json").is_file()
    files = sorted(given.glob("train-*.jsonl.zst")) if sealed else [given]
    if not files:
        raise UserError(f"{recipe.data}: this artifact holds no training chats")
    found = [read_chats(file) for file in files]
    asked = [pair for one in found for pair in zip(one.places, one.chats, strict=True)]
    return asked[: recipe.limit] if recipe.limit else asked


def _language(messages: list[Message]) -> str:
    lang = identify(" ".join(m["content"] for m in messages if m["role"] != "system"))[0]
    return lang if lang in ("en", "es") else "en"
