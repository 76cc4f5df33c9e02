"""Stage ``document_questions``: a folder of your documents -> questions and answers that stand in them, each traceable to its paragraph.

A teacher reads one paragraph at a time and writes questions of one of Dolly's kinds (closed question, information extraction,
summary) with answers from that paragraph alone. An answer is kept only if its words and numbers are in the paragraph: a check that
is blunt, but that no teacher can talk its way out of. Without a teacher (``teacher = "none"``) each heading is made a question,
and the text below it is the answer: nothing is invented, and nothing is paid.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, create, open_artifact
from criadero.data.build import hash_of
from criadero.data.documents import Document
from criadero.data.filters import PASTED, SENTENCE_END, Tally, identify
from criadero.errors import UserError
from criadero.synth import prompts
from criadero.synth.dataset import Chat, chat_source, pair, removed_line, write_chats
from criadero.synth.paragraphs import Paragraph, find_documents, paragraphs, read_text
from criadero.synth.self_instruct import check_held_out
from criadero.synth.teacher import TaughtFields, Teacher, ask, described, open_teacher, say
from criadero.synth.terms import check_terms
from criadero.synth.text import Pool, covered, words

SOURCE = "documents"
KINDS = ("closed_qa", "information_extraction", "summarization")  # those of Dolly's eight that a text alone can answer
_TURN = re.compile(
    r"(?mi)^\s*(?:\*\*)?(?:\d+[.)]\s*)?(?:\*\*)?(q|question|p|pregunta|a|answer|r|respuesta)\s*\d*\s*[:.](?:\*\*)?\s+"
)
_NOTHING = re.compile(r"\W*(?:nothing|nada)\W*", re.I)
_REFERS = re.compile(
    r"\b(?:the|this|that|given|above|following) (?:text|passage|paragraph|document|article|excerpt)\b|\bmentioned above\b|"
    r"\b(?:el|este|ese|del|al|dicho) (?:texto|pasaje|párrafo|documento|artículo|fragmento)\b|\bmencionad[oa]s? arriba\b",
    re.I,
)
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")


@dataclass(frozen=True, kw_only=True)
class DocumentQuestionsRecipe(TaughtFields):
    """Which documents, how many questions of which kinds, and how close an answer has to stay to its paragraph."""

    teacher: str = described(
        'who writes: the URL of an OpenAI-compatible endpoint, a bundled model or a folder, a .jsonl of recorded answers; or "none": '
        "headings become questions",
        "none",
    )
    documents: str = described("a folder of documents, or one: Markdown, HTML, plain text, PDF")
    document_licence: str = described("licence of the documents", "unknown")
    language: str = described("en or es; empty: each paragraph's own", "")
    kinds: tuple[str, ...] = described(
        "kinds of questions, drawn for each paragraph; named twice, one is drawn twice as often",
        ("closed_qa", "closed_qa", "information_extraction", "summarization"),
    )
    questions: int = described("questions for each paragraph", 3)
    min_paragraph: int = described("shortest paragraph, in words", 8)
    max_paragraph: int = described("longest, in words: shorter ones are put together, longer ones cut", 180)
    longest_answer: int = described("in words", 60)
    grounded: float = described(
        "share of an answer's content words that have to be in its paragraph, its headings or its question", 0.8
    )
    most_alike: float = described("ROUGE-L with an earlier question from which a new one is left out", 0.9)
    with_context: bool = described(
        "put the paragraph into the question, for a student that is to read rather than to know", False
    )
    temperature: float = described("of the teacher", 0.7)


@dataclass(frozen=True)
class Question:
    """A question, its answer and the paragraph it comes from."""

    question: str
    answer: str
    paragraph: Paragraph
    lang: str
    kind: str


def document_questions(
    recipe: DocumentQuestionsRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True
) -> Artifact:
    """Ask for questions and answers about every paragraph, check them against it, and seal the chats as a ``dataset``.

    A row's ``made`` names the paragraph: id, file, start and end in characters (of the file's text; of HTML's Markdown; of a PDF's
    pages), headings, page; ``paragraphs.jsonl`` holds their texts. Killed, the same call goes on. UserError: no readable document, bad
    settings, terms that forbid it, no answer that stands in its paragraph.
    """
    _check(recipe)
    files = find_documents(recipe.documents)
    root = Path(recipe.documents)
    found: list[Paragraph] = []
    silent = []
    for file in files:
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        here = list(
            paragraphs(file, read_text(file), name=name, min_words=recipe.min_paragraph, max_words=recipe.max_paragraph)
        )
        silent += [] if here else [name]
        found += here
    if not found:
        raise UserError(f"{root}: no paragraph of {recipe.min_paragraph} words and more in {len(files)} documents")
    if silent:
        say(
            f"note: no paragraph of {recipe.min_paragraph} words and more in {', '.join(silent[:5])}{' ...' if silent[5:] else ''}"
        )
    teacher = open_teacher(recipe) if recipe.teacher != "none" else None
    terms = check_terms(teacher, recipe) if teacher else []
    tally, counts = Tally(), Counter[str]()
    with create(
        out, kind="dataset", recipe=recipe, seeds={"seed": recipe.seed},
        inputs=teacher.inputs if teacher else (), licence=recipe.licence or None, overwrite=overwrite,
    ) as draft:  # fmt: skip
        for file in files:
            name = file.relative_to(root).as_posix() if root.is_dir() else file.name
            draft.add_input(
                "contains", file, name=f"{SOURCE}/{name}", licence=recipe.document_licence, locator=str(file)
            )
        languages = [recipe.language or _language(one) for one in found]
        asked = (
            _ask(recipe, found, languages, teacher, tally, counts)
            if teacher
            else _from_headings(found, languages, counts, recipe)
        )
        kept = _kept(recipe, asked, tally)
        licence = teacher.licence if teacher else recipe.document_licence
        both = licence if licence == recipe.document_licence else f"{licence} AND {recipe.document_licence}"
        chats = [_chat(one, n, recipe, both) for n, one in enumerate(kept)]
        source = chat_source(SOURCE, both, attribution=teacher.made_by.name if teacher else "")
        read = {SOURCE: counts["candidates"]}
        written = write_chats(
            draft,
            chats,
            tally,
            [source],
            read,
            held_out=recipe.held_out,
            seed=recipe.seed,
            synthetic={SOURCE: bool(teacher)},
        )
        _write_paragraphs(draft.path / "paragraphs.jsonl", found, kept)
        if teacher:
            teacher.record(draft, terms)
        used = {one.paragraph.id for one in kept}
        draft.step["derived"] = {
            "paragraphs": len(found),
            "paragraphs_with_questions": len(used),
            **dict(sorted(counts.items())),
        }
        say(f"{SOURCE}: {len(files)} documents, {len(found)} paragraphs, {len(used)} of them with questions")
        say(f"{SOURCE}: {len(kept)} questions of {counts['candidates']}; removed: {removed_line(tally, SOURCE)}")
        say(f"{written['train']} chats to learn, {written['held_out']} held out")
    return open_artifact(out)


def _check(recipe: DocumentQuestionsRecipe) -> None:
    wrong = [kind for kind in recipe.kinds if kind not in KINDS]
    if wrong or not recipe.kinds:
        raise UserError(f"kinds: {wrong[0] if wrong else 'none given'}: choose from {', '.join(KINDS)}")
    if recipe.language not in ("", *prompts.QUESTIONS):
        raise UserError(f"language {recipe.language!r}: the prompts are written in en and es")
    for name in ("questions", "min_paragraph", "longest_answer"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(recipe, name)}")
    if recipe.max_paragraph < recipe.min_paragraph:
        raise UserError(
            f"max_paragraph ({recipe.max_paragraph}) must not be below min_paragraph ({recipe.min_paragraph})"
        )
    if not 0 <= recipe.grounded <= 1 or not 0 < recipe.most_alike <= 1:
        raise UserError("grounded and most_alike are shares, from 0 to 1")
    check_held_out(recipe.held_out)


def _language(paragraph: Paragraph) -> str:
    found, _ = identify(" ".join((*paragraph.headings, paragraph.text)))
    return found if found in prompts.QUESTIONS else "en"


# -- asking -----------------------------------------------------------------------------------------------------------


def _ask(
    recipe: DocumentQuestionsRecipe, found: Sequence[Paragraph], languages: Sequence[str], teacher: Teacher, tally: Tally,
    counts: Counter[str],
) -> list[Question]:  # fmt: skip
    """One request for each paragraph, and what could be read of the replies."""
    kinds = [recipe.kinds[hash_of(recipe.seed, "kind", one.id, one.text) % len(recipe.kinds)] for one in found]
    sampling = {"temperature": recipe.temperature, "seed": recipe.seed}
    tokens = recipe.questions * (40 + 3 * recipe.longest_answer)
    asks = [
        ask(request_text(recipe, one, lang, kind), max_tokens=tokens, **sampling)
        for one, lang, kind in zip(found, languages, kinds, strict=True)
    ]
    out: list[Question] = []
    for begin in range(0, len(asks), 64):
        part = slice(begin, begin + 64)
        for one, lang, kind, answer in zip(
            found[part], languages[part], kinds[part], teacher.answer(asks[part]), strict=True
        ):
            if answer.problem or not (pairs := parse(answer.text)):
                counts["candidates"] += 1
                reason = (
                    "unanswered"
                    if answer.problem
                    else "nothing_asked"
                    if _NOTHING.fullmatch(answer.text)
                    else "unparsable"
                )
                tally.drop(Document(one.id, answer.text[:200], lang, SOURCE, ""), reason)
                continue
            for n, (question, text) in enumerate(pairs):
                counts["candidates"] += 1
                if answer.finish == "length" and n == len(pairs) - 1:
                    tally.drop(Document(one.id, question, lang, SOURCE, ""), "cut_off")
                else:
                    out.append(Question(question, text, one, lang, kind))
        if len(asks) > 64:
            say(f"{SOURCE}: {min(begin + 64, len(asks))} of {len(asks)} paragraphs asked about")
    return out


def request_text(recipe: DocumentQuestionsRecipe, one: Paragraph, lang: str, kind: str) -> str:
    """The request about a paragraph."""
    single, many = prompts.QUESTIONS_WANTED[lang]
    wanted = single if recipe.questions == 1 else many.format(n=recipe.questions)
    title = prompts.QUESTIONS_TITLE[lang].format(" > ".join(one.headings)) if one.headings else ""
    return prompts.QUESTIONS[lang].format(
        wanted=wanted, how=prompts.QUESTIONS_HOW[lang][kind], longest=recipe.longest_answer, title=title, text=one.text
    )


def parse(text: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of a reply; a question without an answer, or an answer alone, is left out."""
    marks = list(_TURN.finditer(text))
    found: list[tuple[str, str]] = []
    question = ""
    for n, mark in enumerate(marks):
        body = text[mark.end() : marks[n + 1].start() if n + 1 < len(marks) else len(text)].strip()
        if mark[1].lower() in ("q", "question", "p", "pregunta"):
            question = body
        elif question and body:
            found.append((" ".join(question.split()), body))
            question = ""
    return found


def _from_headings(
    found: Sequence[Paragraph], languages: Sequence[str], counts: Counter[str], recipe: DocumentQuestionsRecipe
) -> list[Question]:
    """Without a teacher: a paragraph's innermost heading as a question, and its first sentences as the answer."""
    out = []
    taken: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one, lang in zip(found, languages, strict=True):
        place = (one.file, one.headings)
        taken[place] += 1
        if not one.headings or taken[place] > 1:
            continue  # a heading is asked about once, and its first paragraph answers
        title = one.headings[-1]
        if title.endswith("?"):
            forms: Sequence[str] = (title,)
        else:
            # a chapter's name tells apart the "Prices" of two documents
            subject = title if sum(p.headings[-1:] == (title,) for p in found) == 1 else " - ".join(one.headings)
            forms = [form.format(subject) for form in prompts.HEADING_ASKED[lang]]
        for form in forms[: recipe.questions]:
            counts["candidates"] += 1
            out.append(Question(form, first_sentences(plain(one.text), recipe.longest_answer), one, lang, "closed_qa"))
    return out


def plain(text: str) -> str:
    """Markdown as a person would say it: without marks of emphasis, links, quotes and bullets, in one line."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(?m)^\s*(?:[-*+>]|\d+\.)\s+", "", text)
    return " ".join(re.sub(r"(\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w))", "", text).split())


def first_sentences(text: str, most: int) -> str:
    """As many whole sentences from the beginning as have at most `most` words; the first one in any case."""
    end = 0
    for match in SENTENCE_END.finditer(text):
        if end and len(text[: match.end()].split()) > most:
            break
        end = match.end()
    return text[:end].strip() if end else text


# -- checking ---------------------------------------------------------------------------------------------------------


def _kept(recipe: DocumentQuestionsRecipe, asked: Sequence[Question], tally: Tally) -> list[Question]:
    """The questions that pass the checks; the others are counted by reason."""
    pool = Pool()
    seen: set[str] = set()
    kept = []
    for one in asked:
        reason = removal(one, recipe)
        key = " ".join(words(one.question))
        if (
            reason is None
            and not recipe.with_context
            and (key in seen or (recipe.teacher != "none" and pool.alike(one.question, recipe.most_alike)))
        ):
            reason = "alike"
        if reason:
            tally.drop(Document(one.paragraph.id, one.question, one.lang, SOURCE, ""), reason)
            continue
        seen.add(key)
        pool.add(one.question)
        kept.append(one)
    return kept


def removal(one: Question, recipe: DocumentQuestionsRecipe) -> str | None:
    """Why a question is left out, or None."""
    if len(words(one.question)) < 2 or not words(one.answer):
        return "short"
    if recipe.teacher != "none" and len(one.answer.split()) > 2 * recipe.longest_answer:
        return "long"
    if not recipe.with_context and _REFERS.search(one.question):
        return "refers_to_text"
    if PASTED.search(one.answer) and not PASTED.search(one.paragraph.text):
        return "pasted"
    return ungrounded(one.answer, one.paragraph, one.question, recipe.grounded)


def ungrounded(answer: str, paragraph: Paragraph, question: str, share: float) -> str | None:
    """``number`` when the answer has one that is neither in the paragraph nor in the question, ``ungrounded`` when less than `share` of its
    content words are there (by stem, headings included), None when it stands in the paragraph."""
    source = " ".join((*paragraph.headings, paragraph.text))
    known = set(_NUMBER.findall(source)) | set(_NUMBER.findall(question))
    if any(number not in known for number in _NUMBER.findall(answer)):
        return "number"
    return "ungrounded" if covered(answer, source + " " + question)[0] < share else None


# -- writing ----------------------------------------------------------------------------------------------------------


def _chat(one: Question, number: int, recipe: DocumentQuestionsRecipe, licence: str) -> Chat:
    asked = (
        prompts.CONTEXT[one.lang].format(question=one.question, text=one.paragraph.text)
        if recipe.with_context
        else one.question
    )
    made: dict[str, Any] = {
        "kind": one.kind, "paragraph": one.paragraph.id, "file": one.paragraph.file, "start": one.paragraph.start, "end": one.paragraph.end,
        "headings": list(one.paragraph.headings),
    }  # fmt: skip
    if one.paragraph.page:
        made["page"] = one.paragraph.page
    return Chat(f"{SOURCE}-{number:06d}", pair(asked, one.answer), one.lang, SOURCE, licence, made=made)


def _write_paragraphs(path: Path, found: Sequence[Paragraph], kept: Sequence[Question]) -> None:
    import json

    asked = Counter(one.paragraph.id for one in kept)
    with path.open("w", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps({**dataclasses.asdict(one), "questions": asked[one.id]}, ensure_ascii=False) + "\n")
