"""The native runner against its twin: every kind of model file, number format and adapter, through the same steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from criadero.checkpoints import load_model, save_hf, write_gguf
from criadero.checkpoints.ggml import FORMATS
from criadero.checkpoints.ggml_quantised import repack
from criadero.checkpoints.gguf_file import read_header
from criadero.checkpoints.layout import to_rotate_half
from criadero.checkpoints.packed import power_of_two, write_quantised
from criadero.config import ModelConfig
from criadero.engine.runner import PAGE, StepBatch, native_available
from criadero.engine.torch_runner import TorchRunner
from criadero.errors import UserError
from criadero.kernels import native, pack
from criadero.lora import adapters, attach, save_adapter
from criadero.model import Llama
from criadero.quantization.rounding import round_matrix

pytestmark = [
    pytest.mark.skipif(not native_available(), reason="the compiled kernels are not installed"),
    pytest.mark.usefixtures("one_torch_thread"),
]
if native_available():
    from criadero.engine.native import OWN, NativeRunner, converted, open_weights


# hidden_size is a multiple of 256: GGUF's Q4_K and Q6_K need that
CONFIG = {
    "vocab_size": 96, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def new_model(**fields: Any) -> Llama:
    model = Llama(ModelConfig(**(CONFIG | fields)))
    model.initialise(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2 if weight.ndim > 1 else 1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "base"
    model = new_model()
    save_hf(model, model.config, path, dtype=torch.bfloat16)
    return path


def steps(seed: int = 0) -> list[StepBatch]:
    """Two requests: a prompt whole and in part, then the rest, then a token each."""
    random = np.random.default_rng(seed)
    texts, tables = [random.integers(0, 96, 40), random.integers(0, 96, 25)], np.array([[2, 0], [3, 1]], np.int32)
    made = []
    for spans in ([(0, 30), (0, 10)], [(30, 39), (10, 24)], [(39, 40), (24, 25)]):
        counts = [end - begin for begin, end in spans]
        made.append(
            StepBatch(
                ids=np.concatenate([t[a:b] for t, (a, b) in zip(texts, spans, strict=True)]).astype(np.int32),
                positions=np.concatenate([np.arange(a, b) for a, b in spans]).astype(np.int32),
                starts=np.cumsum([0, *counts]).astype(np.int32),
                lengths=np.array([b for _, b in spans], np.int32),
                tables=tables,
                adapters=None,
                logit_rows=np.arange(sum(counts), dtype=np.int32),
                want_hidden=True,
            )
        )
    return made


def run(runner: Any, **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    outs = []
    for one in steps():
        for name, value in fields.items():
            setattr(one, name, value)
        logits, hidden = runner.step(one)
        outs.append((logits.copy(), hidden.copy()))
    return np.concatenate([a for a, _ in outs]), np.concatenate([b for _, b in outs])


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference over that of the numbers."""
    return float(np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()))


def check(ref: Path, most: float, twin: Llama | None = None, **options: Any) -> NativeRunner:
    """The runner, once its logits and hidden states are near those of the twin on the same numbers."""
    runner = NativeRunner(ref, pages=4, threads=2, **options)
    twin = TorchRunner(twin or load_model(ref, dtype=torch.float32), pages=4)
    for got, wanted in zip(run(runner), run(twin), strict=True):
        assert apart(got, wanted) < most
    return runner


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("tied", [False, True])
def test_folders(tmp_path: Path, dtype: torch.dtype, most: float, tied: bool) -> None:
    model = new_model(tie_word_embeddings=tied)
    save_hf(model, model.config, tmp_path / "m", dtype=dtype, max_shard_bytes=10**6)
    runner = check(tmp_path / "m", most)
    assert runner.page == PAGE
    assert runner.name.split()[-1] == ("f32" if dtype == torch.float32 else "bf16")


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf_files(tmp_path: Path, kind: str, tied: bool) -> None:
    model = new_model(tie_word_embeddings=tied)
    write_gguf(model, None, tmp_path / "m.gguf", type=kind)
    runner = check(tmp_path / "m.gguf", 1e-5 if kind == "F32" else 3e-2)
    assert f"int{kind[1]}" in runner.name or kind in ("F32", "F16", "BF16")


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "folder"])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_that_stay_in_the_file(tmp_path: Path, kind: str, tied: bool) -> None:
    """The same logits to the bit as of repacked rows, and to rounding as of rows in another format."""
    model, ref = new_model(tie_word_embeddings=tied), tmp_path / "m.gguf"
    if kind == "folder":
        ref = tmp_path / "m"
        save_hf(model, model.config, ref, dtype=torch.bfloat16)
    else:
        write_gguf(model, None, ref, type=kind)
    stays, packed = check(ref, 3e-2, mapped=True), NativeRunner(ref, pages=4, threads=1, mapped=False)
    assert stays.name == packed.name
    for got, wanted in zip(run(stays), run(packed), strict=True):
        assert np.array_equal(got, wanted)
    check(ref, 3e-2, mapped=True, weights="int8")
    check(ref, 1e-4, mapped=True, weights="f32")


def test_an_adapter_on_rows_that_stay(tmp_path: Path) -> None:
    model = new_model()
    for kind in ("BF16", "Q8_0"):
        base = tmp_path / f"{kind}.gguf"
        write_gguf(model, None, base, type=kind)
        adapter = new_adapter(tmp_path / kind, base, 2)
        results = [run(NativeRunner(adapter, pages=4, threads=2, mapped=mapped)) for mapped in (True, False)]
        assert np.array_equal(results[0][0], results[1][0])


def test_rows_that_stay_are_not_looked_at(tmp_path: Path) -> None:
    """A damaged number in a file of ours is an error when the model is opened, or, of rows that stay there, NaN when it is used."""
    model, path = new_model(), tmp_path / "m.gguf"
    write_gguf(model, None, path, type="BF16")
    data = bytearray(path.read_bytes())
    info = read_header(path).tensors["blk.1.ffn_up.weight"]
    data[info.offset + 2000 : info.offset + 2002] = b"\x80\x7f"  # infinity
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"'blk.1.ffn_up.weight' holds values that are not finite"):
        NativeRunner(path, pages=4, mapped=False)
    assert not np.isfinite(run(NativeRunner(path, pages=4, mapped=True))[0]).all(axis=1).any()


def test_small_models_are_repacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = native().Linear.map_rows

    class Linear:
        pack_dense = native().Linear.pack_dense

        @staticmethod
        def map_rows(*arguments: Any) -> Any:
            made.append(arguments)
            return real(*arguments)

    monkeypatch.setattr(native(), "Linear", Linear)
    NativeRunner(folder, pages=4, threads=1)
    assert not made
    monkeypatch.setattr("criadero.engine.native.MAPPED", 1)
    NativeRunner(folder, pages=4, threads=1)
    assert bool(made) == native().maps_rows()


def test_gguf_files_with_k_quants(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    write_gguf(new_model(), None, tmp_path / "plain.gguf", type="F32")
    reader, writer = gguf.GGUFReader(tmp_path / "plain.gguf"), gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for name, entry in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(
                name, entry.contents(), entry.types[0], entry.types[-1] if len(entry.types) > 1 else None
            )
    random = np.random.default_rng(0)
    for one in reader.tensors:
        if len(one.shape) == 1:
            writer.add_tensor(one.name, one.data)
            continue
        kind, size, at = (
            ("Q6_K", 210, [208]) if "ffn_down" in one.name or "." not in one.name[4:8] else ("Q4_K", 144, [0, 2])
        )
        rows, blocks = int(one.shape[1]), int(one.shape[0]) // 256
        raw = random.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
        for offset in at:  # the factors of a block: of the size that makes weights of 0.05
            factor = np.full((rows, blocks, 1), 2e-5 if kind == "Q6_K" else 1e-4, np.float16)
            raw[:, :, offset : offset + 2] = factor.view(np.uint8)
        writer.add_tensor(one.name, raw.reshape(rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    load = open_weights(tmp_path / "m.gguf")[1]
    for slot, form in (("mlp.up", (4, 32, False)), ("mlp.down", (8, 16, True))):
        weight = load(f"model.layers.0.{slot}_proj.weight").unpack()
        assert (weight.bits, weight.group, weight.mins is None) == form
    check(tmp_path / "m.gguf", 3e-2)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_ggml_blocks_are_unpacked_as_the_twin_does(kind: str) -> None:
    rows, columns = 24, 512
    random = np.random.default_rng(1)
    blocks = columns // FORMATS[kind].block
    raw = random.integers(0, 256, (rows * blocks, FORMATS[kind].size), dtype=np.uint8)
    for offset in {"Q6_K": [208], "Q4_K": [0, 2]}.get(kind, [0]):
        raw[:, offset : offset + 2] = random.standard_normal((len(raw), 1)).astype(np.float16).view(np.uint8)
    wanted = repack(raw, kind, rows, columns)

    def outs() -> list[Any]:
        return [None if a is None else np.zeros_like(a) for a in (wanted.q, wanted.scales, wanted.mins)]

    for heads in (0, 4):
        made = outs()
        native().repack_ggml(kind, raw.reshape(-1), rows, columns, heads, 2, *made)
        order = to_rotate_half(torch.arange(rows)[:, None], heads or 1)[:, 0].numpy() if heads else slice(None)
        right = wanted.rows(order)
        for got, want in zip(made, (right.q, right.scales, right.mins), strict=True):
            assert (got is None and want is None) or np.array_equal(got, want)
        straight = native().Linear.pack_ggml(kind, raw.reshape(-1), rows, columns, heads, 2)
        x = random.standard_normal((3, columns), dtype=np.float32)
        assert np.array_equal(straight.apply(x, 2), pack(right, 2).apply(x, 2))
        assert straight.nbytes == pack(right, 2).nbytes
    q, scales, mins = outs()
    flat = raw.reshape(-1)
    for wrong in (
        (kind, flat[1:], rows, columns, 0, 1, q, scales, mins), ("Q5_K", flat, rows, columns, 0, 1, q, scales, mins),
        (kind, flat, rows, columns, 5, 1, q, scales, mins), (kind, flat, rows, 30, 0, 1, q, scales, mins),
        (kind, flat, rows, columns, 0, 1, q[1:], scales, mins), (kind, flat, rows, columns, 0, 1, q, scales[:, 1:].copy(), mins),
        (kind, flat, rows, columns, 0, 1, q, scales, scales if mins is None else None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"needed|known|heads|blocks"):
            native().repack_ggml(*wrong)
    for few in (
        (kind, flat[1:], rows, columns, 0, 1),
        (kind, flat, rows, columns, 5, 1),
        ("Q5_K", flat, rows, columns, 0, 1),
    ):
        with pytest.raises(ValueError, match=r"needed|known|heads"):
            native().Linear.pack_ggml(*few)
    damaged = raw.copy()
    damaged[7, {"Q6_K": 208}.get(kind, 0) :][:2] = (0, 0x7C)  # an infinite scale
    damaged[7, 192:208] = 1
    with pytest.raises(ValueError, match="finite"):
        native().Linear.pack_ggml(kind, damaged.reshape(-1), rows, columns, 0, 2)


@pytest.mark.parametrize(("weights", "most"), [("f32", 1e-5), ("bf16", 1e-2), ("int8", 2e-2), ("int4", 3e-2)])
def test_weights_are_converted(folder: Path, weights: str, most: float) -> None:
    load = open_weights(folder)[1]
    twin = load_model(folder, dtype=torch.float32)
    for name, parameter in twin.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            form = converted(load(name), weights)
            values = form.dequantise() if not isinstance(form, np.ndarray) else None
            if values is not None:
                parameter.data.copy_(torch.from_numpy(values))
    check(folder, most, twin=twin, weights=weights)


@pytest.mark.parametrize("tied", [False, True])
def test_quantised_folders(tmp_path: Path, tied: bool) -> None:
    model = new_model(tie_word_embeddings=tied)
    state: dict[str, Any] = dict(model.state_dict())
    if tied:
        del state["lm_head.weight"]
    for name, weight in state.items():
        if name == "model.embed_tokens.weight":
            state[name] = power_of_two(weight.float().numpy(), 32)
        elif weight.ndim == 2:
            state[name] = round_matrix(weight, 8 if "o_proj" in name else 4, 128 if "down" in name else 32)
    write_quantised(state, model.config, tmp_path / "q", dtype=torch.bfloat16)
    assert "int4" in check(tmp_path / "q", 3e-2).name


def new_adapter(folder: Path, base: Path, seed: int, rank: int = 4) -> Path:
    model = load_model(base)
    attach(model, rank=rank, alpha=8, seed=seed)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape) * 0.1)
    folder.mkdir()
    save_adapter(model, folder, base=str(base), alpha=8, rslora=False, dropout=0.0)
    return folder


def test_an_adapter_as_the_model_and_one_beside_it(folder: Path, tmp_path: Path) -> None:
    from criadero.engine.adapters import read_adapter

    adapter = new_adapter(tmp_path / "a", folder, 1)
    merged = load_model(adapter, dtype=torch.float32)
    check(adapter, 1e-2, merged)  # merged into bf16
    plain = check(folder, 1e-5, weights="f32")
    plain.add_adapter(3, read_adapter(adapter, plain, None)[0])
    with pytest.raises(ValueError, match="adapter 3 is loaded already"):
        plain.add_adapter(3, {})
    twin = TorchRunner(merged, pages=4)
    base = run(plain)[0]
    got, wanted = run(plain, adapters=np.array([3, -1], np.int32))[0], run(twin)[0]
    assert apart(got[:30], wanted[:30]) < 1e-4
    assert np.array_equal(got[30:40], base[30:40])
    plain.drop_adapter(3)
    with pytest.raises(ValueError, match="adapter 3 is not there"):
        run(plain, adapters=np.array([3, -1], np.int32))


def test_an_adapter_on_a_quantised_base(tmp_path: Path) -> None:
    model = new_model()
    base = tmp_path / "base.gguf"
    write_gguf(model, None, base, type="Q8_0")
    adapter = new_adapter(tmp_path / "a", base, 2)
    runner = check(adapter, 2e-2)
    other = {(0, "q"): (np.ones((2, 256), np.float32) / 16, np.ones((256, 2), np.float32) / 16)}
    runner.add_adapter(0, other)  # on top of its own
    twin = load_model(adapter, dtype=torch.float32)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.weight += torch.from_numpy(other[0, "q"][1] @ other[0, "q"][0])
    got = run(runner, adapters=np.array([0, 0], np.int32))[0]
    assert apart(got, run(TorchRunner(twin, pages=4))[0]) < 2e-2
    with pytest.raises(ValueError, match="numbers lie between"):
        runner.add_adapter(OWN, other)


@pytest.mark.parametrize("kv", ["f32", "f16", "bf16", "int8"])
def test_formats_of_the_cache(folder: Path, kv: str) -> None:
    check(folder, 2e-2, weights="f32", kv=kv)


def test_what_is_refused(folder: Path) -> None:
    for options, said in (
        ({"weights": "int3"}, "weights 'int3'"), ({"kv": "fp8"}, "kv 'fp8'"), ({"page": 20}, "multiple of 16"),
        ({"pages": 2**40}, "pages|incompatible"),
    ):  # fmt: skip
        with pytest.raises((UserError, TypeError), match=said):
            NativeRunner(folder, **({"pages": 4} | options))
    runner = NativeRunner(folder, pages=4, threads=1)
    one = steps()[0]
    one.lengths = one.lengths + 200
    with pytest.raises(ValueError, match="the model's context is 128"):
        runner.step(one)
    one = steps()[0]
    one.ids = one.ids.astype(np.int64)
    with pytest.raises(ValueError, match="C-contiguous int32"):
        runner.step(one)


def test_damaged_and_foreign_folders(folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    values = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="is missing"):
        NativeRunner(bad, pages=4)
    (bad / "config.json").write_text(json.dumps(values))
    (bad / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(UserError, match="damaged"):
        NativeRunner(bad, pages=4)


def test_torch_is_not_needed() -> None:
    code = (
        "import sys; from criadero import LLM; LLM('cria', runner='native').complete('Hola', max_tokens=2);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
