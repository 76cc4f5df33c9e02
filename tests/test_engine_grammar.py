"""Answers of a given shape: what comes out matches, whatever the model would like; what is hostile is one error, soon."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
import tiny
from engine_cases import engine, nothing_is_left

from criadero.engine.core import run
from criadero.engine.grammar import Grammars, written_out
from criadero.engine.request import Request, SamplingParams
from criadero.engine.speculate import PromptLookup
from criadero.errors import UserError

pytest.importorskip("llguidance")
WORDS = tiny.tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer"},
        "kind": {"enum": ["a", "bb"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
PROMPT = WORDS.encode("Give me one:", bos=True)


def answers(count: int = 6, one: Any = None, **fields: Any) -> list[tuple[str, Any]]:
    """Text and last output of ``count`` answers, greedy and drawn."""
    one = one or engine(pages=200)
    asked = [
        Request(PROMPT, SamplingParams(**{"max_tokens": 100, "temperature": float(n > 0), "seed": n, **fields}))
        for n in range(count)
    ]
    found = run(one, asked)
    nothing_is_left(one)
    return [("".join(o.text for o in outputs), outputs[-1]) for outputs in found]


# without it random weights write white space for ever
QUIET = {WORDS.encode(text)[0]: -50.0 for text in ("\n", "\t", "\r", " ")}


def test_json_of_a_schema() -> None:
    done = 0
    for text, last in answers(json_schema=SCHEMA, logit_bias=QUIET):
        if last.finish_reason == "stop":
            value = json.loads(text)
            assert value.keys() == {"name", "age", "kind"}
            assert isinstance(value["age"], int)
            assert value["kind"] in ("a", "bb")
            done += 1
    assert done >= 2


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"regex": r"(ab|cd){3}[0-9]{2}"}, r"(ab|cd){3}[0-9]{2}"),
        ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
        ({"grammar": 'root ::= ("a" | "b")+ "c"'}, "[ab]+c"),
        ({"json_schema": '{"enum": ["x", 5]}'}, '"x"|5'),
        ({"regex": "¿[áé]{2}🦙?"}, "¿[áé]{2}🦙?"),
    ],
    ids=str,
)
def test_other_shapes(fields: dict[str, Any], wanted: str) -> None:
    for text, last in answers(**fields):
        if last.finish_reason == "stop":
            assert re.fullmatch(wanted, text)
        else:
            assert last.finish_reason == "length"
    assert any(last.finish_reason == "stop" for _, last in answers(**fields))


def test_an_answer_may_end_only_where_its_grammar_does() -> None:
    end = WORDS.special["<|end|>"]
    for text, last in answers(regex="(ab)*c", logit_bias={end: 100}):
        assert re.fullmatch("(ab)*c", text)
        assert last.finish_reason == "stop"
    special = WORDS.encode_template("<|user|>", [])[0]
    for text, _ in answers(regex=".*<.user.>", logit_bias={special[0]: 100}, max_tokens=8):
        assert "<|user|>" not in text  # a control token is no text


def test_the_same_with_guesses() -> None:
    plain = answers(regex="((ab|cd)-){8}e", max_tokens=60)
    guessed = answers(one=engine(pages=200, speculator=PromptLookup()), regex="((ab|cd)-){8}e", max_tokens=60)
    assert [text for text, _ in plain] == [text for text, _ in guessed]
    assert sum(last.usage.accepted for _, last in guessed) > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json_schema": False}, "schema is false"),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
        ({"json_schema": "{"}, "json_schema is not JSON"),
        ({"json_schema": "[1]"}, "json_schema must be an object, not list"),
        ({"json_schema": {"type": "zzz"}}, "Invalid type: zzz"),
        ({"json_schema": {"$ref": "http://x/y"}}, "does not fetch"),
        ({"json_schema": {"$ref": "#"}}, "json_schema: it cannot be used"),
        (
            {"json_schema": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
            "written out it is 1,000,000 letters long",
        ),
        ({"json_schema": {"patternProperties": {"(a{999}){99}": {}}}}, "written out"),
        ({"json_schema": {"a": "x" * 70_000}}, "characters; at most 65,536"),
        ({"json_schema": '{"not":' * 100 + "true" + "}" * 100}, "nested 100 deep; at most 64"),
        ({"json_schema": {"x": {1, 2}}}, "cannot be written as JSON"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": r"[^\s\S]"}, "regex: it cannot be used"),
        ({"regex": "(a{1000}){1000}"}, "written out it is 1,000,000 letters long; at most 10,000"),
        ({"regex": "a" * 9000}, "characters; at most 8,192"),
        ({"grammar": "zzz"}, "grammar: it cannot be used"),
        ({"grammar": ""}, "grammar: it cannot be used"),
        ({"grammar": "start: a\na: b\nb: a"}, "grammar: it cannot be used"),
        ({"grammar": "start: /(a{500}){500}/"}, "written out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_impossible_or_hostile(fields: dict[str, Any], message: str) -> None:
    one = engine()
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as caught:
        one.add(Request(PROMPT, SamplingParams(**fields)))
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20  # a hang, not a timing
    nothing_is_left(one)


def test_a_grammar_that_grows_too_large_ends_its_own_request() -> None:
    one = engine(pages=200)
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": i} for i in range(800)}}
    ids = [
        one.add(Request(PROMPT, SamplingParams(json_schema=schema, max_tokens=90, temperature=1.0, seed=1))),
        one.add(Request(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True))),
    ]
    reasons = {}
    while one.busy:
        reasons |= {output.id: output.finish_reason for output in one.step() if output.done}
    assert reasons[ids[1]] == "length"
    assert reasons[ids[0]] in ("error", "length", "stop")
    nothing_is_left(one)


def test_repetitions_written_out() -> None:
    for pattern, size in (
        ("abc", 3), ("a{5}", 5), ("(ab){2,3}c", 7), ("((a{3}){4}){5}", 60), (r"\({3}[a\]({]{2}", 5), ("a{,3}", 5),
        ("a{2,}", 2), ("a*b+c?|d", 4), (")a{3}", 4), ("(a{2}", 2), ("[", 1), ("", 0),
    ):  # fmt: skip
        assert written_out(pattern) == size, pattern


def test_a_vocabulary_without_an_end() -> None:
    with pytest.raises(UserError, match="no token that ends an answer"):
        Grammars(WORDS, 300, [])
