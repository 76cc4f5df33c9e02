"""Answers of a given shape: JSON schema, regular expressions, Lark and GBNF grammars, by ``llguidance`` (an extra: ``grammar``).

At each token llguidance says which tokens can still lead to an answer of that shape; the sampler forbids the others. What a
client may send is limited before and inside llguidance (bytes, depth, states, steps), so that a hostile grammar costs one
error and not a server.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from criadero.engine.sampler import BadLogits
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer

LARGEST = {"json_schema": 65_536, "regex": 8_192, "grammar": 32_768}  # characters
DEEPEST = 64  # levels of a schema, brackets of a regex or a grammar
WIDEST = 10_000  # letters of a pattern with its {m,n} written out: llguidance's own limits let much slower ones through
SLOWEST = 2.0  # seconds for the tokens that may come next
KEPT = 32  # compiled grammars
_TIMES = re.compile(r"\{(\d{1,9})(?:,(\d{0,9}))?\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_LIMITS: dict[str, Any] = {
    "max_items_in_row": 2_000, "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000,
    "max_lexer_states": 50_000, "max_grammar_size": 100_000, "verbose_errors": False, "precompute_large_lexemes": False,
}  # fmt: skip


class Grammars:
    """Compiles what requests ask for, for one vocabulary; the latest `KEPT` are kept compiled."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise UserError(
                "json_schema, regex and grammar need the package llguidance: pip install 'criadero[grammar]'"
            ) from None
        self._library = llguidance
        ends = sorted(ends)
        if not ends:
            raise UserError(
                "this model has no token that ends an answer, so an answer could not end where its grammar does"
            )
        self._words = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Words(tokenizer, vocab, ends)), n_vocab=vocab, eos_token=ends
        )
        self._vocab = vocab
        self._limits = llguidance.LLParserLimits(**_LIMITS)
        self._compiled: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, kind: str, source: str) -> GrammarMatcher:
        """A fresh state of the grammar ``source``. UserError when it is too large, is none, or nothing could match it."""
        key = (kind, source)
        with self._lock:
            compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compile(kind, source)  # a slow one holds up nobody else
        with self._lock:
            self._compiled[key] = compiled
            self._compiled.move_to_end(key)
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return GrammarMatcher(compiled.deep_copy(), self._vocab)

    def _compile(self, kind: str, source: str) -> Any:
        check_size(kind, source)
        library = self._library
        try:
            if kind == "json_schema":
                grammar = library.LLMatcher.grammar_from_json_schema(source)
            elif kind == "regex":
                grammar = library.LLMatcher.grammar_from_regex(source)
            else:
                grammar = library.grammar_from("grammar", source)
            start = time.monotonic()
            matcher = library.LLMatcher(self._words, grammar, log_level=0, limits=self._limits)
            # the first mask is computed here: some grammars break a limit only then
            problem = matcher.get_error() or (matcher.compute_bitmask() and matcher.get_error())
            if not problem and time.monotonic() - start > SLOWEST:
                problem = f"it takes more than {SLOWEST:g} seconds to say what may come first; make it simpler"
        except (ValueError, RecursionError) as error:
            raise UserError(f"{kind}: it cannot be used: {_line(error)}") from None
        if problem:
            raise UserError(f"{kind}: it cannot be used: {_line(problem)}")
        return matcher


class GrammarMatcher:
    """Where in its grammar one answer is."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    @property
    def complete(self) -> bool:
        """Whether nothing may follow but an end."""
        return bool(self._matcher.is_stopped())

    def forbid(self, logits: np.ndarray) -> None:
        """-inf for every token that cannot come next; the ends may where the grammar is satisfied."""
        start = time.monotonic()
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise BadLogits(f"the grammar cannot go on: {_line(self._matcher.get_error())}")
        if time.monotonic() - start > SLOWEST:
            raise BadLogits(
                f"the grammar takes more than {SLOWEST:g} seconds to say what may come next; make it simpler"
            )
        allowed = np.unpackbits(bits, count=self._vocab, bitorder="little")
        np.copyto(logits, -np.inf, where=allowed == 0)

    def accept(self, token: int) -> None:
        """``token`` came next."""
        if not self._matcher.consume_token(token):
            raise BadLogits(f"the grammar does not take token {token}: {_line(self._matcher.get_error())}")


class _Words:
    """The vocabulary as llguidance reads it: the bytes of every id; those of special tokens are no text."""

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: list[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
        self.tokens = [_bytes_of(tokenizer, id) for id in range(vocab)]
        self.special_token_ids = sorted({*tokenizer.special.values(), *ends})

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    try:
        return tokenizer.token_bytes(id)
    except UserError:  # a number that no token has: it can match nothing
        return b""


def check_size(kind: str, source: str) -> None:
    """UserError when ``source`` is larger or deeper than a client may send, before anything looks at its meaning."""
    if len(source) > LARGEST[kind]:
        raise UserError(f"{kind}: it has {len(source):,} characters; at most {LARGEST[kind]:,} are taken")
    depth = deepest = 0
    for letter in source:
        if letter in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in ")]}":
            depth -= 1
    if deepest > DEEPEST:
        raise UserError(f"{kind}: it is nested {deepest} deep; at most {DEEPEST} levels are taken")
    patterns = [source]
    if kind == "json_schema":
        try:
            schema = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise UserError(f"json_schema is not JSON: {_line(error)}") from None
        if not isinstance(schema, dict | bool):
            raise UserError(f"json_schema must be an object, not {type(schema).__name__}")
        patterns = list(_patterns(schema))
    for pattern in patterns:
        if (size := written_out(pattern)) > WIDEST:
            raise UserError(
                f"{kind}: with its repetitions written out it is {size:,} letters long; at most {WIDEST:,} are taken"
            )


def _patterns(schema: Any) -> Iterator[str]:
    """Every regular expression in a schema."""
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties" and isinstance(value, dict):
                yield from value
            yield from _patterns(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from _patterns(value)


def written_out(pattern: str) -> int:
    """About how many letters a regular expression (or a grammar) has when ``x{m,n}`` is written out as n times x."""
    sizes = [0]  # of the open groups, the innermost last
    last = at = 0  # size of what a repetition would repeat
    while at < len(pattern):
        letter = pattern[at]
        if letter == "(":
            sizes.append(0)
        elif letter == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif letter == "{" and (times := _TIMES.match(pattern, at)):
            count = max(int(times[1]), int(times[2] or 0), 1)
            sizes[-1] += last * (count - 1)
            last *= count
            at = times.end()
            continue
        elif letter not in "*+?|":
            sizes[-1] += 1
            last = 1
            if letter == "[" and (whole := _CLASS.match(pattern, at)):
                at = whole.end()
                continue
            at += letter == "\\"  # what follows belongs to it
        at += 1
    return sum(sizes)


def _line(problem: object) -> str:
    """The reason in one line of 300 characters at most."""
    return " ".join(str(problem).split())[:300] or type(problem).__name__
