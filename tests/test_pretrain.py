"""Pretraining end to end on a tiny text: the artifact, its figures, and what is refused before it starts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from criadero import cli
from criadero.artifact import create, open_artifact, verify
from criadero.chat import builtin_template
from criadero.checkpoints import load_model, load_tokenizer
from criadero.errors import UserError
from criadero.model import Llama
from criadero.recipe import parse
from criadero.train import checkpoint, memory, pretrain
from criadero.train.batches import TokenFile, held_out_batches
from criadero.train.pretrain import Mix, PretrainRecipe

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "context": 32,
}  # fmt: skip
QUICK: dict[str, Any] = SHAPE | {
    "tokens": 256 * 30, "batch_tokens": 256, "micro_tokens": 128, "dtype": "float32", "lr": 1e-2, "eval_every": 10,
}  # fmt: skip


def write_tokens(folder: Path) -> None:
    """What `criadero data pack` leaves: two languages, documents between bos and eos, and the tokenizer."""
    words = tiny.tokenizer()
    sources = [{"name": "shop", "lang": "en", "kind": "text"}, {"name": "tienda", "lang": "es", "kind": "text"}]
    for split, repeats in (("train", 12), ("held_out", 2)):
        ids: list[int] = []
        docs = []
        for n in range(repeats):
            for i, line in enumerate(tiny.LINES):
                start = len(ids)
                ids += words.encode(line + f" {n}", bos=True, eos=True)
                docs.append((start, len(ids), int(i in (1, 3))))
        (folder / f"{split}.bin").write_bytes(np.asarray(ids, "<u2").tobytes())
        np.save(folder / f"{split}.docs.npy", np.asarray(docs, np.uint64))
    about = {"dtype": "uint16", "vocab_size": words.vocab_size, "sources": sources}
    (folder / "tokens.json").write_text(json.dumps(about))
    words.save(folder, chat_template=builtin_template("criadero").source)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "tokens"
    with create(out, kind="tokens", config={}) as draft:
        write_tokens(draft.path)
        draft.data["by_source"] = [
            {"name": "shop", "licence": "CC0-1.0", "documents": 36},
            {"name": "tienda", "licence": "CC-BY-4.0", "documents": 24},
        ]
    return out


def recipe(data: Path, **changes: Any) -> PretrainRecipe:
    return parse(PretrainRecipe, {"data": str(data)} | QUICK | changes, where="test")


@pytest.fixture(scope="module")
def made(tokens: Path) -> Path:
    mix = (Mix("tienda", times=2.0, anneal=1.0),)
    return pretrain.pretrain(dataclasses.replace(recipe(tokens), mix=mix), tokens.parent / "base").path


def test_a_base_is_sealed_and_says_what_it_was_made_of(made: Path, tokens: Path) -> None:
    artifact = open_artifact(made)
    assert verify(made) == []
    assert artifact.kind == "base"
    assert {row["path"] for row in artifact.files} >= {
        "model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl", "curves.svg",
    }  # fmt: skip
    assert [(row["relation"], row["id"]) for row in artifact.inputs] == [("trained_on", open_artifact(tokens).id)]
    rows = {row["name"]: row for row in artifact.sources()}
    assert rows["shop"]["licence"] == "CC0-1.0"
    assert (rows["tienda"]["times"], rows["tienda"]["anneal"]) == ("2.0", "1.0")
    assert artifact.passport["model"]["params"] == sum(p.numel() for p in load_model(made).parameters())
    assert artifact.passport["step"]["tokens"] == 256 * 30
    assert artifact.passport["step"]["seeds"] == {"seed": 1}


def test_it_learns_and_the_figures_are_by_group(made: Path) -> None:
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert [line["step"] for line in lines if "held_out" in line] == [10, 20, 30]
    metrics = {(m["metric"], m["slice"]): float(m["value"]) for m in open_artifact(made).metrics}
    assert {slice for _, slice in metrics} == {"en text", "es text"}
    assert lines[-1]["held_out"]["es text"]["loss"] == pytest.approx(metrics["loss", "es text"], abs=1e-6)
    assert lines[-1]["held_out"]["es text"]["loss"] < lines[9]["held_out"]["es text"]["loss"]


def test_bits_per_byte_equal_the_cost_of_each_documents_text(made: Path, tokens: Path) -> None:
    """Each held-out document scored alone: -log2 p of all its tokens, over the bytes of its text."""
    model, words = load_model(made), load_tokenizer(made)
    file = TokenFile.open(tokens, "held_out")
    groups = held_out_batches(file, length=128, rows=2, dtype=torch.float32, max_tokens=10**6)
    scores = pretrain.evaluate(model, groups, pretrain.text_bytes(words))
    bits, count = {"en text": 0.0, "es text": 0.0}, {"en text": 0, "es text": 0}
    for start, end, source in file.docs.astype(int):
        ids = torch.tensor(file.ids[start:end].astype(np.int64))
        with torch.no_grad():
            log_p = torch.log_softmax(model(ids[None])[0, :-1], -1).gather(1, ids[1:, None]).sum()
        group = ("en text", "es text")[source]
        bits[group] -= float(log_p) / math.log(2)
        count[group] += len(words.decode_bytes(ids.tolist()))  # the text alone: "<|eos|>" is no text
    for group in bits:
        assert scores[group]["bits_per_byte"] == pytest.approx(bits[group] / count[group], rel=1e-5)


def test_transformers_opens_it_with_equal_logits(made: Path) -> None:
    transformers = pytest.importorskip("transformers")
    twin = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    ids = torch.tensor([tiny.tokenizer().encode("The shop opens at nine", bos=True)])
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, load_model(made)(ids), rtol=1e-4, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(made)
    assert words("The shop opens at nine")["input_ids"] == ids[0].tolist()


def test_killed_and_gone_on_with_it_ends_as_if_unbroken(
    made: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = dataclasses.replace(recipe(tokens), mix=(Mix("tienda", times=2.0, anneal=1.0),))
    original, saves = checkpoint.save, []

    def save(*args: Any, **kwargs: Any) -> Path:
        saves.append(original(*args, **kwargs))
        if len(saves) == 24:  # in the decay, where another mix is read
            raise KeyboardInterrupt
        return saves[-1]

    monkeypatch.setattr(checkpoint, "save", save)
    changed = dataclasses.replace(plan, save_minutes=1e-9)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(changed, tmp_path / "base")
    assert not (tmp_path / "base").exists()
    assert (tmp_path / "base.partial" / "resume").is_dir()
    again = pretrain.pretrain(changed, tmp_path / "base")
    assert (again.path / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    values = [[(m["slice"], m["value"]) for m in open_artifact(path).metrics] for path in (again.path, made)]
    assert values[0] == values[1]
    steps = [json.loads(line)["step"] for line in (again.path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_it_can_go_on_from_a_base(made: Path, tokens: Path, tmp_path: Path) -> None:
    more = pretrain.pretrain(recipe(tokens, base=str(made), tokens=512, lr=1e-3), tmp_path / "more")
    assert {row["relation"] for row in more.inputs} == {"trained_on", "finetune_of"}
    first = json.loads((more.path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] < 4  # it began from what the base knew
    with pytest.raises(UserError, match=r"context is 64, but .* was made for 32; lower context"):
        pretrain.pretrain(recipe(tokens, base=str(made), context=64), tmp_path / "x")
    from criadero.tokenizer import train_bpe

    train_bpe(["otra cosa muy distinta " * 3, *tiny.LINES[::-1]], 300).save(tmp_path / "strange")
    strange = tiny.base(tmp_path / "strange2", max_position_embeddings=32)
    for file in (tmp_path / "strange").iterdir():
        (strange / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="its tokens are not of the vocabulary of"):
        pretrain.pretrain(recipe(tokens, base=str(strange)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be positive, not 0"),
        ({"context": -1}, "context must be positive"),
        ({"lr": 0}, "lr must lie between 0 and 1, not 0: nothing would be learned"),
        ({"lr": -1e-3}, "lr must lie between 0 and 1"),
        ({"lr": 7}, "lr must lie between 0 and 1"),
        ({"warmup": 1.5}, "warmup must be between 0 and 1"),
        ({"decay": -0.1}, "decay must be between 0 and 1"),
        ({"warmup": 0.6, "decay": 0.6}, "together at most 1"),
        ({"eval_every": -1}, "eval_every must be 0 or more"),
        ({"num_key_value_heads": 3}, "num_attention_heads (4) must be a multiple of num_key_value_heads (3)"),
        ({"context": 100_000}, "does not fill one row of 100000"),
        ({"hiden_size": 64}, "did you mean"),
        ({"data": "nowhere"}, "no such"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    values = {"data": tokens} | QUICK | {"micro_tokens": 32} | changes
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert cli._run(["pretrain", *words, "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert message in said.splitlines()[-1]
    assert said.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_a_mix_names_sources_that_are_there(tokens: Path, tmp_path: Path) -> None:
    for mix, message in (
        (Mix("tiendas"), "mix names a source 'tiendas' that the data lacks; it has shop, tienda"),
        (Mix("tienda", times=-1.0), "times and anneal of tienda must not be negative"),
        (Mix("tienda", anneal=-1.0), "times and anneal of tienda must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            pretrain.pretrain(dataclasses.replace(recipe(tokens), mix=(mix,)), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_sources_left_out_are_never_read(tokens: Path) -> None:
    file = TokenFile.open(tokens, "train")
    plan = dataclasses.replace(recipe(tokens), mix=(Mix("shop", times=0.0, anneal=3.0),))
    stable, falling = (
        pretrain._batches(plan, file, 2, torch.float32, "cpu", annealing=annealing) for annealing in (False, True)
    )
    spanish = {tuple(file.ids[s:e].tolist()) for s, e, source in file.docs.astype(int) if source == 1}
    starts = {ids[:6] for ids in spanish}
    bos = tiny.tokenizer().bos_id

    def documents(batches: Any) -> set[tuple[int, ...]]:
        found = set()
        for step in range(batches.rows_per_epoch // 2):
            for row in batches(step).ids.tolist():
                found |= {tuple(row[i : i + 6]) for i, token in enumerate(row[:-5]) if token == bos}
        return found

    assert documents(stable) <= starts
    assert not documents(falling) <= starts


def test_too_little_memory_is_said_before_the_training(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 2**20)
    with pytest.raises(UserError, match=r"needs about .* GiB of memory and 0.0 GiB are free"):
        pretrain.pretrain(recipe(tokens), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_is_given_every_step(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = pytest.importorskip("tensorboardX")
    shown: list[tuple[str, int]] = []
    monkeypatch.setattr(board.SummaryWriter, "add_scalar", lambda self, name, value, step: shown.append((name, step)))
    pretrain.pretrain(recipe(tokens, tokens=256 * 3, track="tensorboard"), tmp_path / "x")
    assert [step for name, step in shown if name == "loss"] == [1, 2, 3]


def test_the_seed_decides(tokens: Path) -> None:
    one, two, other = (Llama(tiny.config()) for _ in range(3))
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        model.initialise(seed)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)
