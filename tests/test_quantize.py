"""The stage quantize: measured before and after, the same bytes again, GPTQ better than rounding, bad input in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LINES, base, write_chats
from tiny import model as tiny_model

from criadero.artifact import open_artifact, sha256_file, verify
from criadero.checkpoints import load_model, load_quantised, read_gguf_quantised
from criadero.cli import main
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.export import export
from criadero.kernels.formats import QuantTensor
from criadero.model import KVCache
from criadero.quantization.gptq import DOWN, QKV, gptq_matrix, inverse_factor
from criadero.quantization.layers import measure
from criadero.quantization.mixed import choose, sensitivity
from criadero.quantization.rounding import round_matrix
from criadero.quantization.text import flat, read_text
from criadero.run import quantize
from criadero.summary import describe

pytestmark = pytest.mark.usefixtures("one_torch_thread")
SIZES = {"hidden_size": 64, "intermediate_size": 96}


def write_text(path: Path, lines: int = 1200, seed: int = 0) -> Path:
    """Documents of sentences in random order: enough to calibrate on."""
    rng = np.random.default_rng(seed)
    rows = [" ".join(LINES[i] for i in rng.integers(len(LINES), size=4)) for _ in range(lines // 4)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small model that has learned the sentences, so that its weights have structure; and text like what it read."""
    folder = tmp_path_factory.mktemp("trained")
    made = base(folder / "m", **SIZES)
    text = write_text(folder / "text.jsonl")
    from criadero.checkpoints import save_hf, tokenizer_of
    from criadero.train.loss import next_token_loss

    model = tiny_model(scale=0.5, **SIZES)
    rows = read_text(text, tokenizer_of(made), None, model.config, tokens=8000, held_out=400, seed=3).calibration
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(40):
        loss, n, _ = next_token_loss(model, rows[step % len(rows)])
        optimizer.zero_grad()
        (loss / n).backward()
        optimizer.step()
    save_hf(model, model.config, made)
    return made, text


# --- GPTQ itself ---


def test_gptq_lowers_the_error_at_the_output() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)  # correlated inputs
    w = torch.randn(48, 64, generator=generator)
    upper = inverse_factor(x.t() @ x / len(x))

    def error(made: QuantTensor) -> float:
        return float((x @ (torch.from_numpy(made.dequantise()) - w).t()).square().mean())

    for bits, group in ((4, 32), (4, 64), (8, 16)):
        assert error(gptq_matrix(w, upper, bits, group)) < 0.7 * error(round_matrix(w, bits, group))


def test_gptq_follows_the_paper_column_by_column() -> None:
    """The plain algorithm of section 3.2, no blocks, no Cholesky: the inverse is updated by elimination after each column."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 160, generator=generator, dtype=torch.float64)
    w = torch.randn(5, 160, generator=generator)
    hessian = x.t() @ x / len(x)
    made = gptq_matrix(w, inverse_factor(hessian.clone().float()), 4, 32)
    damped = hessian.float().double() + torch.eye(160) * 0.01 * hessian.diagonal().mean()
    inverse, left = torch.linalg.inv(damped), w.double().clone()
    scales = torch.from_numpy(made.scales).double()
    want = torch.zeros(5, 160)
    for i in range(160):
        scale = scales[:, i // 32]
        q = (left[:, i] / scale).round().clamp(-8, 7)
        want[:, i] = q * scale
        error = (left[:, i] - want[:, i]) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    same = torch.from_numpy(made.dequantise()) == want
    assert same.float().mean() > 0.995  # float32 against float64: a tie may fall the other way


def test_inputs_that_never_come_and_singular_hessians() -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 0
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    made = gptq_matrix(w, inverse_factor(x.t() @ x), 4, 32)
    assert np.isfinite(made.dequantise()).all()
    with pytest.raises(UserError, match="not finite"):
        inverse_factor(torch.full((4, 4), torch.nan))


def test_layer_by_layer_is_the_model(trained: tuple[Path, Path]) -> None:
    from criadero.checkpoints import tokenizer_of
    from criadero.train.loss import next_token_loss

    folder, text = trained
    model = load_model(folder)
    batches = flat(
        read_text(text, tokenizer_of(folder), None, model.config, tokens=2000, held_out=500, seed=1).held_out
    )
    want = [float(next_token_loss(model, batch)[0].detach()) for batch in batches]
    assert measure(model.state_dict(), model.config, batches) == pytest.approx(want, rel=1e-5)


def test_gptq_beats_rounding_on_held_out_text(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = trained
    rises = {}
    for method in ("rtn", "gptq"):
        made = quantize(
            folder, "int4", out=tmp_path / method, method=method, calibration=str(text), group=0, table="keep"
        )
        loss = {row["metric"]: float(row["value"]) for row in made.metrics if row.get("slice") == "all"}
        rises[method] = loss["loss"] - loss["loss_before"]
    assert 0 < rises["gptq"] < 0.8 * rises["rtn"]


def test_sensitivity_is_the_loss_of_one_unit_alone(trained: tuple[Path, Path]) -> None:
    from criadero.checkpoints import tokenizer_of

    folder, text = trained
    model = load_model(folder)
    state = model.state_dict()
    batches = read_text(text, tokenizer_of(folder), None, model.config, tokens=2000, held_out=500, seed=1).calibration
    schemes = {name: (4, 32) for name in state if "proj" in name}
    rises = sensitivity(state, model.config, batches, schemes)
    assert len(rises) == 4 * model.config.num_hidden_layers
    before = sum(measure(state, model.config, batches))
    for unit, names in (((0, "qkv"), QKV), ((1, "down"), DOWN)):
        changed = dict(state)
        for name in names:
            full = f"model.layers.{unit[0]}.{name}"
            changed[full] = round_matrix(state[full], 4, 32)
        assert rises[unit] == pytest.approx(sum(measure(changed, model.config, batches)) - before, rel=1e-2, abs=0.05)
    plain = 4.5
    kept, raised = choose(rises, state, schemes, plain)
    assert not raised
    assert kept == schemes
    kept, raised = choose(rises, state, schemes, plain + 1)
    sizes = {name: state[name].numel() for name in schemes}
    assert sum(sizes[n] * (bits + 0.5) for n, (bits, _) in kept.items()) / sum(sizes.values()) <= plain + 1
    assert raised
    assert len({kept[f"model.layers.0.{name}"] for name in QKV}) == 1  # vLLM fuses them: one format


# --- the artifact ---


def test_the_artifact_says_what_was_measured(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = trained
    made = quantize(folder, out=tmp_path / "small", calibration=str(text))
    assert made.kind == "quantised"
    assert not verify(made.path)
    assert [row["relation"] for row in made.inputs] == ["quantised_from", "trained_on"]
    names = {row["metric"] for row in made.metrics}
    assert {"loss", "loss_before", "perplexity", "bits_per_byte", "bits_per_weight", "weight_bytes_stored"} <= names
    about = (made.path / "README.md").read_text(encoding="utf-8")
    assert "| all |" in about
    assert str(tmp_path) not in about
    assert "quantised" in describe(made)
    state = load_quantised(made.path)
    assert {w.bits for n, w in state.items() if isinstance(w, QuantTensor) and "proj" in n} == {4}
    table = state["model.embed_tokens.weight"]
    assert isinstance(table, QuantTensor)
    assert table.bits == 8
    # the loss in the passport is that of the model in the folder
    from criadero.checkpoints import tokenizer_of

    model = load_model(made.path)
    held = flat(
        read_text(text, tokenizer_of(folder), None, model.config, tokens=32768, held_out=16384, seed=1).held_out
    )
    total = next(row for row in made.metrics if row.get("slice") == "all" and row["metric"] == "loss")
    loss = sum(measure(model.state_dict(), model.config, held)) / int(total["n"])
    assert loss == pytest.approx(float(total["value"]), rel=1e-5)


def test_the_same_bytes_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = trained
    hashes = set()
    for name in ("one", "two"):
        made = quantize(folder, out=tmp_path / name, calibration=str(text), mixed=True)
        hashes.add((sha256_file(made.path / "model.safetensors"), sha256_file(made.path / "config.json")))
    assert len(hashes) == 1
    assert made.passport["step"]["raised"]
    bits = {w.bits for n, w in load_quantised(made.path).items() if isinstance(w, QuantTensor) and "proj" in n}
    assert bits == {4, 8}


def test_it_speaks_and_exports_without_rounding_again(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, text = trained
    made = quantize(folder, out=tmp_path / "small", calibration=str(text))
    model = load_model(made.path)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        want = model(ids, attend=KVCache(model.config, 1, 64, torch.float32))
    assert torch.isfinite(want).all()
    answer = list(LLM(made.path).chat([{"role": "user", "content": "Question?"}], max_tokens=8, temperature=0))
    assert isinstance("".join(answer), str)
    export(made.path, to="gguf", out=tmp_path / "small.gguf")
    _, state, _ = read_gguf_quantised(tmp_path / "small.gguf")
    for name, weight in load_quantised(made.path).items():
        other = state[name]
        if isinstance(weight, QuantTensor):
            assert isinstance(other, QuantTensor)
            assert other.bits == weight.bits
            assert (other.dequantise() == weight.dequantise()).all(), name
    sealed = export(made.path, to="gguf", out=tmp_path / "sealed")
    assert sealed.inputs[0]["relation"] == "converted_from"
    assert (tmp_path / "small.gguf").stat().st_size < 0.4 * (folder / "model.safetensors").stat().st_size
    export(made.path, to="hf", type="bf16", out=tmp_path / "wide")
    assert load_model(tmp_path / "wide").config == model.config


def test_int8_and_kept_weights(trained: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = trained
    made = quantize(folder, "int8", out=tmp_path / "m8", keep=("down_proj", "*.layers.0.self_attn.*"), table="packed")
    state = load_quantised(made.path)
    kinds = {name: isinstance(weight, QuantTensor) for name, weight in state.items() if len(weight.shape) == 2}
    assert not kinds["model.layers.1.mlp.down_proj.weight"]
    assert not kinds["model.layers.0.self_attn.q_proj.weight"]
    assert kinds["model.layers.1.self_attn.q_proj.weight"]
    assert kinds["model.embed_tokens.weight"]
    assert "Only Criadero opens it" in (made.path / "README.md").read_text(encoding="utf-8")
    assert not [row for row in made.metrics if row["suite"] == "held_out"]  # no text was given, and it says so
    assert "not measured" in (made.path / "README.md").read_text(encoding="utf-8")


def test_an_adapter_is_merged_and_its_data_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from criadero.run import tune

    folder = base(tmp_path / "m", **SIZES)
    chats = write_chats(tmp_path / "chats.jsonl", 200)
    adapter = tune(folder, chats, out=tmp_path / "adapter", epochs=1.0, dtype="float32")
    made = quantize(adapter, out=tmp_path / "small", method="rtn")
    said = capsys.readouterr().err
    assert "merged into its base" in said
    assert "which the passport names" in said
    assert [row["relation"] for row in made.inputs] == ["quantised_from", "evaluated_on"]
    assert {row["slice"] for row in made.metrics if row["suite"] == "held_out"} == {"und chat", "all"}


# --- bad input ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "int3"], "int3"),
        (["--group", "40"], "--group 40 does not divide the rows of model.layers.0"),
        (["--group", "-1"], "group is -1"),
        (["--to", "int8", "--mixed"], "mixed"),
        (["--bits", "5"], "--mixed"),
        (["--mixed", "--bits", "3", "--calibration", "text.jsonl"], "less than plain int4"),
        (["--method", "gptq"], "give --calibration"),
        (["--mixed"], "give --calibration"),
        (["--keep", "nothing_like_it"], "no weight fits 'nothing_like_it'"),
        (["--keep", "*"], "nothing to quantise"),
        (["--calibration", "missing.jsonl"], "missing.jsonl"),
        (["--calibration", "empty.jsonl"], "empty"),
        (["--calibration", "short.jsonl"], "only"),
        (["--calibration", "chats.jsonl"], "no chat template"),
        (["--calibration_tokens", "0"], "calibration_tokens"),
    ],
)
def test_bad_input_is_one_line(
    flags: list[str], message: str, trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "m", template=None, **SIZES)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "short.jsonl").write_text('{"text": "Too short."}\n')
    (tmp_path / "text.jsonl").write_bytes(trained[1].read_bytes())
    write_chats(tmp_path / "chats.jsonl")
    with pytest.raises(SystemExit) as ended:
        main(["quantize", "m", *flags, "--out", "small"])
    assert ended.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert message in said
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "small.partial").exists()


def test_what_is_quantised_already_is_refused(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    made = quantize(trained[0], "int8", out=tmp_path / "m8")
    with pytest.raises(UserError, match="quantised already"):
        quantize(made, out=tmp_path / "again")
    export(trained[0], to="gguf", type="q8_0", out=tmp_path / "m.gguf")
    with pytest.raises(UserError, match="quantised already"):
        quantize(tmp_path / "m.gguf", out=tmp_path / "again")
    export(trained[0], to="gguf", type="f16", out=tmp_path / "f16.gguf")
    assert quantize(tmp_path / "f16.gguf", out=tmp_path / "fine").kind == "quantised"


def test_a_tokens_artifact_of_another_vocabulary_is_refused(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    from criadero.tokenizer import train_bpe

    folder = tmp_path / "tokens"
    folder.mkdir()
    train_bpe(["other words here"] * 3, 270, ("<|bos|>", "<|eos|>", "<|pad|>")).save(folder)
    (folder / "tokens.json").write_text("{}")
    with pytest.raises(UserError, match="not of the model's vocabulary"):
        quantize(trained[0], out=tmp_path / "small", calibration=str(folder))


@pytest.mark.slow
def test_killed_at_any_moment_nothing_half_made_is_left(tmp_path: Path, trained: tuple[Path, Path]) -> None:
    folder, text = trained
    command = [
        sys.executable,
        "-m",
        "criadero.cli",
        "quantize",
        str(folder),
        "--calibration",
        str(text),
        "--out",
        "small",
    ]
    for seconds in (4.0, 6.0):
        running = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        running.kill()
        running.wait()
        if (tmp_path / "small").exists():
            assert not verify(tmp_path / "small")
            break
    done = subprocess.run([*command, "--overwrite"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not verify(tmp_path / "small")
    assert not (tmp_path / "small.partial").exists()


def test_cria_at_four_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model, rounded without text: it opens, is small, and its words are still words."""
    monkeypatch.chdir(tmp_path)  # away from what it was trained on
    made = quantize("cria-chat", out=tmp_path / "small", method="rtn")
    size = {row["metric"]: float(row["value"]) for row in open_artifact(made).metrics}
    assert size["bits_per_weight"] < 5.6
    model, small = load_model("cria-chat", dtype=torch.float32), load_model(made.path)
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        one, two = (torch.log_softmax(m(ids), -1) for m in (model, small))
    assert float((one.exp() * (one - two)).sum(-1).mean()) < 0.1  # nats of divergence
