"""Packed weights: what is packed comes back, as the `gguf` and `compressed-tensors` packages read it too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import model as tiny_model
from tiny import tokenizer

from criadero.checkpoints import (
    is_quantised_gguf,
    load_config,
    load_model,
    load_quantised,
    read_gguf,
    read_gguf_quantised,
    write_gguf,
    write_quantised,
)  # fmt: skip
from criadero.checkpoints.ggml import FORMATS
from criadero.checkpoints.ggml_quantised import KEPT, blocks, own_kind, repack
from criadero.checkpoints.packed import int8_of_table, power_of_two
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, bf16, pack_nibbles, unpack_nibbles
from criadero.model import ModelConfig
from criadero.quantization.rounding import best_scales, nearest, on_grid, round_matrix

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")


# --- QuantTensor ---


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_nibbles_round_trip(rows: int, half: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(0, 16, (rows, 2 * half), dtype=np.uint8)
    assert (unpack_nibbles(pack_nibbles(numbers)) == numbers).all()


def test_dequantise_is_the_formula() -> None:
    q = pack_nibbles(np.arange(16, dtype=np.uint8).reshape(1, 16))
    scales, mins = np.array([[2.0, -0.5]], np.float16), np.array([[1.0, 3.0]], np.float32)
    u = np.arange(16)
    plain = QuantTensor(4, 8, q, scales).dequantise()[0]
    assert plain.tolist() == [*((u[:8] - 8) * 2.0), *((u[8:] - 8) * -0.5)]
    shifted = QuantTensor(4, 8, q, scales, mins).dequantise()[0]
    assert shifted.tolist() == [*(u[:8] * 2.0 - 1.0), *(u[8:] * -0.5 - 3.0)]
    wide = QuantTensor(8, 4, np.array([[-127, 0, 5, 127]], np.int8), np.array([[0.5]], np.float32))
    assert wide.dequantise().tolist() == [[-63.5, 0.0, 2.5, 63.5]]
    assert wide.shape == (1, 4)
    assert wide.rows([0, 0]).shape == (2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"group": 7}, "group"),
        ({"q": np.zeros((2, 8), np.int16)}, "q:"),
        ({"scales": np.zeros((2, 3), np.float16)}, "scales"),
        ({"scales": np.zeros((2, 2), np.float64)}, "scales"),
        ({"mins": np.zeros((2, 1), np.float16)}, "mins"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict, message: str) -> None:
    good = {"bits": 4, "group": 8, "q": np.zeros((2, 8), np.uint8), "scales": np.zeros((2, 2), np.float16)}
    QuantTensor(**good)
    with pytest.raises(ValueError, match=message):
        QuantTensor(**(good | change))


# --- rounding ---


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 8]), st.sampled_from([16, 32, 64]), st.floats(-30, 12))
def test_rounding_is_as_near_as_its_scales_allow(seed: int, bits: int, group: int, size: float) -> None:
    w = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    made = round_matrix(w, bits, group)
    back = torch.from_numpy(made.dequantise())
    scales = torch.from_numpy(made.scales).float().repeat_interleave(group, 1)
    assert torch.equal(scales, on_grid(scales))  # bfloat16 and float16 hold them
    low, high = (-8, 7) if bits == 4 else (-127, 127)
    inside = (w / scales >= low) & (w / scales <= high)
    slack = 1e-6 * w.abs() + 2.0**-24
    assert ((back - w).abs() <= scales.abs() / 2 * 1.001 + slack)[inside].all()


def test_search_beats_q4_0_at_the_same_bits() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    peer = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_0), 2)
    ours = round_matrix(w, 4, 32)
    assert 8 * ours.nbytes / w.numel() == 4.5
    assert ((ours.dequantise() - w.numpy()) ** 2).sum() < 0.95 * ((peer - w.numpy()) ** 2).sum()


def test_importance_moves_the_error_where_it_costs_less() -> None:
    w = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(2))
    weigh = torch.ones(2, 32)
    weigh[:, :4] = 100
    error = {}
    for name, importance in (("even", None), ("weighed", weigh)):
        scales = best_scales(w, 4, importance)
        error[name] = float(((w - nearest(w, scales, 4) * scales[..., None]).square() * weigh).sum())
    assert error["weighed"] < error["even"]


def test_zeros_and_what_is_not_finite() -> None:
    assert (round_matrix(torch.zeros(2, 64), 4, 32).dequantise() == 0).all()
    for value in (torch.inf, torch.nan, 1e9):
        with pytest.raises(UserError, match="not finite or too large"):
            round_matrix(torch.full((1, 32), value), 4, 32, what="a matrix")


@given(st.integers(0, 2**32 - 1), st.floats(-20, 8), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_tables_survive_every_dtype(seed: int, size: float, dtype: torch.dtype) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    made = power_of_two(w.numpy(), 32)
    plain = torch.from_numpy(made.dequantise())
    assert torch.equal(plain.to(dtype).float(), plain)
    again = int8_of_table(bf16(plain.numpy()) if dtype == torch.bfloat16 else plain.to(dtype).numpy(), 32)
    assert again is not None
    assert (again.dequantise() == made.dequantise()).all()
    assert float((plain - w).abs().max()) <= float(w.abs().max()) / 127 + 2.0**-24
    assert int8_of_table(w.numpy(), 32) is None or torch.equal(plain, w)


# --- GGUF ---


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Random bytes whose float16 scales are finite."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, FORMATS[kind].size), dtype=np.uint8)
    at = {"Q4_0": [0], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}[kind]
    for start in at:
        raw[:, start : start + 2] = (rng.standard_normal((count, 1)) / 50).astype("<f2").view(np.uint8)
    return raw.reshape(-1)


@pytest.mark.parametrize("kind", KEPT)
def test_repacking_equals_the_gguf_package_bit_for_bit(kind: str) -> None:
    rows, columns = 6, 512
    raw = random_blocks(kind, rows * columns // FORMATS[kind].block)
    want = gguf.quants.dequantize(raw.reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    got = repack(raw, kind, rows, columns)
    assert (got.dequantise() == want).all()
    assert got.shape == (rows, columns)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_blocks_undo_repack(kind: str) -> None:
    raw = random_blocks(kind, 48)
    packed = repack(raw, kind, 3, 512)
    assert own_kind(packed) == kind
    assert (blocks(packed, kind) == raw).all()


def test_larger_groups_and_four_bits_in_q8_0_are_exact() -> None:
    w = torch.randn(4, 256, generator=torch.Generator().manual_seed(3))
    for bits, kind in ((4, "Q4_0"), (4, "Q8_0"), (8, "Q8_0")):
        made = round_matrix(w, bits, 128)
        raw = blocks(made, kind).reshape(4, -1)
        assert (gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]) == made.dequantise()).all()
    assert own_kind(round_matrix(w, 4, 16)) is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "BF16", "F16", "F32"])
def test_gguf_weights_without_dequantising(tmp_path: Path, kind: str, tied: bool) -> None:
    made = tiny_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    write_gguf(made, tokenizer(), tmp_path / "m.gguf", type=kind)
    config, state, words = read_gguf_quantised(tmp_path / "m.gguf")
    same, plain, _ = read_gguf(tmp_path / "m.gguf")
    assert config == same
    assert words is not None
    assert is_quantised_gguf(tmp_path / "m.gguf") == (kind in ("Q4_0", "Q8_0"))
    assert list(state) == [name for name in state if name in plain]
    assert state.keys() == plain.keys()
    for name, weight in state.items():
        assert isinstance(weight, QuantTensor) == (kind in ("Q4_0", "Q8_0") and plain[name].ndim == 2)
        if isinstance(weight, QuantTensor):
            got = torch.from_numpy(weight.dequantise())
        else:
            got = torch.from_numpy(np.array(weight))
            got = got.view(torch.bfloat16) if weight.dtype == np.uint16 else got
        assert torch.equal(got.float(), plain[name].float()), name


def test_k_quants_of_the_gguf_package_are_read_in_a_whole_file(tmp_path: Path) -> None:
    made = tiny_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    write_gguf(made, tokenizer(), tmp_path / "plain.gguf", type="F32")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    writer = gguf.GGUFWriter(tmp_path / "k.gguf", "llama")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            sub = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub)
    kinds = dict(zip(("attn_q", "attn_k", "ffn_down", "token_embd"), ("Q4_K", "Q6_K", "Q5_K", "Q6_K"), strict=True))
    for one in reader.tensors:
        kind = next((kind for part, kind in kinds.items() if part in one.name), None)
        if kind is None:
            writer.add_tensor(one.name, one.data)
            continue
        rows, columns = int(one.shape[1]), int(one.shape[0])
        raw = random_blocks(kind, rows * columns // 256, seed=len(one.name)).reshape(rows, -1)
        writer.add_tensor(one.name, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _, state, _ = read_gguf_quantised(tmp_path / "k.gguf")
    _, plain, _ = read_gguf(tmp_path / "k.gguf")
    q, k = (state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert isinstance(q, QuantTensor)
    assert isinstance(k, QuantTensor)
    assert (q.bits, q.group, q.mins is None) == (4, 32, False)
    assert (k.bits, k.group, k.mins is None) == (8, 16, True)
    assert isinstance(state["model.layers.0.mlp.down_proj.weight"], np.ndarray)
    for name, weight in state.items():
        got = weight.dequantise() if isinstance(weight, QuantTensor) else weight
        assert (got == plain[name].numpy()).all(), name


# --- compressed-tensors ---

Written = tuple[Path, dict, ModelConfig]


def write(folder: Path, *, tied: bool = True, mixed: bool = False, pack_tables: bool = False) -> Written:
    made = tiny_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied, dtype=torch.bfloat16)
    state: dict = {}
    for name, weight in made.state_dict().items():
        if name == "lm_head.weight":
            if not tied:
                state[name] = round_matrix(weight, 8, 32)
        elif name == "model.embed_tokens.weight":
            state[name] = power_of_two(weight.float().numpy(), 32) if tied or pack_tables else weight
        elif weight.ndim == 1 or (mixed and "layers.1.mlp" in name):
            state[name] = weight
        else:
            state[name] = round_matrix(weight, 8 if mixed and "o_proj" in name else 4, 96 if "down" in name else 32)
    write_quantised(state, made.config, folder, dtype=torch.bfloat16, pack_tables=pack_tables)
    return folder, state, made.config


@pytest.mark.parametrize(
    "how", [{}, {"tied": False}, {"mixed": True}, {"pack_tables": True}, {"tied": False, "pack_tables": True}]
)
def test_folder_round_trip(tmp_path: Path, how: dict) -> None:
    folder, state, config = write(tmp_path / "m", **how)
    back = load_quantised(folder)
    assert back.keys() == state.keys()
    for name, weight in state.items():
        got = back[name]
        if isinstance(weight, QuantTensor):
            assert isinstance(got, QuantTensor)
            assert (got.bits, got.group) == (weight.bits, weight.group)
            assert (got.q == weight.q).all()
            assert (got.scales == weight.scales).all()
        else:
            assert isinstance(got, np.ndarray)
            assert (got == weight.view(torch.uint16).numpy()).all()
    assert load_config(folder) == config
    twin = load_model(folder)
    assert twin.lm_head.weight.dtype == torch.float32
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == config.tie_word_embeddings


def test_four_bit_numbers_are_mapped(tmp_path: Path) -> None:
    folder, _, _ = write(tmp_path / "m")
    weight = load_quantised(folder)["model.layers.0.mlp.gate_proj.weight"]
    assert isinstance(weight, QuantTensor)
    base = weight.q
    while not isinstance(base, np.memmap) and base.base is not None:
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("how", [{}, {"tied": False}, {"mixed": True}])
def test_transformers_opens_the_folder(tmp_path: Path, how: dict) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder, _, _ = write(tmp_path / "m", **how)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        got, want = theirs(ids).logits, load_model(folder)(ids)
    assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))


def test_the_package_unpacks_the_same_numbers(tmp_path: Path) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    folder, state, _ = write(tmp_path / "m", mixed=True)
    stored = load_file(folder / "model.safetensors")
    for name, weight in state.items():
        if not isinstance(weight, QuantTensor) or "embed" in name:
            continue
        module = name.removesuffix(".weight")
        shape = stored[f"{module}.weight_shape"].tolist()
        numbers = helpers.unpack_from_int32(stored[f"{module}.weight_packed"], weight.bits, torch.Size(shape))
        mine = weight.q if weight.bits == 8 else unpack_nibbles(weight.q).astype(np.int8) - 8
        assert (numbers.numpy() == mine).all(), name


def test_shards(tmp_path: Path) -> None:
    folder, state, config = write(tmp_path / "one")
    write_quantised(state, config, tmp_path / "many", dtype=torch.bfloat16, max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    one, many = load_quantised(folder), load_quantised(tmp_path / "many")
    assert all((one[n].q == many[n].q).all() for n in one if isinstance(one[n], QuantTensor))


def edit_config(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


def group_0(values: dict) -> dict:
    return values["quantization_config"]["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit_config(lambda v: v["quantization_config"].update(quant_method="awq")), "quantised by 'awq'"),
        (edit_config(lambda v: v["quantization_config"].update(format="marlin-24")), "marlin-24"),
        (edit_config(lambda v: v["quantization_config"].pop("config_groups")), "no config_groups"),
        (edit_config(lambda v: v.update(quantization_config=[1])), "quantization_config is missing"),
        (edit_config(lambda v: group_0(v).pop("weights")), "lacks targets or weights"),
        (edit_config(lambda v: group_0(v)["weights"].update(num_bits=3)), "not supported"),
        (edit_config(lambda v: group_0(v)["weights"].update(symmetric=False)), "not supported"),
        (edit_config(lambda v: group_0(v)["weights"].update(num_bits=8)), "numbers of 8 bits"),
        (edit_config(lambda v: group_0(v)["weights"].update(group_size=64)), "groups of 64"),
        (edit_config(lambda v: group_0(v)["weights"].update(group_size=-1)), "not supported"),
        (edit_config(lambda v: group_0(v).update(targets=["re:("])), "no config group"),
        (edit_config(lambda v: v.update(criadero={"int8_tables": {"model.norm.weight": 32}})), "int8_tables"),
        (edit_config(lambda v: v["criadero"]["int8_tables"].update({"model.embed_tokens.weight": 60})), "groups of 60"),
        (edit_config(lambda v: v.update(num_hidden_layers=3)), "is missing"),
        (edit_config(lambda v: v.update(hidden_size=96)), "shape"),
        (edit_tensors(lambda t: t.pop(f"{Q}.weight_scale")), "weight_scale is missing"),
        (edit_tensors(lambda t: t.pop(f"{Q}.weight_shape")), "weight_shape is missing"),
        (edit_tensors(lambda t: t.pop(f"{Q}.weight_packed")), "q_proj"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight_shape": torch.tensor([64, 65])})), "not 64 x 65"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight_shape": torch.tensor([-64, -64])})), "damaged"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight_shape": torch.tensor([2**62, 2**62])})), "damaged"),
        (edit_tensors(lambda t: t[f"{UP}.weight_scale"].fill_(torch.inf)), "not finite"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight_packed": t[f"{Q}.weight_packed"].long()})), "int32"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(1)})), "zero_point"),
        (edit_tensors(lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64)})), "both packed and plain"),
        (edit_tensors(lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})), "int32"),
        (edit_tensors(lambda t: t["model.embed_tokens.weight"].mul_(0.7)), "8-bit numbers"),
        (edit_tensors(lambda t: t.update(extra=torch.zeros(2))), "extra"),
    ],
)
def test_damaged_folders_are_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder, _, _ = write(tmp_path / "m")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_quantised(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        load_model(folder)


def test_a_cut_or_flipped_file_is_refused_or_read(tmp_path: Path) -> None:
    folder, _, _ = write(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for _ in range(40):
        data = bytearray(whole[: int(rng.integers(len(whole)))]) if rng.random() < 0.3 else bytearray(whole)
        if data:
            at = int(rng.integers(min(len(data), 4000)))  # mostly the header
            data[at] ^= int(rng.integers(1, 256))
        file.write_bytes(data)
        try:
            load_quantised(folder)
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in line for line in refused)
