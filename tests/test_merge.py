"""Merging, against float64 NumPy written from the papers, and PEFT's own merging of an adapter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from criadero import cli
from criadero.artifact import create, open_artifact, verify
from criadero.checkpoints import load_model
from criadero.errors import UserError
from criadero.merge import MergeRecipe, combine, drop, elect, slerp, trim
from criadero.run import make


def draws(n: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def test_slerp_keeps_the_angle_in_proportion() -> None:
    a, b = draws(2, 7, 5)
    x, y = (t.double().numpy().ravel() / np.linalg.norm(t.double().numpy()) for t in (a, b))
    whole = np.arccos(x @ y)
    for t in (0.0, 0.25, 0.7, 1.0):
        # Gram-Schmidt instead of Shoemake's quotient of sines: turn x towards y by t of the angle between them
        side = (y - (x @ y) * x) / np.linalg.norm(y - (x @ y) * x)
        expected = np.cos(t * whole) * x + np.sin(t * whole) * side
        mine = slerp(torch.tensor(x), torch.tensor(y), t).numpy()
        np.testing.assert_allclose(mine, expected, atol=1e-6)
    np.testing.assert_allclose(slerp(a, a * 2, 0.5).numpy(), a.numpy() * 1.5, rtol=1e-6)
    assert torch.equal(slerp(torch.zeros(3), torch.zeros(3), 0.5), torch.zeros(3))


def ties_by_the_paper(deltas: list[np.ndarray], weights: list[float], density: float) -> np.ndarray:
    """Algorithm 1 of arXiv 2306.01708, entry by entry."""
    trimmed = []
    for delta in deltas:
        flat = delta.ravel().copy()
        order = np.argsort(-np.abs(flat), kind="stable")
        flat[order[max(1, int(density * flat.size)) :]] = 0
        trimmed.append(flat)
    out = np.zeros(trimmed[0].size)
    for p in range(out.size):
        votes = [w * d[p] for w, d in zip(weights, trimmed, strict=True)]
        sign = np.sign(sum(votes))
        chosen = [(w, d[p]) for w, d in zip(weights, trimmed, strict=True) if d[p] != 0 and np.sign(d[p]) == sign]
        if chosen:
            out[p] = sum(w * d for w, d in chosen) / sum(w for w, _ in chosen)
    return out.reshape(deltas[0].shape)


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(density: float) -> None:
    deltas, weights = draws(3, 6, 11), [1.0, 0.5, 2.0]
    mine = elect([trim(d, density) for d in deltas], weights)
    np.testing.assert_allclose(
        mine.numpy(), ties_by_the_paper([d.double().numpy() for d in deltas], weights, density), rtol=2e-5, atol=1e-6
    )


def test_dare_keeps_the_mean() -> None:
    (delta,) = draws(1, 200, 300)
    dropped = drop(delta, 0.3, torch.Generator().manual_seed(0))
    kept = dropped != 0
    assert float(kept.float().mean()) == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(dropped[kept].numpy(), (delta[kept] / 0.3).numpy(), rtol=1e-6)
    assert torch.equal(drop(delta, 1.0, torch.Generator()), delta)


def test_methods_over_states() -> None:
    base, a, b = ({"w": t} for t in draws(3, 4, 4))
    w = [t["w"].double().numpy() for t in (base, a, b)]

    def run(**values: Any) -> np.ndarray:
        recipe = MergeRecipe(models=("a", "b"), **values)
        return combine([a, b], recipe, base if recipe.method not in ("linear", "slerp") else None)["w"].numpy()

    np.testing.assert_allclose(run(method="linear"), (w[1] + w[2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(run(method="linear", weights=(3.0, 1.0)), (3 * w[1] + w[2]) / 4, rtol=1e-5)
    np.testing.assert_allclose(run(method="dare", density=1.0), w[1] + w[2] - w[0], rtol=1e-4, atol=1e-6)
    ties = w[0] + ties_by_the_paper([w[1] - w[0], w[2] - w[0]], [1, 1], 0.5)
    np.testing.assert_allclose(run(method="ties"), ties, rtol=1e-4, atol=1e-6)
    full = w[0] + ties_by_the_paper([w[1] - w[0], w[2] - w[0]], [1, 1], 1.0)
    np.testing.assert_allclose(run(method="dare_ties", density=1.0), full, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(run(method="dare", seed=3), run(method="dare", seed=3))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(("base", "one", "two")):
        with create(name, kind="base", config={}, licence="Apache-2.0") as draft:
            tiny.base(draft.path, seed=n)
    tiny.base(Path("wide"), hidden_size=64)
    return tmp_path


def test_models_are_merged_and_sealed(here: Path) -> None:
    assert cli._run(["merge", "one,two", "--out", "soup"]) == 0
    made = open_artifact("soup")
    assert verify(made.path) == []
    assert [one["relation"] for one in made.inputs] == ["merged_from", "merged_from"]
    states = [load_model(name).state_dict() for name in ("one", "two", "soup")]
    for key in states[0]:
        torch.testing.assert_close(states[2][key], (states[0][key] + states[1][key]) / 2)
    assert (made.path / "chat_template.jinja").exists()
    make("merge", {"models": ["one", "two"], "method": "ties", "base": "base"}, "ties")


def test_an_adapter_is_folded_in_as_peft_does(here: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tiny.write_chats(Path("chats.jsonl"))
    make("sft", {"base": "base", "data": "chats.jsonl", "epochs": 2.0, "dtype": "float32", "lr": 0.02}, "adapter")
    made = make("merge", {"models": ["adapter"]}, "whole")
    base = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, "adapter").merge_and_unload().state_dict()
    mine = load_model(made.path).state_dict()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6)


MERGEKIT: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"weights": (3.0, 1.0)}, {"merge_method": "linear"}),
    "slerp": (
        {"method": "slerp", "t": 0.3},
        {"merge_method": "slerp", "base_model": "./one", "parameters": {"t": 0.3}},
    ),
    "ties": ({"method": "ties", "density": 0.4, "weights": (1.0, 0.5)}, {"merge_method": "ties"}),
    # what is dropped is drawn, each in its own way: only without dropping are results comparable
    "dare": ({"method": "dare", "density": 1.0}, {"merge_method": "dare_linear", "parameters": {"normalize": False}}),
    "dare_ties": ({"method": "dare_ties", "density": 1.0, "weights": (1.0, 0.5)}, {"merge_method": "dare_ties"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGEKIT)
def test_the_results_are_mergekits(name: str, here: Path) -> None:
    """mergekit is no dependency of the tests: where it is installed (CONTRIBUTING.md), its own command merges the same models."""
    pytest.importorskip("mergekit")
    import yaml
    from safetensors.torch import load_file

    values, config = MERGEKIT[name]
    if "ties" in name or name == "dare":
        values = values | {"base": "base"}
        config = {"base_model": "./base", "parameters": {"normalize": True}} | config
    given = [
        {"model": f"./{model}", "parameters": {"weight": weight, "density": values.get("density", 1.0)}}
        for model, weight in zip(("one", "two"), values.get("weights", (1.0, 1.0)), strict=True)
    ]
    Path("config.yml").write_text(yaml.safe_dump(config | {"models": given, "dtype": "float32"}))
    command = [sys.executable, "-m", "mergekit.scripts.run_yaml", "config.yml", "theirs", "--no-copy-tokenizer"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    theirs = {k: v for file in Path("theirs").glob("*.safetensors") for k, v in load_file(file).items()}
    made = make("merge", {"models": ["one", "two"]} | values, "ours")
    mine = load_file(made.path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"models": ["one", "wide"]}, "wide has not the shape of one"),
        ({"models": []}, "none given"),
        ({"models": ["one", "two"], "weights": [1.0]}, "1 for 2 models"),
        ({"models": ["one", "two"], "weights": [1.0, 0.0]}, "must be positive"),
        ({"models": ["one"], "method": "slerp"}, "two models"),
        ({"models": ["one", "two"], "method": "ties"}, "needs the base"),
        ({"models": ["one", "two"], "base": "base"}, "does not use it"),
        ({"models": ["one", "two"], "density": 0.0}, "density"),
        ({"models": ["one", "nobody"]}, "no such"),
    ],
)
def test_bad_merges(values: dict[str, Any], words: str, here: Path) -> None:
    with pytest.raises(UserError, match=words):
        make("merge", values, "new")
    assert not Path("new").exists()
    assert not Path("new.partial").exists()
