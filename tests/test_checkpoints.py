"""What `load_model` takes: bundled names and artifacts, folders, files, adapters on their base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_checkpoints_hf import same
from test_model import distance, make, tokens

from criadero.artifact import create, open_artifact
from criadero.checkpoints import load_config, load_model, save_hf, write_gguf
from criadero.errors import UserError
from criadero.lora import adapters, attach, save_adapter
from criadero.model import Llama


def tuned(base: Llama) -> Llama:
    """The same weights with an adapter that changes something."""
    model = make()
    model.load_state_dict(base.state_dict())
    attach(model, rank=4, alpha=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Llama]:
    """``base`` and ``adapter`` side by side, and the tuned model."""
    base = make()
    save_hf(base, base.config, tmp_path / "base")
    model = tuned(base)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base="../base", alpha=8, rslora=False, dropout=0.0)
    return tmp_path, model


@torch.no_grad()
def test_an_adapter_is_merged_into_its_base(place: tuple[Path, Llama]) -> None:
    folder, model = place
    loaded = load_model(folder / "adapter")
    assert not adapters(loaded)
    assert distance(loaded(tokens()), model(tokens())) < 1e-5
    assert distance(loaded(tokens()), load_model(folder / "base")(tokens())) > 1e-2
    assert load_config(folder / "adapter") == model.config
    assert all(weight.requires_grad for weight in loaded.parameters())
    assert not loaded.training


@torch.no_grad()
def test_peft_computes_the_same(place: tuple[Path, Llama]) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    folder, _ = place
    twin = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", local_files_only=True)
    twin = peft.PeftModel.from_pretrained(twin, folder / "adapter").eval()
    assert distance(load_model(folder / "adapter")(tokens()), twin(tokens()).logits) < 1e-5


def test_an_adapter_without_its_base(place: tuple[Path, Llama]) -> None:
    folder, _ = place
    shutil.rmtree(folder / "base")
    with pytest.raises(
        UserError, match=r"the base of this adapter is not here .*base.*: put it back there, or say in adapter_config"
    ):
        load_model(folder / "adapter")


@pytest.mark.parametrize(
    ("base", "message"),
    [(None, "does not name the base"), (3, "does not name the base"), (".", "names the adapter itself")],
)
def test_an_adapter_that_names_no_base(place: tuple[Path, Llama], base: object, message: str) -> None:
    path = place[0] / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(UserError, match=message):
        load_model(path.parent)


def test_an_adapter_on_an_adapter(place: tuple[Path, Llama]) -> None:
    folder, _ = place
    shutil.copytree(folder / "adapter", folder / "second")
    path = folder / "second" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "../adapter"}))
    with pytest.raises(UserError, match="is an adapter too"):
        load_model(folder / "second")


def test_artifacts_and_files(tmp_path: Path) -> None:
    model = make()
    with create(tmp_path / "sealed", kind="base", config={}) as draft:
        save_hf(model, model.config, draft.path)
    assert same(load_model(open_artifact(tmp_path / "sealed")), model)
    assert same(load_model(str(tmp_path / "sealed")), model)
    write_gguf(model, None, tmp_path / "model.gguf", type="F32")
    assert same(load_model(tmp_path / "model.gguf"), model)
    assert load_model(tmp_path / "model.gguf", dtype=torch.bfloat16).lm_head.weight.dtype == torch.bfloat16


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(tmp_path)
