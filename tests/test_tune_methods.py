"""Every method of `criadero tune`: it learns, repeats to the byte, goes on to the bit, and is opened by others."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from criadero import cli, lora
from criadero.artifact import create, open_artifact, verify
from criadero.checkpoints import load_frozen, load_model
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.run import make
from criadero.train import checkpoint, fast
from criadero.train.optim import Optimizer

IDS = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(3))
pytestmark = pytest.mark.usefixtures("one_torch_thread")
QUICK: dict[str, Any] = {"dtype": "float32", "epochs": 5.0, "batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.1},
    "rslora": {"method": "lora", "rslora": True, "lora_alpha": 8.0},
    "lora_plus": {"method": "lora", "lora_plus": 4.0, "lr": 1e-2},
    "dora": {"method": "dora"},
    "qlora4": {"method": "qlora", "base": "int4"},
    "qlora8": {"method": "qlora", "base": "int8"},
    "full": {"method": "full", "lr": 5e-3},
    "text": {"data": "texts", "train_on": "text", "max_length": 64},
    "text, full": {"data": "texts", "train_on": "text", "max_length": 64, "method": "full", "lr": 5e-3},
    "distil": {"data": "lesson", "base": "student", "method": "full", "lr": 1e-2},
}
CHATS = [name for name in METHODS if name not in ("text", "text, full", "distil")]
if fast.compiled():
    METHODS |= {
        "lora, int8 products": {"base_matmul": "int8"},
        "lora, exact products": {"base_matmul": "exact"},
        "qlora4, exact products": {"method": "qlora", "base": "int4", "base_matmul": "exact"},
        "distil, int8 products": {"data": "lesson", "base": "student", "base_matmul": "int8"},
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, int4 and int8 of it, a student; shop.jsonl, texts/, and a lesson: what the base says to the shop's chats."""
    folder = tmp_path_factory.mktemp("methods")
    for name, changes in (("base", {"intermediate_size": 64}), ("student", {"num_hidden_layers": 1})):
        with create(folder / name, kind="base", config={}) as draft:
            tiny.base(draft.path, **changes)
    for bits in ("int4", "int8"):
        values = {"model": str(folder / "base"), "to": bits, "group": 32, "method": "rtn"}
        make("quantize", values, folder / bits)
    tiny.write_chats(folder / "shop.jsonl", 40)
    (folder / "texts").mkdir()
    for n in range(12):
        (folder / "texts" / f"{n}.txt").write_text(f"Number {n}. " + " ".join(tiny.LINES))
    values = {"teacher": str(folder / "base"), "data": str(folder / "shop.jsonl"), "top_k": 16, "dtype": "float32"}
    make("logits", values, folder / "lesson")
    return folder


def settings(bases: Path, name: str, **more: Any) -> dict[str, Any]:
    values = QUICK | METHODS[name] | more
    return values | {
        "base": str(bases / values.get("base", "base")),
        "data": str(bases / values.get("data", "shop.jsonl")),
    }


def result(folder: Path) -> dict[str, torch.Tensor]:
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.exists() else folder / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(bases: Path) -> Callable[[str], Path]:
    def of(name: str) -> Path:
        out = bases / f"tuned-{name}"
        if not out.exists():
            make("sft", settings(bases, name), out)
        return out

    return of


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model.eval()(IDS)
    return getattr(out, "logits", out).float()


@pytest.mark.parametrize("name", CHATS)
def test_every_method_learns_and_answers(name: str, tuned: Callable[[str], Path]) -> None:
    made = open_artifact(tuned(name))
    assert verify(made.path) == []
    assert made.kind == ("chat" if name == "full" else "adapter")
    losses = {m["slice"]: float(m["value"]) for m in made.metrics if m["metric"] == "loss"}
    assert losses["after"] < losses["before"] - 1
    answer = "".join(LLM(made.path).chat([{"role": "user", "content": "Question 3?"}], max_tokens=40))
    assert answer == "Yes, we are open on Sundays."


@pytest.mark.parametrize("name", METHODS)
def test_same_seed_same_bytes(name: str, bases: Path, tuned: Callable[[str], Path], tmp_path: Path) -> None:
    made = make("sft", settings(bases, name), tmp_path / "again")
    file = "adapter_model.safetensors" if made.kind == "adapter" else "model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tuned(name) / file).read_bytes()


def cut_off(values: dict[str, Any], out: Path, step: int = 4) -> None:
    """A run that Ctrl-C ends after ``step``."""
    original, calls = Optimizer.step, []

    def update(*args: Any, **kwargs: Any) -> float:
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", update)
        with pytest.raises(KeyboardInterrupt):
            make("sft", values, out)
    points = (out.with_name(out.name + ".partial") / "resume").glob("step-*")
    assert [path.name for path in points] == [f"step-{step:08d}"]


def assert_same(made: Path, wanted: Path) -> None:
    lines = (made / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    mine, theirs = result(made), result(wanted)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", METHODS)
def test_cut_off_and_gone_on_with_ends_bit_for_bit_the_same(
    name: str, bases: Path, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    cut_off(settings(bases, name), tmp_path / "again")
    assert_same(make("sft", settings(bases, name), tmp_path / "again").path, tuned(name))


KILLS = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from criadero.run import make
from criadero.train.optim import Optimizer
original, calls, last = Optimizer.step, [], int(sys.argv[1])
def step(*args, **kwargs):
    calls.append(1)
    if len(calls) == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
Optimizer.step = step
make("sft", json.loads(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.parametrize(
    "name", [name if name in ("lora", "qlora4") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_kill_9_in_the_middle_of_tuning_and_again(
    name: str, bases: Path, tuned: Callable[[str], Path], tmp_path: Path
) -> None:
    """Nothing is tidied up by who is killed; what is there is the point after an earlier step, and it is enough."""
    at = random.Random(os.getpid()).randint(2, 9)  # another step in every run of the tests
    values = settings(bases, name, save_minutes=1e-9)
    command = [sys.executable, "-c", KILLS, str(at), json.dumps(values), str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = checkpoint.latest(tmp_path / "again.partial" / "resume")
    assert found is not None
    assert found[0]["step"] == at - 1
    assert not (tmp_path / "again").exists()
    assert_same(make("sft", values, tmp_path / "again").path, tuned(name))


def test_a_disk_that_fills_up_in_a_save_costs_nothing_that_was_saved(
    bases: Path, tuned: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(bases, "lora", save_minutes=1e-9)  # saved after every step
    words = ["tune", values.pop("base"), values.pop("data"), "--out", str(tmp_path / "again")]
    words += [part for name, value in values.items() for part in (f"--{name}", str(value))]
    original, calls, limits = Optimizer.step, [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def update(*args: Any, **kwargs: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (4000, limits[1])
            )  # no file may be larger: the third save breaks off
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Optimizer, "step", update)
        try:
            assert cli._run(words) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("error: ")] == said[-1:]
    assert "again" in said[-1]
    assert "File too large" in said[-1]
    points = tmp_path / "again.partial" / "resume"
    assert sorted(path.name for path in points.iterdir()) == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "again").exists()
    assert cli._run(words) == 0
    assert_same(tmp_path / "again", tuned("lora"))


@pytest.mark.skipif(not fast.compiled(), reason="int8 products need the compiled kernels")
@pytest.mark.parametrize(("began", "went_on"), [(True, False), (False, True)])
def test_auto_goes_on_with_the_products_that_a_run_began_with(
    began: bool, went_on: bool, bases: Path, tuned: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A run is moved to a processor that auto would have chosen otherwise for."""
    values = settings(bases, "lora_plus") | {"lora_plus": 1.0, "lr": QUICK["lr"]}
    monkeypatch.setattr(fast, "int8_is_fast", lambda: began)
    cut_off(values, tmp_path / "again")
    monkeypatch.setattr(fast, "int8_is_fast", lambda: went_on)
    capfd.readouterr()
    made = make("sft", values, tmp_path / "again")
    how = "int8" if began else "exact"
    assert made.passport["step"]["derived"]["base_matmul"] == how
    assert_same(made.path, tuned(f"lora, {how} products"))
    assert "goes on with" not in capfd.readouterr().err


@pytest.mark.skipif(not fast.compiled(), reason="int8 products need the compiled kernels")
def test_products_that_a_run_cannot_go_on_with_are_said(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    values = settings(bases, "lora") | {"lora_dropout": 0.0, "base_matmul": "auto"}
    monkeypatch.setattr(fast, "int8_is_fast", lambda: True)
    cut_off(values, tmp_path / "again")
    monkeypatch.setattr(fast, "obstacle", lambda model: "without compiled kernels")
    capfd.readouterr()
    made = make("sft", values, tmp_path / "again")
    assert made.passport["step"]["derived"]["base_matmul"] == "exact"
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("goes on with") == 1
    assert "goes on with base_matmul exact (before: int8): it will end close to where an unbroken run ends" in said


@pytest.mark.skipif(fast.compiled(), reason="the compiled kernels are here")
def test_int8_products_need_the_compiled_kernels(bases: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base_matmul int8 needs the compiled training kernels"):
        make("sft", settings(bases, "lora_plus", base_matmul="int8"), tmp_path / "x")


# --- LoRA+, DoRA ---


def test_lora_plus_moves_b_faster(bases: Path, tmp_path: Path) -> None:
    """One step of AdamW moves each weight by about its own rate."""
    for name, plus in (("even", 1.0), ("plus", 8.0)):
        values = settings(bases, "lora", lora_dropout=0.0, lora_plus=plus, lr=1e-3, epochs=0.01, warmup=0.0)
        make("sft", values, tmp_path / name)
    even, plus_ = result(tmp_path / "even"), result(tmp_path / "plus")
    for key in even:
        if "lora_B" in key:
            torch.testing.assert_close(plus_[key], even[key] * 8, rtol=1e-3, atol=1e-6)
        else:
            torch.testing.assert_close(plus_[key], even[key])


def test_peft_opens_a_tuned_dora(bases: Path, tuned: Callable[[str], Path]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    twin = transformers.AutoModelForCausalLM.from_pretrained(bases / "base", dtype=torch.float32)
    twin = peft.PeftModel.from_pretrained(twin, tuned("dora"))
    torch.testing.assert_close(logits(twin), logits(load_model(tuned("dora"))), rtol=1e-4, atol=1e-4)


def test_the_engine_says_what_it_cannot_do_beside_a_base(bases: Path, tuned: Callable[[str], Path]) -> None:
    llm = LLM(bases / "base")
    with pytest.raises(UserError, match=r"DoRA.*fold it in with criadero merge"):
        llm.load_adapter("mine", tuned("dora"))


# --- QLoRA ---


@pytest.mark.parametrize("bits", ["int4", "int8"])
def test_the_base_stays_packed_and_gives_the_same_logits(bits: str, bases: Path) -> None:
    frozen = load_frozen(bases / bits, dtype=torch.float32)
    whole = load_model(bases / bits)
    torch.testing.assert_close(logits(frozen), logits(whole), rtol=1e-5, atol=1e-5)
    lora.attach(frozen, rank=2, alpha=4)
    assert {name.rpartition(".")[2] for name, p in frozen.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    size = sum(layer.nbytes for layer in frozen.modules() if isinstance(layer, lora.QuantLinear))
    plain = sum(p.numel() for name, p in whole.named_parameters() if "_proj" in name)
    assert size < plain * {"int4": 0.6, "int8": 1.1}[bits]


def test_qlora_learns_what_lora_learns_on_the_same_numbers(bases: Path, tmp_path: Path) -> None:
    """Packed or written out, the base is the same function, so the adapters agree."""
    make("sft", settings(bases, "qlora4", base_matmul="exact"), tmp_path / "packed")
    make("sft", settings(bases, "qlora4", base_matmul="exact", method="lora"), tmp_path / "plain")
    mine, plain = result(tmp_path / "packed"), result(tmp_path / "plain")
    for key in plain:
        torch.testing.assert_close(mine[key], plain[key], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": "base"}, r"qlora needs a base in 4 or 8 bits, and .*base is not: make one with criadero quantize"),
        ({"merged": True}, "merged writes whole weights"),
        ({"data": "base"}, "this artifact holds no train chats: it is of kind base"),
        ({"lora_plus": 0.0}, "lora_plus must be positive"),
        ({"lora_rank": 17}, "the smallest layer that gets an adapter is 16 wide"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
    ],
    ids=str,
)
def test_what_qlora_cannot_do(values: dict[str, Any], words: str, bases: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        make("sft", settings(bases, "qlora4", **values), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_command_line_takes_a_method(bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tune", str(bases / "int4"), str(bases / "shop.jsonl"), "--method", "qlora", "--epochs", "0.1"]
    assert cli._run([*words, "--dtype", "float32", "--out", str(tmp_path / "x")]) == 0
    assert "qlora on" in capsys.readouterr().err
