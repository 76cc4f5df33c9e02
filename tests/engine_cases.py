"""What the engine's tests share: runners over a tiny random model, and random requests."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero.engine.core import Engine
from criadero.engine.request import Output, Request, SamplingParams
from criadero.engine.runner import Runner, native_available
from criadero.engine.torch_runner import TorchRunner
from criadero.model import Llama

PAGE = 16
RUNNERS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native_available(), reason="the compiled kernels are not built")
    ),
]


@functools.cache
def model() -> Llama:
    """In float64: sums in another order must not turn one token into another."""
    return tiny.model(dtype=torch.float64)


@functools.cache
def folder() -> Path:
    """The same weights as a folder, in float32."""
    return tiny.base(Path(tempfile.mkdtemp(prefix="criadero-engine-")) / "base")


def runner(kind: str, pages: int) -> Runner:
    if kind == "torch":
        return TorchRunner(model(), pages=pages, page=PAGE)
    from criadero.engine.native import NativeRunner

    return NativeRunner(folder(), pages=pages, page=PAGE, threads=1, weights="float32", kv="float32")


def engine(kind: str = "torch", pages: int = 64, **options: Any) -> Engine:
    return Engine(runner(kind, pages), tiny.tokenizer(), end_ids=model().config.eos_ids, **options)


def requests(count: int, seed: int = 0, *, longest: int = 60, answer: int = 40) -> list[Request]:
    """Prompts of all lengths, many with a prefix in common; greedy, and drawn in every way."""
    rng = random.Random(seed)
    made: list[Request] = []
    for n in range(count):
        prompt = [rng.randrange(300) for _ in range(rng.randrange(1, longest))]
        if made and n % 3 == 0:
            before = list(rng.choice(made).prompt)
            prompt = (before[: rng.randrange(1, len(before) + 1)] + prompt)[:longest]
        fields: dict[str, Any] = {}
        if n % 2:
            fields = {
                "temperature": rng.choice([0.5, 1.0, 2.0]), "top_p": rng.choice([1.0, 0.9]), "top_k": rng.choice([0, 20]),
                "seed": n, "repetition_penalty": rng.choice([1.0, 1.2]), "frequency_penalty": rng.choice([0.0, 0.3]),
            }  # fmt: skip
        if n % 7 == 0:
            fields["n"] = 3
        made.append(Request(prompt, SamplingParams(max_tokens=rng.randrange(1, answer), **fields), tenant=f"t{n % 2}"))
    return made


def ids(outputs: list[Output], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.ids]


def samples(request: Request, outputs: list[Output]) -> list[list[int]]:
    return [ids(outputs, index) for index in range(request.params.n)]


def nothing_is_left(one: Engine) -> None:
    """Every page is free or kept, nobody waits, every request has ended."""
    one.pages.check()
    assert one.pages.used() == 0
    assert not one.busy
    assert not one.scheduler.running
    assert not one.scheduler.waiting
