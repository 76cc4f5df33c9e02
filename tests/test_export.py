"""export.py: a model in another layout computes the same, keeps its tokenizer and template, and says what it came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from criadero.artifact import create, open_artifact, verify
from criadero.checkpoints import load_config, load_model, template_of, tokenizer_of
from criadero.errors import UserError
from criadero.export import export
from criadero.lora import attach, save_adapter

IDS = torch.arange(1, 60)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A sealed chat model with a licence and a name."""
    with create(tmp_path / "base", kind="chat", name="Tiny", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path, intermediate_size=64)
        draft.model = {"params": 1, "context": 128}
    return tmp_path / "base"


def logits(ref: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(ref, dtype=torch.float32)(IDS)


@pytest.mark.parametrize(("to", "type", "tolerance"), [
    ("hf", None, 0.0), ("hf", "f32", 0.0), ("hf", "bf16", 0.05), ("hf", "f16", 0.01),
    ("gguf", "f32", 1e-5), ("gguf", "f16", 0.01), ("gguf", None, 0.05), ("gguf", "Q4_0", 0.5),
])  # fmt: skip
def test_what_was_exported_is_the_same_model(
    base: Path, tmp_path: Path, to: str, type: str | None, tolerance: float
) -> None:
    made = export(base, to=to, out=tmp_path / "out", type=type)
    assert not isinstance(made, Path)
    assert verify(made.path) == []
    expected = logits(base)
    assert (logits(made.path) - expected).norm() <= tolerance * expected.norm()
    assert load_config(made.path) == load_config(base)
    assert tokenizer_of(made.path).encode("¿Abren? <|end|>") == tiny.tokenizer().encode("¿Abren? <|end|>")
    assert template_of(made.path).source == template_of(base).source
    assert (made.kind, made.passport["licence"]["declared"]) == ("chat", "Apache-2.0")
    [row] = made.inputs
    quantised = to == "gguf" and type in (None, "Q4_0")
    assert (row["relation"], row["id"]) == (
        "quantised_from" if quantised else "converted_from",
        open_artifact(base).id,
    )


def test_one_file(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "m.gguf"
    assert export(base, to="gguf", out=out, type="f32") == out
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
    assert torch.allclose(logits(out), logits(base), atol=1e-4)
    again = export(out, to="hf", out=tmp_path / "back")  # and back from that file
    assert not isinstance(again, Path)
    assert torch.equal(logits(again.path), logits(out))
    assert template_of(again.path).source == template_of(base).source
    with pytest.raises(UserError, match="exists"):
        export(base, to="gguf", out=out)
    export(base, to="gguf", out=out, type="q8_0", overwrite=True)
    with pytest.raises(UserError, match="is a name for --to gguf"):
        export(base, to="hf", out=tmp_path / "x.gguf")


def test_an_adapter_is_exported_on_its_base(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    for _, weight in attach(model, rank=4, alpha=32.0):
        torch.nn.init.normal_(weight, std=0.1)
    with create(tmp_path / "mine", kind="adapter", config={}) as draft:
        draft.add_input("finetune_of", base)
        save_adapter(model, draft.path, base="../base", alpha=32.0, rslora=False, dropout=0.0)
    made = export(tmp_path / "mine", to="hf", out=tmp_path / "whole")
    assert not isinstance(made, Path)
    assert made.kind == "model"
    assert torch.allclose(logits(made.path), logits(tmp_path / "mine"), atol=1e-5)
    assert not torch.allclose(logits(made.path), logits(base), atol=1e-2)


def test_a_base_without_template_stays_one(tmp_path: Path) -> None:
    tiny.base(tmp_path / "plain", template=None)
    for out in ("whole", "m.gguf"):
        export(tmp_path / "plain", to="gguf" if "gguf" in out else "hf", out=tmp_path / out, type="f16")
        with pytest.raises(UserError, match="no chat template"):
            template_of(tmp_path / out)


def test_a_folder_of_several_gguf_files(base: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(base, to="gguf", out=tmp_path / "many" / f"{name}.gguf")
    with pytest.raises(UserError, match=r"holds 2 GGUF files: name one of them, such as .*a\.gguf"):
        load_model(tmp_path / "many")
