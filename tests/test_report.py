"""The page that compares a tuned model with its base: whole, in two languages, escaped, and without scripts."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny
import torch

from criadero.train import report
from criadero.train.answers import Asked, answers
from criadero.train.report import Comparison, page

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=y>"
LINES = [
    {"step": n, "loss": 4 / n, "tokens": 100 * n, "seconds": 2.0 * n}
    | ({"held_out": {"chats": {"loss": 5 / n}}, "answers": [f"on the way {n}"]} if n % 5 == 0 else {})
    for n in range(1, 21)
]


def comparison(**changes: Any) -> Comparison:
    values: dict[str, Any] = {
        "name": "shop", "base": "cria", "method": "lora", "trained": 627_200, "total": 10_152_640, "before": 4.5, "after": 0.25,
        "supervised": 100, "lines": LINES, "best_step": 20, "rule": ("at the last step", "en el último paso"),
        "asked": [Asked((1,), "¿Abren?", "Sí.", "es"), Asked((2,), "Open?", "Yes.", "en")],
        "answers_before": ["no", ""], "answers_after": ["Sí.", "Yes."],
        "counts": {"chats": 1200, "held_out": 2, "tokens": 5000, "supervised": 3000, "dropped": 0, "longest": 30, "duplicates": 0,
                   "contaminated": 0},
        "languages": {"es": 2, "en": 1}, "licence": "CC0-1.0", "example": [("<|user|>Hola", False), ("Sí.", True)],
        "settings": {"lora_rank": 8, "merged": True}, "derived": {"lr": 0.004},
    }  # fmt: skip
    return Comparison(**(values | changes))


class Balanced(HTMLParser):
    """Elements open and close in order; their names and attributes are collected."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_the_page_says() -> None:
    text = page(comparison())
    read = Balanced(text)
    for words in (
        "4.500",
        "0.250",
        "627,200",
        "627.200",
        "before",
        "antes",
        "¿Abren?",
        "on the way 15",
        "CC0-1.0",
        "1,200",
        "lora_rank",
    ):
        assert words in read.text, words
    assert "dropped for their length" not in read.text  # nothing was
    assert "<mark>Sí.</mark>" in text
    # every English text has a Spanish one beside it
    assert text.count('class="en" lang="en"') == text.count('class="es" lang="es"') > 20


def test_what_was_measured_on_the_way_and_that_it_ended_early() -> None:
    lines = [line | ({"task": {"accuracy": line["step"] / 20}} if "held_out" in line else {}) for line in LINES]
    said = comparison(lines=lines, task=[0.0, 1.0], questions=4, planned=50, best_step=15)
    read = Balanced(page(said))
    for words in ("measured on the way", "medido por el camino", "ended early, of", "acabó antes, de", "75 %", "0.333"):
        assert words in read.text, words
    whole = Balanced(page(comparison(planned=20))).text
    assert "ended early" not in whole
    assert "75 %" not in whole
    assert "measured on the way" not in page(comparison(lines=LINES[:1]))


def test_it_asks_for_nothing_and_runs_nothing() -> None:
    text = page(comparison())
    read = Balanced(text)
    assert "script" not in read.tags
    assert not {"link", "img", "iframe", "object"} & set(read.tags)
    assert not [name for name, _ in read.attributes if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_all_that_comes_from_data_is_escaped() -> None:
    asked = [Asked((1,), EVIL, EVIL, EVIL)]
    lines = [LINES[0], LINES[4] | {"answers": [EVIL]}]
    text = page(
        comparison(
            name=EVIL, base=EVIL, asked=asked, answers_before=[EVIL], answers_after=[EVIL], lines=lines, licence=EVIL,
            languages={EVIL: 1}, example=[(EVIL, True)], settings={EVIL: EVIL}, derived={"x": EVIL}, rule=(EVIL, EVIL),
        )
    )  # fmt: skip
    read = Balanced(text)
    assert "script" not in read.tags
    assert "img" not in read.tags
    assert read.text.count("<script>alert(1)</script>") > 8


@pytest.mark.parametrize(
    "changes",
    [
        {"lines": []},
        {"lines": LINES[:1], "best_step": 1},
        {"asked": [], "before": math.nan, "after": math.nan, "best_step": 0},
        {"lines": [{"step": 1, "loss": math.nan, "tokens": 1, "seconds": 0.1}], "before": 900.0, "after": 901.0},
        {"lines": [{**line, "loss": 1e-7} for line in LINES], "before": 1e-7, "after": 0.0},
    ],
)
def test_odd_runs_make_a_page(changes: dict[str, Any]) -> None:
    read = Balanced(page(comparison(**changes)))
    assert "nan" not in read.text


def test_the_curve_is_a_picture_of_the_lines() -> None:
    drawn = report.chart(comparison())
    root = ElementTree.fromstring(drawn[: drawn.index("</svg>") + 6])
    circles = list(root.iter("circle"))
    assert len(circles) == 5  # before, and four on the way
    assert [one.get("class") for one in circles][-1] == "held best"
    heights = [float(one.get("cy") or 0) for one in circles]
    assert heights == sorted(heights)  # the losses fall, and down is larger
    numbers = [float(n) for one in root.iter("polyline") for n in re.findall(r"[\d.]+", one.get("points") or "")]
    assert all(0 <= n <= report.WIDTH for n in numbers)


def test_the_language_is_that_of_the_questions() -> None:
    assert '<html lang="en">' in page(comparison())
    spanish = [dataclasses.replace(one, lang="es") for one in comparison().asked]
    assert '<html lang="es">' in page(comparison(asked=spanish))


def test_show_prints_its_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from criadero import cli

    (tmp_path / "config.json").write_text("{}")
    assert cli._run(["show", str(tmp_path), "--report"]) == 2
    assert "there is no report.html in it" in capsys.readouterr().err
    report.write_report(tmp_path, comparison())
    assert cli._run(["show", str(tmp_path), "--report"]) == 0
    assert capsys.readouterr().out.strip() == str((tmp_path / "report.html").resolve())


def test_an_answer_may_hold_rows_beyond_the_vocabulary() -> None:
    words = tiny.tokenizer().vocab_size
    model = tiny.model(vocab_size=2 * words, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[:words].zero_()  # the largest logit is one of the others'
    assert answers(model, [Asked((1, 2, 3), "?", "", "en")], tiny.tokenizer(), (), longest=4) == [""]
