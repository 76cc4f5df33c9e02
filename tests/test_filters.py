"""Filters against hand-made cases, the papers' rules, and the public bilingual test sets."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from criadero.data import filters
from criadero.data.documents import Document
from criadero.data.filters import Quality, Tally, identify, lix, normalise_text, quality_reason

PROSE = (
    "The old man walked down to the river every morning. He liked to watch the boats go by, and he knew most of the people "
    "who worked on them. When it rained he stayed at home and read the newspaper by the fire. His daughter came to see him on "
    "Sundays, and they would have lunch together in the small kitchen."
)


def document(text: str, lang: str = "en") -> Document:
    return Document("1", text, lang, "s", "CC0-1.0")


# --- normalisation ---


def test_normalise_names_each_change() -> None:
    text, changes = normalise_text("a\r\nb\u200b\u00a0c e\u0301 \u201cq\u201d  \n\n\n\nd\ufeff", plain_quotes=True)
    assert text == 'a\nb c é "q"\n\nd'
    assert changes == ["newlines", "control", "unicode", "spaces", "quotes", "blanks"]
    assert normalise_text(text) == (text, [])
    assert unicodedata.is_normalized("NFC", text)


def test_normalise_counts_by_document_and_drops_what_is_broken() -> None:
    tally = Tally()
    kept = list(
        filters.normalise([document("fine"), document("a\r\nb"), document("\u200b"), document("x\ufffdy")], tally)
    )
    assert [d.text for d in kept] == ["fine", "a\nb"]
    assert tally.by_reason("s") == {"broken_encoding": 1, "empty": 1}
    assert tally.changes("s")["newlines"] == 1


def test_normalise_reaches_the_turns_of_a_chat() -> None:
    chat = Document("1", "a\r\nb\nc", "en", "s", "x", {"messages": [{"role": "user", "content": "a\r\nb"}]})
    (kept,) = filters.normalise([chat], Tally())
    assert kept.meta["messages"][0]["content"] == "a\nb"


# --- language ---


def test_identify_on_public_bilingual_sets(shared: Path) -> None:
    """At least 99.5 % of XQuAD's paragraphs (100 words or so) and 99 % of MGSM's questions, none taken for the other language."""
    for lang in ("en", "es"):
        paragraphs = _xquad(shared, lang)
        assert len(paragraphs) > 100
        found = [identify(text)[0] for text in paragraphs]
        assert found.count(lang) / len(found) >= 0.995
        questions = _mgsm(shared, lang)
        assert len(questions) == 250
        found = [identify(text)[0] for text in questions]
        assert found.count(lang) / len(found) >= 0.99
        assert {"en": "es", "es": "en"}[lang] not in found


def test_identify_on_public_short_questions(shared: Path) -> None:
    """XQuAD's questions, about ten words: at least 97 % right, and fewer than 1 % taken for the other language."""
    for lang, other in (("en", "es"), ("es", "en")):
        found = [identify(text)[0] for text in _xquad(shared, lang, questions=True)]
        assert found.count(lang) / len(found) >= 0.97
        assert found.count(other) / len(found) < 0.01


def _xquad(shared: Path, lang: str, questions: bool = False) -> list[str]:
    lines = (shared / "eval/xquad_en_es/xquad_en_es.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["_file"] == f"xquad.{lang}.json"]
    return [qa["question"] for row in rows for qa in row["qas"]] if questions else [row["context"] for row in rows]


def _mgsm(shared: Path, lang: str) -> list[str]:
    lines = (shared / "eval/mgsm_en_es/mgsm_en_es.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["question"] for row in map(json.loads, lines) if row["lang"] == lang]


OTHERS = {
    "fr": "Le vieil homme descendait tous les matins vers la rivière. Il aimait regarder les bateaux qui passaient et il connaissait "
    "presque tous ceux qui y travaillaient, mais quand il pleuvait il restait chez lui.",
    "pt": "O velho descia todas as manhãs até o rio. Ele gostava de ver os barcos passarem e conhecia quase todas as pessoas que "
    "trabalhavam neles, mas quando chovia ficava em casa e lia o jornal.",
    "it": "Il vecchio scendeva ogni mattina al fiume. Gli piaceva guardare le barche che passavano e conosceva quasi tutti quelli che "
    "ci lavoravano, ma quando pioveva restava a casa e leggeva il giornale.",
    "de": "Der alte Mann ging jeden Morgen zum Fluss hinunter. Er sah gern den Booten zu und kannte die meisten Leute, die auf ihnen "
    "arbeiteten, aber wenn es regnete, blieb er zu Hause und las die Zeitung.",
    "ru": "Старик каждое утро спускался к реке и смотрел на лодки.",
    "zh": "老人每天早上都到河边去看船。",
}


@pytest.mark.parametrize("lang", OTHERS)
def test_identify_other_languages(lang: str) -> None:
    assert identify(OTHERS[lang])[0] == "other"


def test_language_step_trusts_short_texts_and_fills_in_the_missing() -> None:
    tally = Tally()
    kept = filters.language(
        [
            document("Hola", "es"), document(PROSE, "es"), document(PROSE, ""), document("xyz", ""), document(OTHERS["fr"], ""),
            document("Bonjour", "fr"),
        ],
        tally,
    )  # fmt: skip
    assert [(d.text[:4], d.lang) for d in kept] == [("Hola", "es"), ("The ", "en")]
    assert tally.by_reason("s") == {"language": 3, "language_unknown": 1}


# --- quality ---

LINES = [
    f"This is line number {word} of the list, and it is long enough."
    for word in ["one", "two", "three", "four", "five", "six", "seven"]
]
BROKEN = {
    "short": "Too short.",
    "word_length": "a b c d e f g h i j k l m n o p q r s t u v w x y z I a",
    "symbols": PROSE + " #" * 20,
    "bullets": "\n".join("- " + line for line in LINES),
    "ellipses": "\n".join(line.rstrip(".") + "..." for line in LINES[:2]) + "\n" + "\n".join([PROSE] * 1),
    "alphabetic": PROSE + " 1234" * 30,
    "stop_words": " ".join(f"pal{chr(97 + i)}xyz" for i in range(26)),
    "code": PROSE + " value == {result_of_call} | {other_value}" * 8,
    "lorem_ipsum": PROSE + " Lorem ipsum dolor sit amet.",
    "duplicate_lines": "\n".join([PROSE, *[LINES[0]] * 4, *LINES]),
    "top_ngram": PROSE[:120] + " and then" * 30,
    "duplicate_ngrams": PROSE + " " + PROSE,
}


def test_good_prose_passes() -> None:
    assert quality_reason(PROSE, Quality()) is None


@pytest.mark.parametrize("rule", BROKEN)
def test_each_quality_rule(rule: str) -> None:
    assert quality_reason(BROKEN[rule], Quality()) == rule


def test_quality_counts_and_keeps_what_it_removed() -> None:
    kept_away = []
    tally = Tally(keep=lambda d, why: kept_away.append((d.text, why)))
    assert len(list(filters.quality([document(PROSE), document("Too short.")], tally))) == 1
    assert kept_away == [("Too short.", "short")]


def test_duplicate_share_by_brute_force() -> None:
    words = [f"w{i}" for i in range(10)]
    words = words + words[2:7] + ["x"] + words[:6]
    size = 3
    covered = [False] * len(words)
    for i in range(len(words) - size + 1):
        if any(words[j : j + size] == words[i : i + size] for j in range(i)):
            covered[i : i + size] = [True] * size
    assert filters.duplicate_share(words, size) == pytest.approx(sum(covered) / len(words))


def test_public_prose_passes_and_tokenised_reviews_do_not_look_plain(shared: Path) -> None:
    from criadero.data.documents import read_documents

    stories = list(read_documents(shared / "pretrain/african_storybook.jsonl.zst", source="s", licence="CC-BY"))
    tally = Tally()
    kept = list(filters.quality(filters.language(stories, tally), tally))
    assert len(kept) > 0.85 * len(stories)


# --- readability, old spelling, words ---


def test_lix_by_hand() -> None:
    # 10 words, 2 sentences, 2 words of more than six letters: 5 + 20
    assert lix("The cat sat there quietly. It was watching me now.") == pytest.approx(25.0)
    assert lix("¡Hola! ¿Qué tal?") == pytest.approx(3 / 2)
    assert lix("... 12") == 0.0


def test_lix_orders_the_reading_levels_of_onestopenglish(shared: Path) -> None:
    """The corpus gives each article in three levels: the easy one must be the easier by LIX in nearly every pair."""
    from criadero.data.documents import read_rows

    levels: dict[str, dict[str, float]] = {}
    for _, row in read_rows(shared / "pretrain/small_clean_en.jsonl.zst"):
        if row.get("level") in ("Ele-Txt", "Adv-Txt"):
            title = row["id"].rsplit("/", 1)[1].rsplit("-", 1)[0]
            levels.setdefault(title, {})[row["level"]] = lix(row["text"])
    pairs = [pair for pair in levels.values() if len(pair) == 2]
    assert len(pairs) > 100
    assert sum(pair["Ele-Txt"] < pair["Adv-Txt"] for pair in pairs) / len(pairs) > 0.9


def test_archaic_and_blocked() -> None:
    tally = Tally()
    texts = [
        document(PROSE), document("Thou art late, and ye shall wait. " + PROSE[:40]), document("Fué á la casa ó á la calle.", "es"),
        document("Fue a la casa o a la calle, y allí esperó.", "es"),
    ]  # fmt: skip
    kept = list(filters.archaic(texts, tally, max_share=0.002))
    assert kept == [texts[0], texts[3]]
    assert tally.by_reason("s") == {"archaic": 2}
    words = [document("He was a Frob."), document("The frobnicator works.")]
    assert list(filters.blocked(words, tally, words=["frobs?"])) == words[1:]


def test_pasted_answers_of_other_assistants() -> None:
    tally = Tally()
    texts = [
        "As an AI language model, I cannot.",
        "My knowledge cutoff is 2021.",
        "The artist used a language of model trains.",
    ]
    assert [d.text for d in filters.pasted(map(document, texts), tally)] == texts[2:]
