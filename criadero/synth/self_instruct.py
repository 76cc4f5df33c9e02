"""Stage ``self_instruct``: a few tasks written by people -> many written by a teacher (Self-Instruct, Wang et al. 2022, arXiv 2212.10560).

As Stanford's Alpaca did it: each request shows a few seed tasks and asks for more, each with an instruction, perhaps an input,
and an answer. What comes back is filtered by rules, and an instruction that is too alike to one we have (ROUGE-L of 0.7 and more) is
left out. Every removal has a reason and is counted. Seeds are drawn by hash, so a run that is repeated asks the same.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.build import hash_of
from criadero.data.documents import Document
from criadero.data.filters import PASTED, Tally, identify
from criadero.errors import UserError
from criadero.synth import prompts
from criadero.synth.dataset import SEEDS, Chat, Task, chat_source, pair, read_tasks, removed_line, write_chats
from criadero.synth.teacher import Answer, Ask, TaughtFields, Teacher, ask, described, open_teacher, say
from criadero.synth.terms import check_terms
from criadero.synth.text import Pool

SOURCE = "self_instruct"
BARREN = 8  # batches in a row without one new task: the teacher has no more to give

_BLOCK = re.compile(
    r"(?m)^\s*(?:#{1,4}\s*(?:task|tarea|example|ejemplo)?|(?:task|tarea))\s*(\d{1,4})\s*[.):]?\s*$", re.I
)
_FIELD = re.compile(
    r"(?mi)^\s*(?:\*\*)?(instruction|instrucción|instruccion|input|entrada|output|respuesta|salida)(?:\*\*)?\s*:(?:\*\*)?"
)
_PART = {
    "instruction": "instruction", "instrucción": "instruction", "instruccion": "instruction", "input": "input", "entrada": "input",
    "output": "output", "respuesta": "output", "salida": "output",
}  # fmt: skip
_NOTHING = re.compile(r"\W*(?:none|no input|n/?a|ninguna?|nada|sin entrada|)\W*", re.I)
# What a model of text cannot do, by the words that give it away (Alpaca has such a list too; this one is ours).
_CANNOT = re.compile(
    r"\b(?:images?|pictures?|photos?|graphs?|charts?|diagrams?|draw|sketch|plot|videos?|audio|music|song file|recording|maps?|files?|"
    r"website|link|url|attached|screenshot|imagen|imágenes|fotos?|fotografías?|gráfic[oa]s?|diagramas?|dibuj[aoe]\w*|vídeos?|videos?|"
    r"grabación|mapas?|archivos?|ficheros?|enlace|adjunt[oa]s?|captura)\b",
    re.I,
)
_PROGRAM = re.compile(
    r"^(?:write|create|escribe|crea|haz)\s+(?:a|an|un|una)\s+(?:\w+\s+)?(?:program|programa|script)\b", re.I
)
_BEGINNING = re.compile(r"[^\W_]|[¿¡\"'«(]")


@dataclass(frozen=True, kw_only=True)
class SelfInstructRecipe(TaughtFields):
    """How many tasks to ask for, of whom, and what to leave out."""

    tasks: int = described("new tasks wanted", 200)
    seeds: str = described("tasks to begin with, a file of chats; default: those that come with the package", "")
    languages: tuple[str, ...] = described("languages of the tasks, in turn: en, es", ("en", "es"))
    shown: int = described("seed tasks shown in each request (Alpaca: 3)", 3)
    per_request: int = described("new tasks asked for in each request (Alpaca: 17)", 10)
    batch: int = described("requests sent together; none of them knows the others' tasks", 4)
    most_requests: int = described(
        "stop after so many requests (0: four times what would do if every task were good)", 0
    )
    min_words: int = described("shortest instruction, in words (Alpaca: 4)", 4)
    max_words: int = described("longest instruction, in words (Alpaca: 150)", 150)
    most_alike: float = described("ROUGE-L with an earlier instruction from which a new one is left out", 0.7)
    answer_tokens: int = described("longest reply, in tokens; 0: 150 a task", 0)
    temperature: float = described("of the teacher", 1.0)
    with_seeds: bool = described("put the seed tasks into the dataset too", True)
    seed_licence: str = described("licence of the seed tasks", "Apache-2.0")


def self_instruct(
    recipe: SelfInstructRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True
) -> Artifact:
    """Ask `recipe.teacher` for tasks until there are enough, and seal them as a ``dataset``.

    Killed at any moment, the same call goes on: answers are kept as they come. UserError before the first request: bad settings or
    seeds, terms that forbid it; after it: the budget is spent, the teacher does not answer, or not one task was usable.
    """
    _check(recipe)
    seeds = [task for task in read_tasks(recipe.seeds or SEEDS) if task.lang in recipe.languages]
    for lang in recipe.languages:
        if sum(task.lang == lang for task in seeds) < recipe.shown:
            raise UserError(
                f"{recipe.seeds or SEEDS.name}: fewer than {recipe.shown} seed tasks in {lang!r}: add some, or leave it out of languages"
            )
    teacher = open_teacher(recipe)
    terms = check_terms(teacher, recipe)
    tally = Tally()
    with create(
        out, kind="dataset", recipe=recipe, seeds={"seed": recipe.seed}, inputs=teacher.inputs,
        licence=recipe.licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        draft.add_input(
            "contains",
            recipe.seeds or SEEDS,
            name=f"seeds/{Path(recipe.seeds or SEEDS).name}",
            licence=recipe.seed_licence,
        )
        tasks, counts = generate(recipe, seeds, teacher, tally)
        chats = [Chat(t.id, pair(t.question, t.output), t.lang, SOURCE, teacher.licence) for t in tasks]
        sources = [chat_source(SOURCE, teacher.licence, attribution=teacher.made_by.name)]
        if recipe.with_seeds:
            sources.append(chat_source("seeds", recipe.seed_licence))
            chats += [
                Chat(t.id, pair(t.question, t.output), t.lang, "seeds", recipe.seed_licence) for t in seeds if t.output
            ]
        read = {SOURCE: counts["candidates"], "seeds": len(chats) - len(tasks)}
        if not tasks:
            raise UserError(
                f"{teacher.name}: not one usable task in {counts['requests']} requests (removed: {removed_line(tally, SOURCE)})"
            )
        written = write_chats(
            draft, chats, tally, sources, read, held_out=recipe.held_out, seed=recipe.seed, synthetic={SOURCE: True}
        )
        teacher.record(draft, terms)
        draft.step["derived"] = dict(counts)
        say(f"{SOURCE}: {len(tasks)} tasks of {counts['candidates']}; removed: {removed_line(tally, SOURCE)}")
        if len(tasks) < recipe.tasks:
            say(
                f"note: {recipe.tasks} tasks were wanted; {counts['why']}"
                if "why" in counts
                else f"note: {recipe.tasks} tasks were wanted"
            )
        say(f"{written['train']} chats to learn, {written['held_out']} held out")
    return open_artifact(out)


def _check(recipe: SelfInstructRecipe) -> None:
    for name in ("tasks", "shown", "per_request", "batch", "min_words"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(recipe, name)}")
    if recipe.max_words < recipe.min_words:
        raise UserError(f"max_words ({recipe.max_words}) must not be below min_words ({recipe.min_words})")
    if not 0 < recipe.most_alike <= 1:
        raise UserError(f"most_alike must be above 0 and at most 1, not {recipe.most_alike:g}")
    check_held_out(recipe.held_out)
    check_languages(recipe.languages)


def check_held_out(share: float) -> None:
    if not 0 <= share < 1:
        raise UserError(f"held_out must be at least 0 and below 1, not {share:g}")


def check_languages(languages: Sequence[str]) -> None:
    wrong = [lang for lang in languages if lang not in prompts.TASKS]
    if wrong or not languages:
        raise UserError(f"languages: {wrong[0] if wrong else 'none given'}: the prompts are written in en and es")


def generate(
    recipe: SelfInstructRecipe, seeds: Sequence[Task], teacher: Teacher, tally: Tally
) -> tuple[list[Task], Counter[str]]:
    """New tasks that pass the filters, at most `recipe.tasks`, and counts: requests, candidates."""
    pool = Pool(task.instruction for task in seeds)
    kept: list[Task] = []
    counts: Counter[str] = Counter()
    most = recipe.most_requests or 4 * -(-recipe.tasks // recipe.per_request) + BARREN
    barren = 0
    while len(kept) < recipe.tasks and counts["requests"] < most and barren < BARREN:
        # no more requests than what is missing may need, so that nothing is paid for in vain
        missing = -(-(recipe.tasks - len(kept)) // recipe.per_request)
        numbers = range(counts["requests"], min(counts["requests"] + min(recipe.batch, missing), most))
        asks, langs = [], []
        for number in numbers:
            lang = recipe.languages[number % len(recipe.languages)]
            langs.append(lang)
            asks.append(request(recipe, [task for task in seeds if task.lang == lang], lang, number))
        before = len(kept)
        for number, lang, answer in zip(numbers, langs, teacher.answer(asks), strict=True):
            counts["requests"] += 1
            for place, task in enumerate(_candidates(recipe, answer, lang, f"{SOURCE}-{number:05d}", tally, counts)):
                reason = removal(recipe, task, pool)
                if reason is None and len(kept) >= recipe.tasks:
                    reason = "enough"
                if reason:
                    drop(tally, task, reason)
                    continue
                pool.add(task.instruction)
                kept.append(dataclasses.replace(task, id=f"{SOURCE}-{number:05d}-{place:02d}"))
        barren = barren + 1 if len(kept) == before else 0
        say(f"{SOURCE}: {len(kept)} of {recipe.tasks} tasks after {counts['requests']} requests")
    return kept, counts


def request(recipe: SelfInstructRecipe, seeds: Sequence[Task], lang: str, number: int) -> Ask:
    """The request with that number: seeds drawn by hash, shown as numbered blocks."""
    drawn = sorted(seeds, key=lambda task: hash_of(recipe.seed, "draw", str(number), task.id))[: recipe.shown]
    first, last = recipe.shown + 1, recipe.shown + recipe.per_request
    head = prompts.TASKS[lang].format(shown=recipe.shown, wanted=recipe.per_request, first=first, last=last)
    blocks = "\n".join(block(task, n, lang) for n, task in enumerate(drawn, 1))
    tokens = recipe.answer_tokens or 150 * recipe.per_request
    return ask(
        f"{head}\n{blocks}\n### {first}", max_tokens=tokens, temperature=recipe.temperature, seed=recipe.seed + number
    )


def block(task: Task, number: int, lang: str) -> str:
    """A task as the prompt shows it, and as it is to come back."""
    instruction, given, output, none = prompts.TASK_LABELS[lang]
    return f"### {number}\n{instruction}: {task.instruction}\n{given}: {task.input or none}\n{output}: {task.output}\n"


def parse(text: str) -> Iterator[Task | None]:
    """The tasks of a reply, None for a block that lacks its instruction or its answer."""
    ends = [*_BLOCK.finditer(text)]
    starts = [0, *(match.end() for match in ends)]
    stops = [*(match.start() for match in ends), len(text)]
    for start, stop in zip(starts, stops, strict=True):
        piece = text[start:stop]
        if not piece.strip():
            continue  # the prompt ends with the first number, which some teachers write again
        parts: dict[str, str] = {}
        fields = [*_FIELD.finditer(piece)]
        for n, match in enumerate(fields):
            value = piece[match.end() : fields[n + 1].start() if n + 1 < len(fields) else len(piece)].strip()
            parts.setdefault(_PART[match[1].lower()], value)
        if not parts.get("instruction") or not parts.get("output"):
            yield None
            continue
        given = parts.get("input", "")
        yield Task("", "", parts["instruction"], "" if _NOTHING.fullmatch(given) else given, parts["output"])


def _candidates(
    recipe: SelfInstructRecipe, answer: Answer, lang: str, id: str, tally: Tally, counts: Counter[str]
) -> Iterator[Task]:
    """The tasks of one reply; what could not be read is counted: unanswered, unparsable, cut_off."""
    if answer.problem:
        tally.drop(Document(id, "", lang, SOURCE, ""), "unanswered")
        counts["candidates"] += 1
        return
    found = list(parse(answer.text))
    if not found:
        found = [None]
    for n, task in enumerate(found):
        counts["candidates"] += 1
        if answer.finish == "length" and n == len(found) - 1:
            tally.drop(Document(id, "", lang, SOURCE, ""), "cut_off")  # the last one is not whole
        elif task is None:
            tally.drop(Document(id, answer.text[:200], lang, SOURCE, ""), "unparsable")
        else:
            yield dataclasses.replace(task, lang=lang)


def removal(recipe: SelfInstructRecipe, task: Task, pool: Pool) -> str | None:
    """Why a task is left out, or None: the rules of Alpaca's generate_instruction.py, for two languages."""
    n = len(task.instruction.split())
    if n < recipe.min_words:
        return "short"
    if n > recipe.max_words:
        return "long"
    if not _BEGINNING.match(task.instruction):
        return "beginning"
    if _CANNOT.search(task.instruction):
        return "beyond_text"
    if _PROGRAM.match(task.instruction):
        return "program"
    if task.output.strip() in (task.instruction.strip(), task.input.strip()):
        return "echo"
    if PASTED.search(task.question + "\n" + task.output):
        return "pasted"
    # a few words may look like a third language, and a translation is in two: both have to speak against it
    if all(
        identify(text)[0] not in ("unknown", task.lang) for text in (task.instruction, f"{task.question} {task.output}")
    ):
        return "language"
    return "alike" if pool.alike(task.instruction, recipe.most_alike) else None


def drop(tally: Tally, task: Task, reason: str) -> None:
    tally.drop(Document(task.id, task.instruction, task.lang, SOURCE, ""), reason)
