"""Runs chat templates: Jinja in the immutable sandbox, with the helpers that Hugging Face's templates expect.

A template is a program that came with a model, so it runs under limits. In-process checks cannot hold one that computes
``'x' * 10**10`` or loops inside a filter, so templates that are not built in run in a helper process: this very file,
started as a script, which imports nothing but the standard library and Jinja. It is asked through pipes, one JSON
document a line, stopped after `SECONDS`, and limited in memory (`MEMORY`, where the system can) and output.
One helper serves all templates of a process; it starts when first needed and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

SECONDS = 5.0
MEMORY = 1 << 30
OUTPUT = 16_000_000  # characters
GENERATION = ("\U000f5ffa", "\U000f5ffb")  # put around what stands in {% generation %}; private-use characters


class TemplateProblem(Exception):
    """A template that cannot be read, refuses the chat, or does what it must not; one line."""


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:  # at once, not only when the value is used
        raise SecurityError(f"it reaches for the attribute {attribute!r}, which templates may not")


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: what the assistant says (transformers' extension)."""

    tags = {"generation"}  # noqa: RUF012  Jinja's name for it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = ([nodes.Output([nodes.TemplateData(mark)])] for mark in GENERATION)
        return nodes.Scope([*start, *body, *end]).set_lineno(line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateProblem(f"it refuses this chat: {message}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def run_here(source: str, variables: Mapping[str, Any]) -> str:
    """Render in this process: for built-in templates, and inside the helper. Only the output is limited."""
    pieces, size = [], 0
    try:
        for piece in _compile(source).generate(**variables):
            pieces.append(piece)
            size += len(piece)
            if size > OUTPUT:
                raise TemplateProblem(f"it writes more than {OUTPUT:,} characters")
    except TemplateProblem:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateProblem(f"line {error.lineno} is not Jinja: {error.message}") from None
    except SecurityError as error:
        raise TemplateProblem(str(error)) from None
    except MemoryError:
        raise TemplateProblem(f"it takes more than {MEMORY >> 20} MiB of memory") from None
    except Exception as error:  # a template can raise anything
        raise TemplateProblem(f"it fails: {type(error).__name__}: {error}") from None
    return "".join(pieces)


def run_apart(source: str, variables: Mapping[str, Any]) -> str:
    """Render in the helper process, under all limits."""
    global _helper
    with _lock:
        if _helper is None or _helper_owner != os.getpid() or _helper.poll() is not None:
            _start()
        assert _helper is not None
        try:
            answer = _ask(_helper, json.dumps({"source": source, "variables": variables}).encode() + b"\n")
        except BaseException:
            _stop()
            raise
    if "problem" in answer:
        raise TemplateProblem(answer["problem"])
    return answer["text"]


_helper: subprocess.Popen[bytes] | None = None
_helper_owner = -1
_lock = threading.Lock()


def _start() -> None:
    global _helper, _helper_owner
    _helper = subprocess.Popen(
        [sys.executable, "-I", "-B", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    _helper_owner = os.getpid()
    try:
        _ask(_helper, b'{"source": "", "variables": {}}\n', seconds=60.0)  # the start is not the template's fault
    except TemplateProblem:
        _stop()
        raise TemplateProblem("the helper process that runs templates does not start") from None


def _stop() -> None:
    global _helper
    if _helper is not None and _helper_owner == os.getpid():
        _helper.kill()
        _helper.wait()
        for pipe in (_helper.stdin, _helper.stdout):
            if pipe is not None:
                pipe.close()
    _helper = None


atexit.register(_stop)


def _ask(helper: subprocess.Popen[bytes], request: bytes, seconds: float = SECONDS) -> dict[str, str]:
    assert helper.stdin is not None
    assert helper.stdout is not None
    try:
        helper.stdin.write(request)
        helper.stdin.flush()
    except OSError:
        raise TemplateProblem("it ended the process that ran it") from None
    answer, deadline = bytearray(), time.monotonic() + seconds
    while not answer.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([helper.stdout], [], [], left)[0]:
            raise TemplateProblem(f"it runs for more than {seconds:g} seconds")
        piece = os.read(helper.stdout.fileno(), 1 << 20)
        if not piece:
            raise TemplateProblem(f"it ended the process that ran it, perhaps by taking more than {MEMORY >> 20} MiB")
        answer += piece
    return json.loads(answer)


def _serve() -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            answer = {"text": run_here(request["source"], request["variables"])}
        except TemplateProblem as problem:
            answer = {"problem": " ".join(str(problem).split())[:300]}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
