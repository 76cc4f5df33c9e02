"""Stage ``evol_instruct``: tasks -> harder and rarer tasks, in rounds (WizardLM's Evol-Instruct, Xu et al. 2023, arXiv 2304.12244).

In each round a teacher rewrites every task by one operator, drawn by hash: five in depth (constraints, deepening, concretising,
reasoning steps, complicated input) and one in breadth (a new task of the same field). Then comes the elimination of the paper's
section 3.3, which the published code leaves out: a rewriting that gains nothing, that copies words of the prompt, or whose answer
is a refusal or no sentence is removed and counted, and its parent goes into the next round again. All that survived are the dataset.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.build import hash_of
from criadero.data.documents import Document
from criadero.data.filters import Tally
from criadero.errors import UserError
from criadero.synth import prompts
from criadero.synth.dataset import SEEDS, Chat, Task, chat_source, pair, read_tasks, removed_line, write_chats
from criadero.synth.self_instruct import check_held_out
from criadero.synth.teacher import TaughtFields, Teacher, ask, described, open_teacher, say
from criadero.synth.terms import check_terms
from criadero.synth.text import content_words, words

SOURCE = "evol_instruct"
DEPTH = ("constraints", "deepening", "concretising", "reasoning", "input")
OPERATORS = (*DEPTH, "breadth")

_VERDICT = re.compile(r"\b(same|equal|iguales|different|distintas|diferentes|not the same|no son iguales)\b", re.I)
_SORRY = re.compile(
    r"\b(?:sorry|i apologi[sz]e|i can(?:no|')t help|lo siento|lamento|disculpa\w*|no puedo ayudar)\b", re.I
)
# words of our prompts that only a teacher who misread them repeats
_PROMPT_WORDS = re.compile(
    r"<<<|>>>|\b(?:(?:the )?(?:new|rewritten|given|original) task\b|how:|tarea (?:nueva|reescrita|dada|original)\b|nueva tarea\b|cómo:)",
    re.I,
)


@dataclass(frozen=True, kw_only=True)
class EvolInstructRecipe(TaughtFields):
    """Which tasks to evolve, how often, and by which operators."""

    data: str = described(
        "tasks to begin with: a file of chats or a dataset artifact; default: those that come with the package", ""
    )
    limit: int = described("take only the first so many tasks (0: all)", 0)
    rounds: int = described("how often every task is rewritten (WizardLM: 4)", 4)
    operators: tuple[str, ...] = described("drawn with equal chances", OPERATORS)
    with_data: bool = described("put the tasks to begin with into the dataset too, if they have answers", True)
    data_licence: str = described(
        "licence of the tasks to begin with; default: the dataset's, or that of the package's own", ""
    )
    task_tokens: int = described("longest rewritten task, in tokens", 512)
    answer_tokens: int = described("longest answer, in tokens", 1024)
    temperature: float = described("of the teacher when it rewrites and answers", 1.0)


@dataclass(frozen=True)
class Evolved:
    """A task, the operator and round it came from, and the first task of its line."""

    task: Task
    root: str
    round: int = 0
    operator: str = ""
    parent: str = ""


def evol_instruct(
    recipe: EvolInstructRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True
) -> Artifact:
    """Evolve the tasks for some rounds and seal what survived, with the answers, as a ``dataset``.

    Killed at any moment, the same call goes on: answers are kept as they come. UserError as :func:`self_instruct`.
    """
    if recipe.rounds < 1 or recipe.rounds > 20:
        raise UserError(f"rounds must be from 1 to 20, not {recipe.rounds}")
    if wrong := sorted(set(recipe.operators) - set(OPERATORS)) or ([""] if not recipe.operators else []):
        raise UserError(f"operators: {wrong[0] or 'none given'}: choose from {', '.join(OPERATORS)}")
    check_held_out(recipe.held_out)
    data = recipe.data or str(SEEDS)
    tasks = read_tasks(data, limit=recipe.limit)
    teacher = open_teacher(recipe)
    terms = check_terms(teacher, recipe)
    tally = Tally()
    with create(
        out, kind="dataset", recipe=recipe, seeds={"seed": recipe.seed}, inputs=teacher.inputs,
        licence=recipe.licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        given = draft.add_input(
            "contains", data, licence=recipe.data_licence or ("Apache-2.0" if not recipe.data else None)
        )
        licence = given.licence or "unknown"
        survived, counts = evolve(recipe, tasks, teacher, tally)
        chats = [
            Chat(
                one.task.id, pair(one.task.question, one.task.output), one.task.lang, SOURCE, teacher.licence, group=one.root,
                made={"operator": one.operator, "round": one.round, "parent": one.parent, "root": one.root},
            )
            for one in survived
        ]  # fmt: skip
        sources = [chat_source(SOURCE, teacher.licence, attribution=teacher.made_by.name)]
        if recipe.with_data and (first := [task for task in tasks if task.output]):
            sources.append(chat_source("begun_with", licence))
            chats += [Chat(t.id, pair(t.question, t.output), t.lang, "begun_with", licence, group=t.id) for t in first]
        if not survived:
            raise UserError(f"{teacher.name}: not one rewritten task survived (removed: {removed_line(tally, SOURCE)})")
        read = {SOURCE: counts["rewritten"], "begun_with": len(chats) - len(survived)}
        synthetic = {SOURCE: True}
        written = write_chats(
            draft, chats, tally, sources, read, held_out=recipe.held_out, seed=recipe.seed, synthetic=synthetic
        )
        teacher.record(draft, terms)
        draft.step["derived"] = dict(sorted(counts.items()))
        say(
            f"{SOURCE}: {len(survived)} tasks of {counts['rewritten']} rewritten; removed: {removed_line(tally, SOURCE)}"
        )
        say(f"{written['train']} chats to learn, {written['held_out']} held out")
    return open_artifact(out)


def evolve(
    recipe: EvolInstructRecipe, tasks: Sequence[Task], teacher: Teacher, tally: Tally
) -> tuple[list[Evolved], Counter[str]]:
    """All rewritten tasks that survive, with answers, over all rounds; and counts by operator."""
    pool = [Evolved(task, task.id) for task in tasks]
    survived: list[Evolved] = []
    counts: Counter[str] = Counter()
    for number in range(1, recipe.rounds + 1):
        children = _rewrite(recipe, pool, number, teacher, tally, counts)
        children = _answer(recipe, _gaining(pool, children, teacher, tally), teacher, tally)
        # a task whose rewriting was removed goes into the next round as it is (section 3.3)
        pool = [children.get(n, one) for n, one in enumerate(pool)]
        survived += [children[n] for n in sorted(children)]
        say(f"{SOURCE}: round {number} of {recipe.rounds}: {len(children)} of {len(pool)} rewritten tasks survive")
    return survived, counts


def operator_of(recipe: EvolInstructRecipe, root: str, number: int) -> str:
    """The operator for a line of tasks in a round, drawn by hash with equal chances."""
    return recipe.operators[hash_of(recipe.seed, "operator", root, str(number)) % len(recipe.operators)]


def _rewrite(
    recipe: EvolInstructRecipe,
    pool: Sequence[Evolved],
    number: int,
    teacher: Teacher,
    tally: Tally,
    counts: Counter[str],
) -> dict[int, Evolved]:
    """Rewritten tasks by their place in the pool, those left out that no request is needed to judge."""
    operators = [operator_of(recipe, one.root, number) for one in pool]
    asks = []
    for one, operator in zip(pool, operators, strict=True):
        lang, task = one.task.lang, one.task.question
        text = (
            prompts.EVOLVE_BREADTH[lang].format(task=task)
            if operator == "breadth"
            else prompts.EVOLVE_DEPTH[lang].format(how=prompts.EVOLVE_HOW[lang][operator], task=task)
        )
        asks.append(ask(text, max_tokens=recipe.task_tokens, temperature=recipe.temperature, seed=recipe.seed + number))
    children: dict[int, Evolved] = {}
    for n, (one, operator, answer) in enumerate(zip(pool, operators, teacher.answer(asks), strict=True)):
        counts["rewritten"] += 1
        counts[f"operator_{operator}"] += 1
        text = unwrap(answer.text)
        id = f"{one.root}/{number}-{operator}"
        if answer.problem:
            reason = "unanswered"
        elif answer.finish == "length":
            reason = "cut_off"
        elif not words(text):
            reason = "empty"
        elif copies_prompt(text):
            reason = "prompt_words"
        elif words(text) == words(one.task.question):
            reason = "no_gain"
        else:
            children[n] = Evolved(Task(id, one.task.lang, text), one.root, number, operator, one.task.id)
            continue
        _drop(tally, id, text, one.task.lang, reason)
    return children


def unwrap(text: str) -> str:
    """The task without the marks that some teachers repeat around it."""
    return re.sub(r"\A\s*<<<\s*|\s*>>>\s*\Z", "", text).strip()


def copies_prompt(text: str) -> bool:
    """Rule 4 of the elimination: the rewriting has words of the prompt that asked for it."""
    return bool(_PROMPT_WORDS.search(text))


def _gaining(
    pool: Sequence[Evolved], children: dict[int, Evolved], teacher: Teacher, tally: Tally
) -> dict[int, Evolved]:
    """Rule 1: without those that ask for the same as their parent, in the teacher's judgement."""
    places = sorted(children)
    asks = [
        ask(
            prompts.SAME_TASK[pool[n].task.lang].format(old=pool[n].task.question, new=children[n].task.question),
            max_tokens=8,
            temperature=0.0,
        )
        for n in places
    ]
    kept = {}
    for n, answer in zip(places, teacher.answer(asks), strict=True):
        said = same(answer.text)
        reason = "unanswered" if answer.problem else "unparsable_verdict" if said is None else "no_gain" if said else ""
        if reason:
            child = children[n].task
            _drop(tally, child.id, child.question, child.lang, reason)
        else:
            kept[n] = children[n]
    return kept


def same(text: str) -> bool | None:
    """The verdict on two tasks: True for the same, None when it is neither or both."""
    found = {match.lower() for match in _VERDICT.findall(text)}
    alike = found & {"same", "equal", "iguales"}
    other = found - alike
    return None if bool(alike) == bool(other) else bool(alike)


def _answer(
    recipe: EvolInstructRecipe, children: dict[int, Evolved], teacher: Teacher, tally: Tally
) -> dict[int, Evolved]:
    """Rules 2 and 3: the tasks with their answers, without those whose answer is a refusal or says nothing."""
    places = sorted(children)
    asks = [
        ask(
            children[n].task.question, max_tokens=recipe.answer_tokens, temperature=recipe.temperature, seed=recipe.seed
        )
        for n in places
    ]
    kept = {}
    for n, answer in zip(places, teacher.answer(asks), strict=True):
        one = children[n]
        reason = "unanswered" if answer.problem else "cut_off" if answer.finish == "length" else bad_answer(answer.text)
        if reason:
            _drop(tally, one.task.id, one.task.question, one.task.lang, reason)
        else:
            kept[n] = dataclasses.replace(one, task=dataclasses.replace(one.task, output=answer.text.strip()))
    return kept


def bad_answer(text: str) -> str:
    """``sorry``: an apology in fewer than 80 words (rule 2); ``says_nothing``: marks and function words only (rule 3); or ""."""
    if _SORRY.search(text) and len(text.split()) < 80:
        return "sorry"
    return "" if content_words(text) else "says_nothing"


def _drop(tally: Tally, id: str, text: str, lang: str, reason: str) -> None:
    tally.drop(Document(id, text, lang, SOURCE, ""), reason)
