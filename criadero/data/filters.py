"""Filters: plain functions over an iterator of documents that count, and can keep, what they remove or change.

``step(documents, tally, ...) -> Iterator[Document]``. Rules come from C4 (Raffel et al. 2020, arXiv 1910.10683, section 2.2),
Gopher's MassiveText (Rae et al. 2021, arXiv 2112.11446, appendix A.1.1) and FineWeb (Penedo et al. 2024, arXiv 2406.17557,
section 3.5); each rule names its own. Thresholds are the papers' unless the docstring says otherwise. The papers' rules are made for web
pages: a chat or a children's story is shorter, so ``min_words`` is lower here.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from criadero.data.documents import Document

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)]*(?=\s|$)|\n+")


@dataclass
class Tally:
    """What the steps removed and changed: ``removed[source, reason]`` documents and ``changed[source, what]`` documents.

    ``keep``, when given, is called with every removed document and the reason.
    """

    removed: Counter[tuple[str, str]] = field(default_factory=Counter)
    changed: Counter[tuple[str, str]] = field(default_factory=Counter)
    keep: Callable[[Document, str], None] | None = None

    def drop(self, document: Document, reason: str) -> None:
        self.removed[document.source, reason] += 1
        if self.keep:
            self.keep(document, reason)

    def change(self, document: Document, what: str) -> None:
        self.changed[document.source, what] += 1

    def by_reason(self, source: str) -> dict[str, int]:
        return {reason: n for (name, reason), n in sorted(self.removed.items()) if name == source}

    def changes(self, source: str) -> dict[str, int]:
        return {what: n for (name, what), n in sorted(self.changed.items()) if name == source}


# --- normalisation ---------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff\u200b\u200e\u200f\u2060\u00ad\ufffe\uffff]")
_SPACES = re.compile(r"[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
_QUOTES = str.maketrans({"“": '"', "”": '"', "„": '"', "‘": "'", "’": "'", "‚": "'", "\u2010": "-", "\u2011": "-"})


def normalise_text(text: str, *, plain_quotes: bool = False) -> tuple[str, list[str]]:
    """The text in NFC with ``\\n`` line ends, without control characters; and the names of what had to change."""
    changes = []

    def step(what: str, new: str) -> None:
        nonlocal text
        if new != text:
            changes.append(what)
            text = new

    step("newlines", text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n").replace("\u2029", "\n\n"))
    step("control", _CONTROL.sub("", text))
    step("unicode", unicodedata.normalize("NFC", text))
    step("spaces", _SPACES.sub(" ", text))
    if plain_quotes:
        step("quotes", text.translate(_QUOTES))
    step("blanks", re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip())
    return text, changes


def normalise(documents: Iterable[Document], tally: Tally, *, plain_quotes: bool = False) -> Iterator[Document]:
    """Unicode NFC, newlines, control and zero-width characters, blank lines; counted as changes by kind.

    ``plain_quotes`` also turns curly quotes into straight ones: a small vocabulary then spells each word one way. Removes documents
    that are empty (``empty``) or hold U+FFFD, the mark of a broken decoding (``broken_encoding``).
    """
    for document in documents:
        text, changes = normalise_text(document.text, plain_quotes=plain_quotes)
        meta = document.meta
        if "messages" in meta:
            turns = [
                {**m, "content": normalise_text(m["content"], plain_quotes=plain_quotes)[0]} for m in meta["messages"]
            ]
            meta = {**meta, "messages": turns}
            if not all(m["content"] for m in turns):
                text = ""
        for what in changes:
            tally.change(document, what)
        if not text:
            tally.drop(document, "empty")
        elif "\ufffd" in text:
            tally.drop(document, "broken_encoding")
        else:
            yield replace(document, text=text, meta=meta) if changes else document


# --- language --------------------------------------------------------------------------------------------------------

# The commonest function words of each language, written down for this purpose. A word of k languages votes 1/k for each.
_STOP_WORDS = {
    "en": """the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were
        when we there can an your which their said if do will each about how up out them then she many some so these would other into has
        more her two like him see time could no make than been its who now people my made over did down only way find use may i you he me
        just don't it's i'm that's because where why does should our am very any too also after before""",
    "es": """de la que el en y a los se del las un por con no una su para es al lo como más pero sus le ya o este sí porque esta entre
        cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos uno les ni contra otros ese eso ante ellos esto
        mí antes algunos qué unos yo otro otras otra él tanto esa estos mucho quienes nada muchos cual poco ella estar estas algunas algo
        nosotros mi tú te ti tu tus ellas está son era fue ser hacer tiene había cómo cuánto cuántos cuántas dónde eres soy estoy usted
        después así aquí si bien vez cada""",
    "fr": """de la le et les des en un du une que est dans qui par pour au il sur ne se pas plus son ce avec sont ou mais comme sa été aux
        cette ses nous vous ils elle je tu mon ont aussi leur bien peut tous fait même sans être c'est d'un qu'il j'ai
        n'est deux où très""",
    "pt": """de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua ou ser quando
        muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos ter seus quem nas me esse eles estão você
        tinha foram essa num nem suas meu às minha têm numa pelos elas havia seja qual será nós lhe são""",
    "it": """di e il la che in a per un è del non sono le si una da con i della al lo come più ha gli nel ma dei anche alla se su suo era
        questo ci delle mi nella ho io tu lui lei noi voi loro cosa perché quando molto essere fatto dal c'è stato dell""",
    "de": """der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat dass sie nach
        wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis mehr durch man sein wurde ich du""",
    "nl": """de en van het een in is dat op te zijn met voor niet die aan er ook als bij door maar naar uit nog om ze hij wordt heeft
        worden over dan was ik je wij deze kan geen hebben wat tot""",
    "ca": """de la i que a el en les els un per amb una és no del al es com més va ha són pel aquest aquesta també molt però seva seu
        hi ho dels les perquè quan entre fins ser era on tot jo nosaltres""",
}
VOTES: dict[str, list[tuple[str, float]]] = {}
for _lang, _words in _STOP_WORDS.items():
    for _word in set(_words.split()):
        VOTES.setdefault(_word, []).append((_lang, 0.0))
VOTES = {word: [(lang, 1 / len(langs)) for lang, _ in langs] for word, langs in VOTES.items()}
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def identify(text: str, *, languages: Sequence[str] = ("en", "es")) -> tuple[str, float]:
    """Guess the language by function words: one of ``languages``, ``"other"`` or ``"unknown"``, and the winner's share of votes.

    Text mostly outside the Latin script is ``other``; fewer than two votes, or a tie, is ``unknown`` (too short to say).
    Measured (``tests/test_filters.py``): XQuAD's 480 paragraphs 99.8 % right, MGSM's 500 questions 100 %, XQuAD's 2380 short questions
    99.1 %, the rest unknown, none taken for the other of the two. Looks at 20 000 characters.
    """
    text = text[:20000]
    letters = sum(map(str.isalpha, text))
    if letters and len(_LATIN.findall(text)) < letters / 2:
        return "other", 1.0
    words = WORD.findall(text.lower().replace("’", "'"))
    votes: Counter[str] = Counter()
    for word, n in Counter(words).items():
        for lang, vote in VOTES.get(word, ()):
            votes[lang] += vote * n  # type: ignore[assignment]
    # Only Spanish writes these; they decide short questions.
    votes["es"] += 2 * (text.count("¿") + text.count("¡")) + text.count("ñ")
    if sum(votes.values()) < 2 or sum(votes.values()) < 0.05 * len(words):
        return "unknown", 0.0
    (best, most), (_, second) = [*votes.most_common(2), ("", 0)][:2]
    if most == second:
        return "unknown", 0.0
    return best if best in languages else "other", most / sum(votes.values())


def language(
    documents: Iterable[Document], tally: Tally, *, languages: Sequence[str] = ("en", "es")
) -> Iterator[Document]:
    """Keep documents in ``languages``. A document that says its language must not look like another one (``language``).

    One that does not say is given what ``identify`` finds, and removed when that is unknown (``language_unknown``).
    """
    for document in documents:
        found, _ = identify(document.text, languages=languages)
        if document.lang:
            if document.lang not in languages or found not in ("unknown", document.lang):
                tally.drop(document, "language")
                continue
            yield document
        elif found == "unknown":
            tally.drop(document, "language_unknown")
        elif found == "other":
            tally.drop(document, "language")
        else:
            yield replace(document, lang=found)


# --- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quality:
    """Thresholds of ``quality``; 0 (or 1.0 for a largest share) turns a rule off."""

    min_words: int = 20
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbol_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2
    max_duplicate_lines: float = 0.3
    max_duplicate_line_characters: float = 0.2
    max_top_ngram: float = 0.2
    max_duplicate_ngram: float = 0.15
    max_code: float = 0.01


def quality_reason(text: str, q: Quality) -> str | None:
    """The first rule that the text breaks, or None.

    ========================= =========================================================================================
    short, long               words outside min_words..max_words (Gopher: 50..100 000)
    word_length               mean characters a word outside 3..10 (Gopher)
    symbols                   ``#`` and ellipses, per word, above 0.1 (Gopher)
    bullets, ellipses         share of lines that begin with a bullet / end with an ellipsis above 0.9 / 0.3 (Gopher)
    alphabetic                share of blank-separated words with a letter in them below 0.8 (Gopher)
    stop_words                fewer than 2 different function words (Gopher's English rule, here of all known languages)
    code                      share of ``{ } < > = _ |`` among characters above 0.01 (C4 drops any page with a ``{``)
    lorem_ipsum               "lorem ipsum" (C4)
    duplicate_lines           share of repeated lines above 0.3, or of characters in them above 0.2 (Gopher; FineWeb 0.1). Lines
                              of dialogue such as "Yes." repeat: only lines of 5 words and more count.
    top_ngram                 share of characters in the commonest 2-, 3- or 4-gram above 0.20 / 0.18 / 0.16 (Gopher)
    duplicate_ngrams          share of words in repeated 10-grams above 0.15 (Gopher's is of characters, 0.10..0.15)
    ========================= =========================================================================================
    """
    words = text.split()
    n = len(words)
    if n < q.min_words:
        return "short"
    if n > q.max_words:
        return "long"
    letters = sum(map(len, words))
    if q.min_word_length and not q.min_word_length <= letters / n <= q.max_word_length:
        return "word_length"
    if (text.count("#") + text.count("...") + text.count("…")) / n > q.max_symbol_ratio:
        return "symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) >= 3:
        if (
            sum(line[0] in "-*•·◦‣" and not line.startswith(("--", "-¡", "-¿")) for line in lines) / len(lines)
            > q.max_bullet_lines
        ):
            return "bullets"
        if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > q.max_ellipsis_lines:
            return "ellipses"
    if sum(any(map(str.isalpha, w)) for w in words) / n < q.min_alphabetic:
        return "alphabetic"
    lower = [w.strip(".,;:!?¿¡\"'()—-…").lower() for w in words]
    if q.min_stop_words and len({w for w in lower if w in VOTES}) < q.min_stop_words:
        return "stop_words"
    if sum(text.count(c) for c in "{}<>=_|") > q.max_code * len(text):
        return "code"
    if "lorem ipsum" in text.lower():
        return "lorem_ipsum"
    full = [line for line in lines if len(line.split()) >= 5]
    if len(full) >= 3:
        counts = Counter(full)
        extra = sum(k - 1 for k in counts.values())
        if extra / len(full) > q.max_duplicate_lines:
            return "duplicate_lines"
        if sum((k - 1) * len(line) for line, k in counts.items()) > q.max_duplicate_line_characters * len(text):
            return "duplicate_lines"
    if q.max_top_ngram < 1 and n >= 20:
        for size, share in ((2, q.max_top_ngram), (3, q.max_top_ngram - 0.02), (4, q.max_top_ngram - 0.04)):
            gram, times = Counter(zip(*(lower[i:] for i in range(size)), strict=False)).most_common(1)[0]
            if times > 1 and times * sum(map(len, gram)) / letters > share:
                return "top_ngram"
    if q.max_duplicate_ngram < 1 and n >= 40 and duplicate_share(lower, 10) > q.max_duplicate_ngram:
        return "duplicate_ngrams"
    return None


def duplicate_share(words: Sequence[str], size: int) -> float:
    """The share of words that stand in an n-gram seen earlier in the text (overlaps counted once, as in Gopher)."""
    seen: set[int] = set()
    covered, until = 0, 0
    for i in range(len(words) - size + 1):
        key = hash(tuple(words[i : i + size]))
        if key in seen:
            covered += i + size - max(until, i)
            until = i + size
        seen.add(key)
    return covered / max(len(words), 1)


def quality(documents: Iterable[Document], tally: Tally, *, thresholds: Quality = Quality()) -> Iterator[Document]:
    """Remove documents that break a rule of ``quality_reason``; the reason is the rule's name."""
    for document in documents:
        reason = quality_reason(document.text, thresholds)
        if reason:
            tally.drop(document, reason)
        else:
            yield document


# --- readability -----------------------------------------------------------------------------------------------------


def lix(text: str) -> float:
    """Bjornsson's readability index (LIX, 1968): mean words a sentence + percent of words longer than six letters.

    It needs no list of words and no syllables, so that one measure serves English and Spanish: below 30 is a children's book, 40 a
    novel, 50 a newspaper, 60 officialese. A line's end ends a sentence. 0 for a text without words.
    """
    words = WORD.findall(text)
    if not words:
        return 0.0
    sentences = max(1, sum(1 for part in SENTENCE_END.split(text) if part and WORD.search(part)))
    return len(words) / sentences + 100 * sum(len(w) > 6 for w in words) / len(words)


def readability(documents: Iterable[Document], tally: Tally, *, max_lix: float) -> Iterator[Document]:
    """Remove documents harder than ``max_lix`` (reason ``hard``): a small model learns grammar sooner from plain sentences."""
    for document in documents:
        if lix(document.text) > max_lix:
            tally.drop(document, "hard")
        else:
            yield document


_ARCHAIC = {
    "en": re.compile(r"\b(?:thee|thou|thy|thine|hath|doth|ye|'tis|'twas|wilt|shalt)\b", re.IGNORECASE),
    # the Academy dropped the accent of these four one-letter words in 1911
    "es": re.compile(r"(?<!\w)[áóéú](?!\w)", re.IGNORECASE),
}


def archaic(documents: Iterable[Document], tally: Tally, *, max_share: float) -> Iterator[Document]:
    """Remove texts in old spelling or grammar (``archaic``): English "thou hath", Spanish "á" and "ó" with an accent.

    ``max_share`` is the largest share of such words among all. A verse quoted in a chapter stays below 0.002.
    """
    for document in documents:
        pattern = _ARCHAIC.get(document.lang)
        if pattern and len(pattern.findall(document.text)) > max_share * len(document.text.split()):
            tally.drop(document, "archaic")
        else:
            yield document


def blocked(documents: Iterable[Document], tally: Tally, *, words: Sequence[str]) -> Iterator[Document]:
    """Remove documents with one of ``words`` (regular expressions for whole words, any case; ``blocked_word``).

    C4 drops every page with a word of a long public list; Dodge et al. 2021 (arXiv 2104.08758, section 5.3) show that such a list also
    removes what minorities write about themselves. Keep it short: words that a model must not learn to say.
    """
    pattern = re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
    for document in documents:
        if pattern.search(document.text):
            tally.drop(document, "blocked_word")
        else:
            yield document


# --- marks of pasted model output ------------------------------------------------------------------------------------

PASTED = re.compile(
    r"\bas an? (?:\w+ ){0,3}(?:ai|artificial intelligence|language model)\b|\bmy knowledge cutoff\b|\bknowledge cutoff of\b"
    r"|\bas of my last (?:update|training)\b|\bI am a large language model\b|\bchat ?gpt\b|\bopenai\b"
    r"|\bcomo (?:un )?modelo de lenguaje\b",
    re.IGNORECASE,
)


def pasted(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Remove chats whose answers carry the marks of another assistant's output ("as an AI language model", its cut-off date).

    People who were paid to write answers sometimes pasted them; such text has that assistant's terms and teaches a wrong name.
    """
    for document in documents:
        if PASTED.search(document.text):
            tally.drop(document, "pasted")
        else:
            yield document
