"""Whether it fits: arithmetic against the real thing, refusals with the numbers, and what `criadero show` says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from test_engine_adapters import make

from criadero import summary
from criadero.engine import fit
from criadero.engine.llm import LLM
from criadero.engine.runner import make_runner
from criadero.engine.torch_runner import TorchRunner
from criadero.errors import UserError


@pytest.mark.parametrize("tied", [True, False])
def test_the_arithmetic_is_the_models(tied: bool, tmp_path: Path) -> None:
    config = tiny.config(tie_word_embeddings=tied)
    assert fit.parameters(config) == config.parameters()
    runner = TorchRunner(tiny.model(tie_word_embeddings=tied), pages=3, page=16)
    real = runner._keys.nbytes + runner._values.nbytes
    assert fit.token_bytes(config) * (3 + 1) * 16 == real  # one page more, see there
    folder = tiny.base(tmp_path / "base", tie_word_embeddings=tied)
    found = fit.shape_of(folder)
    assert found is not None
    assert fit.parameters(found) == config.parameters()
    assert fit.stored_bytes(folder) == pytest.approx(4 * config.parameters(), rel=0.2)
    wider = fit.read_bytes(config, "float32", 100) - fit.read_bytes(config, "float32", 0)
    assert wider == 100 * fit.token_bytes(config)


def test_how_large_the_cache_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.config()  # a context of 128: four pages of 32
    given: dict[str, Any] = {
        "page": 32,
        "pages": None,
        "memory": None,
        "sequences": 16,
        "kv": "float32",
        "device": "cpu",
    }
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 10**12)
    assert fit.cache_pages(config, **given) == 64
    assert fit.cache_pages(config, **given | {"pages": 5}) == 5
    size = 32 * fit.token_bytes(config)
    assert fit.cache_pages(config, **given | {"memory": 7 * size + 1}) == 7
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 40 * size)
    assert fit.cache_pages(config, **given) == 10  # a quarter
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": size)
    assert fit.cache_pages(config, **given) == 4  # one whole context all the same, and then it is refused
    for wrong in ({"pages": 0}, {"pages": 10**9}, {"page": 0}, {"memory": 5}):
        with pytest.raises(UserError):
            fit.cache_pages(config, **given | wrong)


def test_what_cannot_fit_is_refused_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.base(tmp_path / "base")
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 200 * 2**20)
    monkeypatch.setattr(TorchRunner, "load", lambda *args, **options: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"does not fit: its .* parameters take .* but 210 MB is free: use a smaller"):
        LLM(folder, runner="torch")
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 400 * 2**20)
    with pytest.raises(UserError, match=r"give the cache less memory \(kv_memory; one context of 128 tokens takes"):
        make_runner(folder, runner="torch", pages=10**6)


def test_show_says_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.base(tmp_path / "base")
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 10**9)
    text = summary.describe(folder, context=100)
    assert "memory    315 MB with 100 tokens of context" in text
    assert "1000 MB is free" in text or "1.0 GB is free" in text
    assert "speed" not in text
    monkeypatch.setattr(fit, "bandwidth", lambda seconds=1.0: 4e10)
    needs = summary.needs_of(folder, speed=True)
    assert needs is not None
    assert needs["tokens_per_second"] == pytest.approx(4e10 / needs["read_bytes"])
    assert "tokens/s, one answer at a time" in summary.describe(folder, speed=True)
    adapter = make(tmp_path / "adapter", folder, 1)
    whole = summary.needs_of(adapter)
    assert whole is not None
    assert whole["weights_bytes"] == fit.stored_bytes(folder) + (adapter / "adapter_model.safetensors").stat().st_size
    monkeypatch.setattr(fit, "free_memory", lambda device="cpu": 10**6)
    assert "it does not fit" in summary.describe(folder)
    for context in (0, 129):
        with pytest.raises(UserError, match="the model's context is 1 to 128 tokens"):
            summary.describe(folder, context=context)
    (tmp_path / "notes").mkdir()
    assert summary.needs_of(tmp_path / "notes") is None


def test_the_probes_measure_something(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < fit.bandwidth(0.01) < 1e13
    monkeypatch.setenv("CRIADERO_KERNELS", "reference")  # numpy's
    assert 1e8 < fit.bandwidth(0.01) < 1e13
