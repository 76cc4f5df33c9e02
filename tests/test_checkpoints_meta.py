"""Meta's .pth folders: joined, reordered, and never unpickled in this process or able to run anything in the other."""

from __future__ import annotations

import builtins
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoints_hf import same
from test_model import LLAMA3, make

from criadero.checkpoints import load_config, load_model, read_meta
from criadero.checkpoints.layout import to_interleaved, to_rotate_half
from criadero.errors import UserError
from criadero.model import Llama, rotate

BACK = {
    "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
}  # fmt: skip
ROWS = ("wq.weight", "wk.weight", "wv.weight", "w1.weight", "w3.weight", "output.weight")
COLUMNS = ("wo.weight", "w2.weight")
META_LLAMA3 = LLAMA3 | {"original_max_position_embeddings": 8192}


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotate-half rows -> interleaved rows, one row at a time: row j and row j + Dh/2 of a head become 2j and 2j + 1."""
    size = weight.shape[0] // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for j in range(size // 2):
            out[head * size + 2 * j] = weight[head * size + j]
            out[head * size + 2 * j + 1] = weight[head * size + j + size // 2]
    return out


def write_meta(
    model: Llama, folder: Path, *, shards: int = 1, embedding_rows: bool = False, **extra: Any
) -> dict[str, torch.Tensor]:
    """The folder Meta would have published: `shards` tensor-parallel ranks."""
    config = model.config
    params = {
        "dim": config.hidden_size, "n_layers": config.num_hidden_layers, "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads, "norm_eps": config.rms_norm_eps, "vocab_size": -1,
        "multiple_of": 256, "rope_theta": config.rope_theta,
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params | extra))
    state = {}
    for name, weight in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            weight = pairs(weight, config.num_attention_heads)
        if name.endswith("k_proj.weight"):
            weight = pairs(weight, config.num_key_value_heads)
        for ours, theirs in BACK.items():
            name = name.replace(ours, theirs)
        state[name] = weight
    state["rope.freqs"] = torch.ones(4)
    for rank in range(shards):
        part = {}
        for name, weight in state.items():
            axis = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
            if name == "tok_embeddings.weight":
                axis = 0 if embedding_rows else 1
            part[name] = weight if axis is None else weight.chunk(shards, dim=axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    return state


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_two_orders_of_rows(heads: int) -> None:
    weight = torch.randn(48, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_interleaved(weight, heads), pairs(weight, heads))
    assert torch.equal(to_rotate_half(pairs(weight, heads), heads), weight)


def test_interleaved_rotation_is_the_same_rotation() -> None:
    """Scores from Meta's complex-number rotation of interleaved rows equal ours of reordered rows."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(8, 5, generator=generator).double(), torch.randn(7, 5, generator=generator).double()
    other = torch.randn(8, 5, generator=generator).double()
    angles = torch.arange(7)[:, None] * (10000.0 ** (-torch.arange(0, 8, 2) / 8.0))[None]
    turn = torch.polar(torch.ones(7, 4).double(), angles.double())

    def meta(w: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex((x @ w.T).reshape(7, 4, 2)) * turn).flatten(1)

    def ours(w: torch.Tensor) -> torch.Tensor:
        both = torch.cat((angles, angles), -1).double()
        return rotate((x @ to_rotate_half(w, 1).T)[None, None], both.cos(), both.sin())[0, 0]

    assert torch.allclose(meta(weight) @ meta(other).T, ours(weight) @ ours(other).T, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "shards", "embedding_rows"),
    [({}, 1, False), ({}, 2, True), ({"num_key_value_heads": 6}, 2, False)],
)
def test_round_trip(tmp_path: Path, changes: dict[str, Any], shards: int, embedding_rows: bool) -> None:
    model = make(**({"max_position_embeddings": 4096, "vocab_size": 98} | changes))
    write_meta(model, tmp_path, shards=shards, embedding_rows=embedding_rows)
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert loaded.config == model.config


def test_tied_scaled_and_bfloat16(tmp_path: Path) -> None:
    model = make(
        torch.bfloat16, tie_word_embeddings=True, rope_theta=500000.0, rope_scaling=META_LLAMA3,
        max_position_embeddings=131072,
    )  # fmt: skip
    write_meta(model, tmp_path, use_scaled_rope=True)
    config, state = read_meta(tmp_path)
    assert config == model.config
    assert "lm_head.weight" not in state
    assert load_config(tmp_path) == model.config


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.target,)


class EvilIndirect(Evil):
    """The same through a builtin that torch might be thought to allow."""

    def __reduce__(self) -> tuple[Any, ...]:
        return builtins.eval, (f"__import__('os').mkdir({self.target!r})",)


@pytest.mark.parametrize("evil", [Evil, pytest.param(EvilIndirect, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["torch", "plain pickle", "legacy torch"])
def test_a_malicious_pickle_runs_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, evil: type[Evil]
) -> None:
    target = tmp_path / "ran"
    write_meta(make(), tmp_path)
    payload = {"tok_embeddings.weight": torch.zeros(2, 2), "x": evil(target)}
    path = tmp_path / "consolidated.00.pth"
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(payload))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=form == "torch")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened in this process")

    monkeypatch.setattr(torch, "load", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)
    with pytest.raises(UserError, match=r"consolidated\.00\.pth: cannot be read"):
        load_model(tmp_path)
    assert not target.exists()
    monkeypatch.undo()
    if form == "torch":  # the attack is real: an unguarded reader falls for it
        torch.load(path, weights_only=False)
        assert target.exists()


def test_tensors_larger_than_the_file(tmp_path: Path) -> None:
    """A stride of 0 makes a few bytes look like terabytes."""
    write_meta(make(), tmp_path)
    torch.save({"tok_embeddings.weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match="claims more numbers than the file stores"):
        load_model(tmp_path)


def many(folder: Path) -> None:
    tensor = torch.zeros(1000)
    torch.save({f"t{index}": tensor for index in range(1000)}, folder / "consolidated.00.pth")


def truncate(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def bomb(folder: Path) -> None:
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"0" * 10**7)


def params(**changes: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (many, "claims more numbers"),
        (truncate, "cannot be read"),
        (bomb, "cannot be read"),
        (lambda folder: (folder / "consolidated.00.pth").write_bytes(b""), "cannot be read"),
        (lambda folder: torch.save([1], folder / "consolidated.00.pth"), "holds a list"),
        (lambda folder: torch.save({"a": 1}, folder / "consolidated.00.pth"), "entry 'a' is not a tensor"),
        (lambda folder: torch.save({"a": torch.ones(2)}, folder / "consolidated.00.pth"), "tok_embeddings"),
        (lambda folder: (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth"), r"\.00\.pth is miss"),
        (lambda folder: (folder / "consolidated.00.pth").unlink(), r"\.00\.pth is missing"),
        (lambda folder: (folder / "params.json").write_text("{"), "not valid JSON"),
        (params(n_layers=2), r"layers\.2.* is not part of a Llama"),
        (params(n_layers=4), r"layers\.3.* is missing"),
        (params(dim=60), "has shape"),
        (params(dim="48"), "dim must be a positive integer"),
        (params(quantization_args={"scheme": "int4"}), "quantization_args"),
        (params(moe=True), "moe"),
    ],
)
def test_bad_folders(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    write_meta(make(), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_that_do_not_fit(tmp_path: Path) -> None:
    write_meta(make(vocab_size=98), tmp_path, shards=2)
    first = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    torch.save({name: w for name, w in first.items() if "wq" not in name}, tmp_path / "consolidated.01.pth")
    with pytest.raises(UserError, match="differ: only one has"):
        load_model(tmp_path)
    (tmp_path / "consolidated.01.pth").unlink()
    with pytest.raises(UserError, match=r"has shape|not fit"):
        load_model(tmp_path)
