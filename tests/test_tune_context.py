"""A longer context by interpolated positions: what is made has it, for us and for transformers, and learns to use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero.artifact import open_artifact, verify
from criadero.checkpoints import load_config, load_model
from criadero.config import ModelConfig, stretched
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.run import make

QUICK: dict[str, Any] = {"dtype": "float32", "epochs": 3.0, "batch_tokens": 512, "micro_tokens": 512, "lr": 5e-3}
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, of context 128, and texts of some 500 tokens each."""
    folder = tmp_path_factory.mktemp("context")
    tiny.base(folder / "base")
    (folder / "texts").mkdir()
    for n in range(12):
        (folder / "texts" / f"{n}.txt").write_text(f"Number {n}. " + " ".join(tiny.LINES * 6))
    return folder


def settings(place: Path, **more: Any) -> dict[str, Any]:
    texts = {"data": str(place / "texts"), "train_on": "text", "held_out_share": 0.2}
    return QUICK | {"base": str(place / "base"), "method": "full", "context": 256} | texts | more


@pytest.mark.parametrize("how", [{"method": "full"}, {"method": "lora", "merged": True, "lr": 2e-2}], ids=str)
def test_the_result_has_the_context(
    how: dict[str, Any], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    made = make("sft", settings(place, **how), tmp_path / "long")
    assert verify(made.path) == []
    assert "context 128 -> 256: positions are interpolated" in capsys.readouterr().err
    losses = {m["slice"]: float(m["value"]) for m in made.metrics if m["metric"] == "loss"}
    assert losses["after"] < losses["before"] - 1
    assert open_artifact(made.path).passport["data"]["counts"]["longest"] == 256  # pieces as long as the context
    config = load_config(made.path)
    assert (config.max_position_embeddings, config.rope_scaling) == (256, {"rope_type": "linear", "factor": 2.0})
    ids = torch.randint(0, 280, (1, 200), generator=torch.Generator().manual_seed(1))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(made.path)(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
    llm = LLM(made.path)
    assert llm.context == 256
    assert len(llm.complete(ids[0].tolist(), max_tokens=40, ignore_eos=True).ids) == 40


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "lora"}, "an adapter beside it cannot: add --merged, or take --method full"),
        ({"context": 128}, "has 128 already"),
        ({"context": -1}, "context must not be negative"),
        ({"max_length": 300}, "max_length is 300, but the context of .*base is 256"),
    ],
    ids=str,
)
def test_contexts_that_cannot_be(more: dict[str, Any], words: str, place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make("sft", settings(place, **more), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_interpolation_adds_up_and_other_scalings_are_refused() -> None:
    once = stretched(tiny.config(), 192)
    assert once.rope_scaling == {"rope_type": "linear", "factor": 1.5}
    twice = stretched(once, 384)
    assert (twice.max_position_embeddings, twice.rope_scaling) == (384, {"rope_type": "linear", "factor": 3.0})
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled = ModelConfig(rope_scaling=llama3 | {"original_max_position_embeddings": 8192})
    with pytest.raises(UserError, match=r"positions are scaled already \(llama3\)"):
        stretched(scaled, 8192)
