"""Several adapters beside one base, each request with its own, against the base with one merged into it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from engine_cases import PAGE, nothing_is_left
from safetensors.torch import load_file, save_file

from criadero import artifact
from criadero.checkpoints import load_model
from criadero.engine.adapters import Adapters
from criadero.engine.core import Engine, run
from criadero.engine.generate import generate
from criadero.engine.llm import LLM
from criadero.engine.request import Request, SamplingParams
from criadero.engine.runner import Runner, native_available
from criadero.engine.torch_runner import TorchRunner
from criadero.errors import UserError
from criadero.export import export
from criadero.lora import adapters, attach, save_adapter, train_rows
from criadero.run import make as make_stage
from criadero.train.sft import SftRecipe, sft

RUNNERS = [
    "torch",
    pytest.param(
        "native", marks=pytest.mark.skipif(not native_available(), reason="the compiled kernels are not built")
    ),
]
PROMPT = [5, 80, 199, 20] * 6
FREE = SamplingParams(max_tokens=20, ignore_eos=True)


def make(
    folder: Path, base: Path, seed: int, *, rank: int = 3, targets: tuple[str, ...] = ("q_proj", "o_proj", "down_proj"),
    dora: bool = False, rows: Sequence[int] = (),
) -> Path:  # fmt: skip
    """A random adapter that matters; ``rows`` of the tables learn too."""
    model = load_model(base)
    attach(model, rank=rank, alpha=8, targets=targets, seed=seed, dora=dora)
    if rows:
        train_rows(model, rows)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    folder.mkdir()
    save_adapter(model, folder, base=str(base), alpha=8, rslora=False, dropout=0.0)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = tiny.base(root / "base")
    return {
        "base": base,
        "one": make(root / "one", base, 1),
        "two": make(root / "two", base, 2, rank=5, targets=("k_proj", "v_proj", "gate_proj", "up_proj")),
        "all": make(root / "all", base, 3, rank=2, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    }  # fmt: skip


def engine(kind: str, places: dict[str, Path]) -> Engine:
    runner: Runner
    if kind == "torch":
        runner = TorchRunner(load_model(places["base"], dtype=torch.float64), pages=60, page=PAGE)
    else:
        from criadero.engine.native import NativeRunner

        runner = NativeRunner(places["base"], pages=60, page=PAGE, threads=1, weights="float32", kv="float32")
    return Engine(runner, tiny.tokenizer(), adapters=Adapters(runner, places["base"]))


def tokens(one: Engine, *names: str | None, **fields: Any) -> list[list[int]]:
    found = run(one, [Request(PROMPT, FREE, adapter=name, **fields) for name in names])
    return [[token for output in outputs for token in output.ids] for outputs in found]


@pytest.mark.parametrize("kind", RUNNERS)
def test_each_request_has_its_own_and_all_are_computed_together(kind: str, places: dict[str, Path]) -> None:
    one = engine(kind, places)
    for name in ("one", "two", "all"):
        one.load_adapter(name, str(places[name]))
    got = tokens(one, None, "one", "two", "all", "one")
    wanted = [
        list(generate(load_model(places[n], dtype=torch.float64), PROMPT, FREE))
        for n in ("base", "one", "two", "all", "one")
    ]
    assert got == wanted
    assert len({tuple(ids) for ids in got}) == 4
    assert tokens(one, "two", "one", None, "all") == [wanted[n] for n in (2, 1, 0, 3)]  # now from the cache
    one.unload_adapter("one")
    assert one.adapters.names() == ["all", "two"]
    one.load_adapter("one", str(places["two"]))  # another under the same name: nothing of the first is reused
    assert tokens(one, "one", None) == [wanted[2], wanted[0]]
    nothing_is_left(one)


def test_an_adapter_in_use_is_not_unloaded_but_may_be_drained(places: dict[str, Path]) -> None:
    one = engine("torch", places)
    one.load_adapter("one", str(places["one"]))
    one.add(Request(PROMPT, FREE, adapter="one"))
    one.step()
    with pytest.raises(UserError, match="adapter 'one' is used by 1 request: wait for their end, or drain it"):
        one.unload_adapter("one")
    one.unload_adapter("one", drain=True)
    assert one.adapters.names() == []
    with pytest.raises(UserError, match="there is no adapter 'one'; loaded: none"):
        one.add(Request(PROMPT, FREE, adapter="one"))
    with pytest.raises(UserError, match="loaded already"):  # its place is not free yet
        one.load_adapter("one", str(places["one"]))
    while one.busy:
        one.step()
    one.load_adapter("one", str(places["two"]))
    for refused in (Request([], FREE, adapter="one"), Request([999], FREE, adapter="one")):
        with pytest.raises(UserError):
            one.add(refused)
    one.unload_adapter("one")  # a request that was refused holds nothing


def test_what_is_no_adapter_of_this_base(places: dict[str, Path], tmp_path: Path) -> None:
    one = engine("torch", places)

    def refused(folder: Path, message: str, name: str = "x") -> None:
        with pytest.raises(UserError, match=message):
            one.load_adapter(name, str(folder))
        assert one.adapters.names() == []

    refused(places["base"], "not an adapter: it has no adapter_config.json")
    refused(tmp_path / "nowhere", "nowhere")
    refused(places["one"], "adapter name '../x'", name="../x")
    other = tiny.base(tmp_path / "other", hidden_size=48, head_dim=12)
    refused(make(tmp_path / "wrong", other, 1), "this adapter is for another base model")
    for folder, what in (
        (make(tmp_path / "dora", places["base"], 1, dora=True), r"scales the base's answer \(DoRA\)"),
        (make(tmp_path / "rows", places["base"], 1, rows=[5, 80]), "brings new tokens"),
    ):
        (folder / "adapter_model.safetensors").unlink()  # it is said before anything of it is read
        refused(folder, f"this adapter {what}, which cannot be done beside the base .* criadero merge {folder}")
    copy = shutil.copytree(places["one"], tmp_path / "copy")
    (copy / "adapter_config.json").write_text("{")
    refused(copy, "not a readable adapter")
    shutil.copy(places["one"] / "adapter_config.json", copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    spoilt = {name: torch.full_like(value, torch.nan) for name, value in tensors.items()}
    save_file(spoilt, copy / "adapter_model.safetensors")
    refused(copy, "holds NaN or infinity")
    with pytest.raises(UserError, match="there is no adapter 'x'"):
        one.unload_adapter("x")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["sealed", "folder", "gguf"])
def test_weights_that_were_exchanged_at_the_same_place_are_noticed(tmp_path: Path, form: str) -> None:
    """A base without a passport has no id, and one with a passport keeps its id when somebody writes into it."""
    base = tmp_path / ("base.gguf" if form == "gguf" else "base")
    if form == "sealed":
        with artifact.create(base, kind="base", config={}) as draft:
            tiny.base(draft.path)
    for n in (1, 0):  # the other one first
        folder = tiny.base(tmp_path / f"folder{n}", seed=n)
        if form == "gguf":
            export(str(folder), to="gguf", out=tmp_path / f"base{n}.gguf", type="f32")
    if form == "folder":
        shutil.copytree(tmp_path / "folder0", base)
    if form == "gguf":
        shutil.copy(tmp_path / "base0.gguf", base)
    data = str(tiny.write_chats(tmp_path / "chats.jsonl"))
    made = sft(SftRecipe(base=str(base), data=data, epochs=1.0, dtype="float32"), tmp_path / "tuned")
    assert load_model(made.path).config.vocab_size
    if form == "gguf":
        shutil.copy(tmp_path / "base1.gguf", base)
    else:
        shutil.copy(tmp_path / "folder1" / "model.safetensors", base / "model.safetensors")
    words = "tuned: this adapter was made on other weights than .*base.* has now: bring those back, or tune again"
    with pytest.raises(UserError, match=words):
        load_model(made.path)
    with pytest.raises(UserError, match=words):
        LLM(base, runner="torch").load_adapter("tuned", made.path)
    with pytest.raises(UserError, match=words):
        make_stage("merge", {"models": [str(made.path)]}, tmp_path / "whole")
    with pytest.raises(UserError, match=words):
        export(str(made.path), to="gguf", out=tmp_path / "whole.gguf", type="f32")
    assert not list(tmp_path.glob("whole*"))


def test_a_sealed_adapter_belongs_to_its_base(tmp_path: Path) -> None:
    for n in (0, 1):
        with artifact.create(tmp_path / f"base{n}", kind="base", config={"n": n}) as draft:
            tiny.base(draft.path, seed=n)
    recipe = SftRecipe(
        base=str(tmp_path / "base0"), data=str(tiny.write_chats(tmp_path / "chats.jsonl")), epochs=1.0, licence="MIT"
    )
    made = sft(recipe, tmp_path / "tuned")
    chat: Any = [{"role": "user", "content": "Question 3?"}]
    llm = LLM(tmp_path / "base0", runner="torch")
    llm.load_adapter("tuned", made.path)
    merged = LLM(made.path, runner="torch")
    assert llm.answer(chat, adapter="tuned", max_tokens=20).ids == merged.answer(chat, max_tokens=20).ids
    with pytest.raises(UserError, match="was made on another base"):
        LLM(tmp_path / "base1", runner="torch").load_adapter("tuned", made.path)
    with pytest.raises(UserError, match="is an adapter merged on its base"):
        merged.load_adapter("again", made.path)
    assert json.loads((made.path / "adapter_config.json").read_text())["r"] > 0
