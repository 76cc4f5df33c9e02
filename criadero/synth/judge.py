"""Stage ``judge``: a teacher compares two models' answers, or marks one's, as MT-bench does (Zheng et al. 2023, arXiv 2306.05685).

Each pair is judged twice, with the answers in both orders: a model wins only if it wins both times, because judges favour what they
read first (section 3.3). A verdict is read strictly; what is no verdict is counted, not guessed. Every figure comes with an interval:
of the mean by bootstrap over the questions, of the share of wins by Wilson's formula.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.documents import read_rows
from criadero.errors import UserError
from criadero.synth import prompts
from criadero.synth.teacher import Ask, Teacher, TeacherFields, ask, described, open_teacher, say

Winner = Literal["a", "b", "tie"]
_VERDICT = re.compile(r"\[\[([ABC])\]\]")
_MARK = re.compile(r"\[\[(\d{1,2}(?:\.\d{1,2})?)\]\]")


@dataclass(frozen=True, kw_only=True)
class JudgeRecipe(TeacherFields):
    """What is asked of which models, and who judges."""

    questions: str = described("questions: a file of chats, a dataset artifact, or MT-bench's question.jsonl")
    a: str = described(
        "the model judged: a bundled model, a folder, or a .jsonl of its answers (an earlier judgement's answers-a.jsonl)"
    )
    b: str = described("the model it is compared with; empty: a is marked from 1 to 10 instead", "")
    limit: int = described("only the first so many questions (0: all)", 0)
    reference: bool = described("show the judge the answer that the questions come with", True)
    language: str = described("en or es, the judge's prompt; empty: each question's own", "")
    answer_tokens: int = described("longest answer, in tokens", 256)
    verdict_tokens: int = described("longest verdict, in tokens", 512)
    seed: int = described("of the answers and of the bootstrap", 0)


@dataclass(frozen=True)
class Item:
    """A question of one or more turns, with the reference answers there are."""

    id: str
    turns: tuple[str, ...]
    lang: str
    category: str = ""
    reference: tuple[str, ...] = ()


def judge(recipe: JudgeRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Let both models answer, have them judged, and seal verdicts and figures as an ``audit``.

    ``verdicts.jsonl`` holds every verdict with its reasons. Killed, the same call goes on. UserError: questions or models that cannot be
    read, or not one verdict that could be.
    """
    if recipe.language not in ("", "en", "es"):
        raise UserError(f"language {recipe.language!r}: the prompts are written in en and es")
    items = read_questions(recipe.questions, limit=recipe.limit, language=recipe.language, reference=recipe.reference)
    teacher = open_teacher(recipe)
    names = [name for name in (recipe.a, recipe.b) if name]
    with create(out, kind="audit", recipe=recipe, seeds={"seed": recipe.seed}, overwrite=overwrite) as draft:
        for one in teacher.inputs:  # the judge and its record: nothing of it is in a model
            draft.inputs.append(dataclasses.replace(one, relation="evaluated_on"))
        for name in (*names, recipe.questions):
            draft.add_input("evaluated_on", name)
        answers = [answers_of(name, items, recipe) for name in names]
        for label, given in zip("ab", answers, strict=False):
            with (draft.path / f"answers-{label}.jsonl").open("w", encoding="utf-8") as file:
                for item, turns in zip(items, given, strict=True):
                    file.write(json.dumps({"id": item.id, "answers": list(turns)}, ensure_ascii=False) + "\n")
        if recipe.b:
            rows, metrics, line = _compare(items, answers[0], answers[1], teacher, recipe)
        else:
            rows, metrics, line = _grade(items, answers[0], teacher, recipe)
        with (draft.path / "verdicts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        teacher.write_recording(draft.path / "answers.jsonl")
        draft.metrics += metrics
        draft.step["judge"] = teacher.report()
        say(line)
        say(teacher.summary())
    return open_artifact(out)


# -- questions and answers --------------------------------------------------------------------------------------------


def read_questions(path: str | Path, *, limit: int = 0, language: str = "", reference: bool = True) -> list[Item]:
    """Questions of a file or of a dataset's held-out (or else training) split: chats, or rows with MT-bench's ``turns``."""
    from criadero.data.chats import read_chats
    from criadero.data.filters import identify

    given = Path(path)
    if given.is_dir() and (given / "passport.json").is_file():
        files = sorted(given.glob("held_out-*.jsonl.zst")) or sorted(given.glob("train-*.jsonl.zst"))
        if not files:
            raise UserError(f"{path}: this artifact holds no chats")
    else:
        files = [given]
    items: list[Item] = []
    for file in files:
        rows = [row for _, row in read_rows(file)]
        if rows and all(isinstance(row.get("turns"), list) and row["turns"] for row in rows):
            for n, row in enumerate(rows):
                turns = tuple(map(str, row["turns"]))
                known = tuple(map(str, row.get("reference") or ())) if reference else ()
                lang = language or str(row.get("lang") or "") or identify(" ".join(turns))[0]
                items.append(
                    Item(
                        str(row.get("question_id", n)),
                        turns,
                        lang if lang in prompts.JUDGE_PAIR else "en",
                        str(row.get("category") or ""),
                        known,
                    )
                )
            continue
        found = read_chats(file, keep_rows=True)
        for place, messages, row in zip(found.places, found.chats, found.rows, strict=True):
            turns = tuple(m["content"] for m in messages if m["role"] == "user")
            known = tuple(m["content"] for m in messages if m["role"] == "assistant") if reference else ()
            lang = language or str(row.get("lang") or "") or identify(" ".join(turns))[0]
            id = str(row.get("id") or place.rpartition("/")[2])
            items.append(
                Item(id, turns, lang if lang in prompts.JUDGE_PAIR else "en", str(row.get("category") or ""), known)
            )
    items = items[:limit] if limit else items
    twice = [id for id, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise UserError(f"{path}: two questions are called {twice[0]!r}: give each an id of its own")
    if not items:
        raise UserError(f"{path}: there is no question in it")
    return items


def answers_of(name: str, items: Sequence[Item], recipe: JudgeRecipe) -> list[tuple[str, ...]]:
    """A model's answers to every turn of every question, greedily; or those that a file holds (``id``, ``answers``)."""
    if name.endswith(".jsonl"):
        known = {}
        for where, row in read_rows(name):
            listed = row.get("answers")
            if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
                raise UserError(f"{where}: 'answers' must be a list of texts, one for each turn of the question")
            known[str(row.get("id"))] = tuple(listed)
        for item in items:
            if len(known.get(item.id, ())) < len(item.turns):
                raise UserError(f"{name}: has no answer to every turn of the question {item.id!r}")
        return [known[item.id][: len(item.turns)] for item in items]
    from criadero.synth.teacher import local_answers

    return local_answers(name, [item.turns for item in items], max_tokens=recipe.answer_tokens)


# -- pairs ------------------------------------------------------------------------------------------------------------


def compare_asks(item: Item, a: Sequence[str], b: Sequence[str], *, tokens: int = 512) -> tuple[Ask, Ask]:
    """The two requests about one pair: A first, and B first."""
    first = prompts.JUDGE_PAIR[item.lang].format(chat=_pair_text(item, a, b))
    second = prompts.JUDGE_PAIR[item.lang].format(chat=_pair_text(item, b, a))
    return ask(first, max_tokens=tokens, temperature=0.0), ask(second, max_tokens=tokens, temperature=0.0)


def read_verdict(text: str) -> Literal["A", "B", "C"] | None:
    """The verdict of a reply: exactly one of [[A]], [[B]], [[C]] in it (several times the same will do); None otherwise."""
    found = set(_VERDICT.findall(text))
    return found.pop() if len(found) == 1 else None


def read_mark(text: str) -> float | None:
    """The mark of a reply: one [[number]] from 1 to 10; None otherwise."""
    found = {float(mark) for mark in _MARK.findall(text)}
    mark = found.pop() if len(found) == 1 else 0.0
    return mark if 1 <= mark <= 10 else None


def winner(first: str | None, second: str | None) -> tuple[Winner | None, bool]:
    """Who wins over both orders, and whether the two verdicts agree. `second` was given with the answers swapped.

    A model wins that wins both, or one and draws the other; opposite verdicts are a tie; None when one of them is missing.
    """
    if first is None or second is None:
        return None, False
    score = {"A": 1, "B": -1, "C": 0}[first] + {"A": -1, "B": 1, "C": 0}[second]
    agree = score in (2, -2) or first == second == "C"
    # MT-bench's "conservative" rule: only a win in both orders is a win
    return ("a" if score == 2 else "b" if score == -2 else "tie"), agree


def compare(
    items: Sequence[Item],
    a: Sequence[Sequence[str]],
    b: Sequence[Sequence[str]],
    teacher: Teacher,
    *,
    tokens: int = 512,
) -> list[dict[str, Any]]:
    """One row for each question: winner (a, b, tie or None), both verdicts, and the judge's reasons."""
    asks = [
        one
        for item, left, right in zip(items, a, b, strict=True)
        for one in compare_asks(item, left, right, tokens=tokens)
    ]
    replies = teacher.answer(asks)
    rows = []
    for n, item in enumerate(items):
        pair = replies[2 * n : 2 * n + 2]
        verdicts = [None if one.problem else read_verdict(one.text) for one in pair]
        who, agree = winner(*verdicts)
        rows.append(
            {
                "id": item.id,
                "category": item.category,
                "winner": who,
                "agree": agree,
                "verdicts": verdicts,
                "reasons": [one.text for one in pair],
            }
        )
    return rows


def _pair_text(item: Item, a: Sequence[str], b: Sequence[str]) -> str:
    person, assistant, right = prompts.JUDGE_WORDS[item.lang]
    parts = []
    for name, answers in (("A", a), ("B", b)):
        lines = [f"=== {assistant} {name} ==="]
        for question, answer in zip(item.turns, answers, strict=True):
            lines += [f"{person}: {question}", f"{assistant} {name}: {answer.strip() or '...'}"]
        parts.append("\n\n".join(lines))
    return "\n\n".join([*parts, *_reference(item, right)])


def _reference(item: Item, right: str) -> list[str]:
    return [f"=== {right} ===\n\n" + "\n\n".join(item.reference)] if item.reference else []


def _compare(
    items: Sequence[Item], a: Any, b: Any, teacher: Teacher, recipe: JudgeRecipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    rows = compare(items, a, b, teacher, tokens=recipe.verdict_tokens)
    judged = [row["winner"] for row in rows if row["winner"]]
    if not judged:
        raise UserError(
            f"{teacher.name}: not one of {len(rows)} pairs got a verdict that can be read in both orders: choose another judge"
        )
    counts = Counter(judged)
    scores = [{"a": 1.0, "b": 0.0, "tie": 0.5}[who] for who in judged]
    rate, low, high = bootstrap(scores, recipe.seed)
    decided = counts["a"] + counts["b"]
    wins = wilson(counts["a"], decided)
    agree = sum(row["agree"] for row in rows if row["winner"])
    unread = sum(verdict is None for row in rows for verdict in row["verdicts"])
    metrics = [
        _metric("win_rate", rate, len(judged), (low, high)),
        _metric("wins_of_decided", counts["a"] / decided if decided else 0.5, decided, wins),
        *(_metric(name, counts[key], len(judged)) for name, key in (("a_wins", "a"), ("b_wins", "b"), ("ties", "tie"))),
        _metric("orders_agree", agree / len(judged), len(judged), wilson(agree, len(judged))),
        _metric("unparsable", unread, 2 * len(rows)),
    ]
    line = (
        f"{recipe.a} against {recipe.b}: wins {counts['a']}, ties {counts['tie']}, losses {counts['b']}; win rate {rate:.3f} "
        f"(95 % {low:.3f} to {high:.3f}); both orders agree in {agree} of {len(judged)}; {unread} of {2 * len(rows)} verdicts unparsable"
    )
    return rows, metrics, line


# -- marks ------------------------------------------------------------------------------------------------------------


def grade(
    items: Sequence[Item], answers: Sequence[Sequence[str]], teacher: Teacher, *, tokens: int = 512
) -> list[dict[str, Any]]:
    """One row for each turn of each question: mark (1 to 10, or None) and the judge's reasons."""
    places, asks = [], []
    for item, given in zip(items, answers, strict=True):
        person, assistant, right = prompts.JUDGE_WORDS[item.lang]
        lines: list[str] = []
        for n, (question, answer) in enumerate(zip(item.turns, given, strict=True)):
            lines += [f"{person}: {question}", f"{assistant}: {answer.strip() or '...'}"]
            places.append((item, n))
            chat = "\n\n".join([*lines, *_reference(item, right)])
            asks.append(ask(prompts.JUDGE_SINGLE[item.lang].format(chat=chat), max_tokens=tokens, temperature=0.0))
    rows = []
    for (item, n), reply in zip(places, teacher.answer(asks), strict=True):
        mark = None if reply.problem else read_mark(reply.text)
        rows.append({"id": item.id, "category": item.category, "turn": n + 1, "mark": mark, "reasons": reply.text})
    return rows


def _grade(
    items: Sequence[Item], answers: Any, teacher: Teacher, recipe: JudgeRecipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    rows = grade(items, answers, teacher, tokens=recipe.verdict_tokens)
    marks = [row["mark"] for row in rows if row["mark"] is not None]
    if not marks:
        raise UserError(
            f"{teacher.name}: not one of {len(rows)} replies had a mark that can be read: choose another judge"
        )
    # the turns of one question are not independent: the bootstrap draws questions
    by_question: dict[str, list[float]] = {}
    for row in rows:
        if row["mark"] is not None:
            by_question.setdefault(row["id"], []).append(row["mark"])
    mean, low, high = bootstrap([sum(one) / len(one) for one in by_question.values()], recipe.seed)
    unread = len(rows) - len(marks)
    metrics = [_metric("mean_mark", mean, len(by_question), (low, high)), _metric("unparsable", unread, len(rows))]
    for turn in sorted({row["turn"] for row in rows}):
        here = [row["mark"] for row in rows if row["turn"] == turn and row["mark"] is not None]
        if here and turn > 1:
            metrics.append(
                _metric(
                    "mean_mark",
                    sum(here) / len(here),
                    len(here),
                    bootstrap(here, recipe.seed)[1:],
                    slice=f"turn {turn}",
                )
            )
    line = (
        f"{recipe.a}: mean mark {mean:.2f} (95 % {low:.2f} to {high:.2f}) over {len(by_question)} questions; "
        f"{unread} of {len(rows)} unparsable"
    )
    return rows, metrics, line


# -- statistics -------------------------------------------------------------------------------------------------------


def bootstrap(values: Sequence[float], seed: int, *, times: int = 2000) -> tuple[float, float, float]:
    """Mean and the 95 % percentile interval over resampled values (Efron 1979)."""
    mean = sum(values) / len(values)
    generator = random.Random(seed)
    means = sorted(sum(generator.choices(values, k=len(values))) / len(values) for _ in range(times))
    return mean, means[int(0.025 * times)], means[int(0.975 * times) - 1]


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (1927); (0, 1) when there is nothing to go by."""
    if n == 0:
        return 0.0, 1.0
    p, zz = successes / n, z * z
    middle = (p + zz / (2 * n)) / (1 + zz / n)
    half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _metric(name: str, value: float, n: int, ci: Sequence[float] | None = None, slice: str = "") -> dict[str, Any]:
    return {"suite": "judge", "metric": name, "slice": slice, "value": value, "n": n} | ({"ci": list(ci)} if ci else {})
