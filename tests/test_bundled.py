"""The models that come with the package: whole, small, described, and readable by others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from criadero.artifact import bundled_models, open_artifact, resolve, verify
from criadero.checkpoints import load_model
from criadero.engine.llm import LLM

MODELS = ("cria", "cria-chat")
NOT_SHAREABLE = ("NC", "ND", "unknown", "None")


def test_what_is_bundled_fits_the_package() -> None:
    assert set(MODELS) <= set(bundled_models())
    folder = resolve("cria").parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 64 * 2**20
    assert not list(folder.rglob("resume"))


@pytest.mark.parametrize("name", MODELS)
def test_passport_holds(name: str) -> None:
    artifact = open_artifact(name)
    assert artifact.name == name
    assert verify(artifact.path) == []
    assert artifact.passport["licence"]["declared"] == "CC-BY-SA-4.0"
    assert set(artifact.passport["step"]["code"]) == {
        "package",
        "git",
        "dirty",
    }  # uncommitted changes are told, not hidden
    assert {"trained_on"} <= {one["relation"] for one in artifact.inputs}


def test_every_source_of_cria_may_be_given_away() -> None:
    rows = open_artifact("cria").sources()
    assert len(rows) >= 10
    for row in rows:
        assert row["licence"], row
        assert not any(mark in row["licence"].split("-") for mark in NOT_SHAREABLE), row
        assert row["url"], row
        assert row["tokens"] > 0, row


def test_the_chat_model_comes_from_the_base() -> None:
    base, chat = open_artifact("cria"), open_artifact("cria-chat")
    assert [one["id"] for one in chat.inputs if one["relation"] == "finetune_of"] == [base.id]
    assert "cria" in chat.lineage()


@pytest.mark.parametrize("name", MODELS)
def test_card_names_sources_and_figures(name: str) -> None:
    text = (open_artifact(name).path / "README.md").read_text(encoding="utf-8")
    assert "Cannot: know facts" in text
    if name == "cria":
        assert all(row["name"] in text for row in open_artifact(name).sources())
        assert "bits per byte" in text


def test_nothing_in_the_passports_tells_about_the_machine() -> None:
    for name in MODELS:
        for file in ("passport.json", "lineage.jsonl"):
            text = (open_artifact(name).path / file).read_text(encoding="utf-8")
            assert '"/' not in text.replace('"/"', ""), f"{name}/{file} holds an absolute path"


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_it_alike(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    path: Path = open_artifact(name).path
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ours = load_model(name, dtype=torch.float32)
    messages = [{"role": "user", "content": "Hola, ¿cómo estás?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        assert torch.allclose(ours(ids["input_ids"]), theirs(**ids).logits, atol=1e-4)


def test_it_answers_in_the_language_of_the_question() -> None:
    llm = LLM("cria-chat")
    spanish = "".join(llm.chat([{"role": "user", "content": "Hola, ¿cómo te llamas?"}], max_tokens=40))
    english = "".join(llm.chat([{"role": "user", "content": "Hello, what is your name?"}], max_tokens=40))
    assert "Cria" in spanish
    assert "Cria" in english
    assert {"me", "soy", "llamo", "mi", "nombre"} & set(spanish.lower().replace(",", " ").replace(".", " ").split())
    assert {"i", "am", "my", "name", "i'm"} & set(english.lower().replace(",", " ").replace(".", " ").split())
