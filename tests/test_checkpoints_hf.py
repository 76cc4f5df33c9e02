"""Hugging Face folders: what we write, transformers 4.51 and 5.x read alike; what others damaged is refused by name."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import LLAMA3, VARIANTS, YARN, distance, make, tokens

from criadero.checkpoints import load_config, load_model, save_hf
from criadero.checkpoints.safetensors_hf import read_safetensors_header
from criadero.errors import UserError
from criadero.model import Llama

ROOT = Path(__file__).resolve().parents[1]


def same(one: Llama, two: Llama) -> bool:
    ours, theirs = one.state_dict(), two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shard", [5 * 2**30, 30_000])
@pytest.mark.parametrize("variant", ["gqa", "tied", "llama3", "yarn", "wide heads"])
def test_round_trip(tmp_path: Path, variant: str, shard: int) -> None:
    model = make(**VARIANTS[variant])
    save_hf(model, model.config, tmp_path, max_shard_bytes=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard > 30_000)
    loaded = load_model(tmp_path)
    assert same(model, loaded)
    assert loaded.config == dataclasses.replace(model.config) == load_config(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_as_stored_unless_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make()
    save_hf(model, model.config, tmp_path, dtype=dtype)
    assert load_model(tmp_path).lm_head.weight.dtype == dtype
    assert load_model(tmp_path, dtype=torch.float64).lm_head.weight.dtype == torch.float64
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_training_on_a_loaded_model_leaves_its_file_alone(tmp_path: Path) -> None:
    model = make()
    save_hf(model, model.config, tmp_path)
    before = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest()
    loaded = load_model(tmp_path)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(1)
    del loaded
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).digest() == before


def test_writing_again_leaves_no_old_shards(tmp_path: Path) -> None:
    model, other = make(), make(seed=1)
    save_hf(model, model.config, tmp_path, max_shard_bytes=30_000)
    save_hf(other, other.config, tmp_path)
    assert same(load_model(tmp_path), other)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]
    save_hf(model, model.config, tmp_path, max_shard_bytes=30_000)
    assert same(load_model(tmp_path), model)


# --- the same folder in two versions of transformers ---

PUBLISHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta 500000": {"rope_theta": 500000.0},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn with original = maximum": {"rope_scaling": YARN | {"original_max_position_embeddings": 64, "factor": 2.0}},
    "yarn with unrelated maximum": {"rope_scaling": YARN | {"factor": 3.0}},
    "yarn with attention factor": {"rope_scaling": YARN | {"attention_factor": 0.8}},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 6},
    "wide heads": {"head_dim": 16},
    "special ids": {"bos_token_id": 1, "eos_token_id": (2, 5), "pad_token_id": 0},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Llama]]:
    out = {}
    for number, (name, changes) in enumerate(PUBLISHED.items()):
        folder = tmp_path_factory.mktemp(f"published{number}")
        model = make(**changes)
        save_hf(model, model.config, folder, max_shard_bytes=2**30 if number % 2 else 50_000)
        out[name] = folder, model
    return out


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_logits_in_transformers_5(published: dict[str, tuple[Path, Llama]], name: str) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.0")
    folder, model = published[name]
    twin, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, local_files_only=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert distance(model(tokens()), twin(tokens()).logits) < 1e-5
    assert distance(load_model(folder)(tokens()), twin(tokens()).logits) < 1e-5
    assert twin.generation_config.eos_token_id == json.loads((folder / "config.json").read_text()).get("eos_token_id")


@pytest.fixture(scope="module")
def old_logits(published: dict[str, tuple[Path, Llama]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every published folder's logits by transformers 4.51.3, from one process of its own."""
    compat = ROOT / ".compat"
    if not (compat / "transformers").is_dir():
        reason = "transformers 4.51.3 is not installed: run tests/compat/install.sh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    ids = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(ids, tokens().numpy())
    folders = [str(folder) for folder, _ in published.values()]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compat" / "logits.py"), str(ids), *folders],
        env=os.environ | {"PYTHONPATH": str(compat), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_logits_in_transformers_4_51(old_logits: None, published: dict[str, tuple[Path, Llama]], name: str) -> None:
    folder, model = published[name]
    logits = torch.from_numpy(np.load(folder / "logits-4.51.3.npy"))
    assert distance(model(tokens()), logits) < 1e-5


@torch.no_grad()
def test_folder_written_by_transformers_5(tmp_path: Path) -> None:
    """The newer spelling, rope_parameters, is read too."""
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = make(rope_theta=500000.0, rope_scaling=LLAMA3)
    twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.config.to_hf()))
    twin.load_state_dict(model.state_dict())
    twin.save_pretrained(tmp_path, max_shard_size="50KB")
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    loaded = load_model(tmp_path)
    assert same(loaded, model)
    assert loaded.config.rope_theta == 500000.0
    assert distance(loaded(tokens()), twin.eval()(tokens()).logits) < 1e-5


# --- bad input ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make(num_hidden_layers=1)
    save_hf(model, model.config, tmp_path)
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


K = "model.layers.0.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(K), rf"tensor {K} is missing"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
        (lambda t: t.update({K: torch.zeros(3, 4)}), rf"{K} has shape \[3, 4\], but .* \[16, 48\]"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}), "q_proj.bias is not part"),
        (lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(80, 48)}), "layers.1.mlp.up_proj"),
        (lambda t: t.update({K: torch.zeros(16, 48, dtype=torch.int8)}), rf"{K} has type I8"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_rotary_frequencies_of_old_files_are_left_out(folder: Path) -> None:
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert same(load_model(folder), make(num_hidden_layers=1))


def test_a_tied_model_that_stores_its_output_twice(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=True)
    save_hf(model, model.config, tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(load_model(tmp_path), model)
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="tie_word_embeddings is true"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[1]", "must hold a JSON object"),
        ("config.json", "[" * 100_000, "not valid JSON"),
        ("config.json", "\xff\xfe", "not valid JSON"),
        ("config.json", '{"model_type": "llama", "hidden_size": 1e400}', "hidden_size"),
        ("config.json", '{"num_hidden_layers": 1000000000000}', "has shape|missing"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../other.safetensors"}}', "outside its folder"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "shard b.safetensors is missing"),
        ("model.safetensors.index.json", '{"weight_map": []}', "weight_map"),
        ("model.safetensors.index.json", "{}", "weight_map"),
    ],
)
def test_bad_json(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_text(text, encoding="latin-1")
    if "index" in name:
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_a_shard_too_many(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is also in a\.safetensors"):
        load_model(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is not read"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(folder)


def header_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def with_header(path: Path, header: Any, length: int | None = None) -> None:
    data = path.read_bytes()
    (old,) = struct.unpack("<Q", data[:8])
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data[8 + old :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(data_offsets=[0, 4]), "does not take 4 bytes"),
        (lambda e: e.update(data_offsets=[10**15, 10**15 + 16 * 48 * 4]), "not where the tensor before it ends"),
        (lambda e: e.update(data_offsets=[-4, 16 * 48 * 4 - 4]), "malformed"),
        (lambda e: e.update(data_offsets=[0.0, 16 * 48 * 4.0]), "malformed"),
        (lambda e: e.update(shape=[2**40, 2**40]), "does not take"),
        (lambda e: e.update(shape=[True]), "malformed"),
        (lambda e: e.update(shape="48"), "malformed"),
        (lambda e: e.update(dtype="F12"), "malformed"),
        (lambda e: e.update(dtype=["F32"]), "malformed"),
        (lambda e: e.update(dtype="F16"), "does not take"),
        (lambda e: e.pop("shape"), "lacks dtype, shape or data_offsets"),
    ],
)
def test_a_lying_header(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = folder / "model.safetensors"
    header = header_of(path)
    change(header[K])
    with_header(path, header)
    with pytest.raises(UserError, match=message) as caught:
        load_model(folder)
    assert "model.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overlapping_tensors(folder: Path) -> None:
    path = folder / "model.safetensors"
    header = header_of(path)
    header[K]["data_offsets"] = header["model.layers.0.self_attn.v_proj.weight"]["data_offsets"]
    with_header(path, header)
    with pytest.raises(UserError, match="not where the tensor before it ends"):
        load_model(folder)


@pytest.mark.parametrize("header", [b"", b"{", b"[]", b"null", b'{"a": 1}', b"[" * 100_000, b"\xff"])
def test_a_header_of_another_kind(folder: Path, header: bytes) -> None:
    with_header(folder / "model.safetensors", header)
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("length", [0, 1, 10**6, 2**63, 2**64 - 1])
def test_a_header_length_that_lies(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    with_header(path, header_of(path), length)
    with pytest.raises(UserError, match="damaged safetensors file"):
        load_model(folder)


def test_truncated_and_flipped_files_are_refused_or_read_whole(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    dice = random.Random(0)
    for size in [*range(12), *(dice.randrange(len(whole)) for _ in range(60)), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            load_model(folder)
    for _ in range(300):
        at = dice.randrange(8 + length)
        path.write_bytes(whole[:at] + bytes([dice.randrange(256)]) + whole[at + 1 :])
        with contextlib.suppress(UserError):
            load_model(folder)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="but it holds"):
        read_safetensors_header(path)


def test_a_model_of_the_wrong_shape_is_not_written(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(UserError, match="has shape"):
        save_hf(model, make(num_key_value_heads=6).config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
