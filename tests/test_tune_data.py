"""What `criadero tune` does with its data: new tokens, long chats split between rounds, plain documents, batches that are named."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from criadero import lora
from criadero.artifact import create, open_artifact, verify
from criadero.chat import builtin_template, render
from criadero.checkpoints import load_config, load_model, tokenizer_of
from criadero.data.chats import split_rounds
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.model import Llama
from criadero.run import make
from criadero.train import checkpoint, sft
from criadero.train.examples import prepare
from criadero.train.optim import Optimizer
from criadero.train.preflight import counted
from criadero.train.sft import SftRecipe
from criadero.train.texts import keep_apart, pieces_of, read_texts

pytestmark = pytest.mark.usefixtures("one_torch_thread")
QUICK: dict[str, Any] = {"dtype": "float32", "epochs": 6.0, "batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}
NEW = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base and int8 (tied), untied, and shop.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for name, changes in (("base", {}), ("untied", {"tie_word_embeddings": False})):
        with create(folder / name, kind="base", config={}) as draft:
            tiny.base(draft.path, intermediate_size=64, **changes)
    values = {"model": str(folder / "base"), "to": "int8", "group": 32, "method": "rtn"}
    make("quantize", values, folder / "int8")
    tiny.write_chats(folder / "shop.jsonl", 40)
    return folder


@torch.no_grad()
def logits(model: Any, size: int = 280) -> torch.Tensor:
    ids = torch.randint(0, size, (2, 17), generator=torch.Generator().manual_seed(3))
    out = model.eval()(ids)
    return getattr(out, "logits", out).float()


# --- new special tokens ---


def grown(place: Path, base: str, name: str, **more: Any) -> Path:
    out = place / name
    if not out.exists():
        values = QUICK | {"template": "chatml", "new_tokens": NEW} | more
        make("sft", values | {"base": str(place / base), "data": str(place / "shop.jsonl")}, out)
    return out


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_begin_as_the_mean_and_old_ones_stay(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    before, size = logits(model), model.config.vocab_size
    tables = [model.model.embed_tokens.weight.detach().clone(), model.lm_head.weight.detach().clone()]
    lora.add_rows(model, size + 2, size, [size, size + 1])
    assert model.config.vocab_size == size + 2
    for table, grown_ in zip(tables, (model.model.embed_tokens.weight, model.lm_head.weight), strict=True):
        assert torch.equal(grown_[:size], table)
        torch.testing.assert_close(grown_[size:].detach(), table.mean(0).repeat(2, 1))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model)[..., :size], before)


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_chosen_rows_learn(tied: bool) -> None:
    model = tiny.model(tie_word_embeddings=tied)
    before = logits(model)
    lora.attach(model, rank=2, alpha=4)
    named = dict(lora.train_rows(model, [7, 250]))
    assert list(named) == (["model.embed_tokens.rows"] if tied else ["model.embed_tokens.rows", "lm_head.rows"])
    assert torch.equal(logits(model), before)
    ids = torch.tensor([[7, 3, 250, 7]])
    twin = tiny.model(tie_word_embeddings=tied)
    for one in (model, twin):
        torch.nn.functional.cross_entropy(one(ids)[0], torch.tensor([3, 250, 7, 9])).backward()
    torch.testing.assert_close(named["model.embed_tokens.rows"].grad, twin.model.embed_tokens.weight.grad[[7, 250]])
    if not tied:
        torch.testing.assert_close(named["lm_head.rows"].grad, twin.lm_head.weight.grad[[7, 250]])


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("base", {}),
        ("untied", {"method": "dora"}),
        ("int8", {"method": "qlora"}),
        ("base", {"method": "full", "lr": 5e-3}),
    ],
    ids=["lora", "dora-untied", "qlora", "full"],
)
def test_new_tokens_are_learned_saved_and_read_again(place: Path, base: str, settings: dict[str, Any]) -> None:
    out = grown(place, base, f"new-{base}-{settings.get('method', 'lora')}", **settings)
    made = open_artifact(out)
    assert verify(out) == []
    losses = {m["slice"]: float(m["value"]) for m in made.metrics if m["metric"] == "loss"}
    assert losses["after"] < losses["before"] - 1
    tokenizer, config = tokenizer_of(out), load_config(out)
    size = tiny.tokenizer().vocab_size
    assert [tokenizer.special[name] for name in NEW] == [size, size + 1]
    assert config.vocab_size == size + 2
    assert tokenizer.special["<|im_end|>"] in config.eos_ids  # and it ends an answer
    assert load_model(out).model.embed_tokens.weight.shape[0] == size + 2
    answer = "".join(LLM(out).chat([{"role": "user", "content": "Question 3?"}], max_tokens=40))
    assert answer == "Yes, we are open on Sundays."
    if settings.get("method") != "full":  # the rows, not the table
        rows = load_file(out / "adapter_model.safetensors")
        key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        assert rows[key].shape == (2, config.hidden_size)


@pytest.mark.parametrize(("base", "name"), [("base", "new-base-lora"), ("untied", "new-untied-dora")])
def test_peft_reads_the_rows(place: Path, base: str, name: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    method = name.rpartition("-")[2]
    out = grown(place, base, name, method=method)
    twin = transformers.AutoModelForCausalLM.from_pretrained(place / base, dtype=torch.float32)
    twin.resize_token_embeddings(load_config(out).vocab_size, mean_resizing=False)
    twin = peft.PeftModel.from_pretrained(twin, out)
    size = load_config(out).vocab_size
    torch.testing.assert_close(logits(twin, size), logits(load_model(out), size), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_pefts_rows_are_read(place: Path, tmp_path: Path, tied: bool) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = place / ("base" if tied else "untied")
    twin = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted: Any = {"embed_tokens": [5, 9], "lm_head": [5, 9]} if not tied else [5, 9]
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], trainable_token_indices=wanted, init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    twin = peft.get_peft_model(twin, settings)
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if "trainable_tokens_delta" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    twin.save_pretrained(tmp_path / "theirs")
    mine = lora.load_adapter(load_model(base), tmp_path / "theirs")
    torch.testing.assert_close(logits(mine), logits(twin), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(lora.merge(mine)), logits(twin), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"new_tokens": ["<|end|>"]}, r"'<\|end\|>': it is in the vocabulary already"),
        ({"new_tokens": ["<|a|>", "<|a|>"]}, "give each once"),
        ({"new_tokens": [" "]}, "give each once"),
        ({"new_tokens": ["<|tool|>"]}, r"'<\|tool\|>' stands in no rendered chat"),
    ],
    ids=str,
)
def test_tokens_that_cannot_be_added(place: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make("sft", QUICK | {"base": str(place / "base"), "data": str(place / "shop.jsonl")} | values, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# --- merging into a quantised base ---


@pytest.mark.parametrize("bits", ["int4", "int8"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], list(lora.ALL_LINEAR)], ids=["some", "all"])
def test_an_adapter_is_folded_into_its_quantised_base(
    place: Path, tmp_path: Path, bits: str, targets: list[str]
) -> None:
    values = {"model": str(place / "base"), "to": bits, "group": 32, "method": "rtn"}
    base = make("quantize", values, tmp_path / bits).path
    settings = QUICK | {
        "base": str(base),
        "data": str(place / "shop.jsonl"),
        "method": "qlora",
        "lora_targets": targets,
    }
    adapter = make("sft", settings, tmp_path / "adapter").path
    made = make("merge", {"models": [str(adapter)], "requantise": True}, tmp_path / "whole")
    assert made.kind == "quantised"
    assert verify(made.path) == []
    from criadero.checkpoints import read_quantised

    (config, old), (_, new) = read_quantised(base), read_quantised(made.path)
    assert new.keys() == old.keys()
    for key, weight in new.items():
        touched = any(f".{target}." in key for target in targets)
        same = all(
            (getattr(weight, part, weight) == getattr(old[key], part, old[key])).all() for part in ("q", "scales")
        )
        assert same != touched, key
        assert getattr(weight, "bits", 0) == getattr(old[key], "bits", 0)
    apart, whole, before = logits(load_model(adapter)), logits(load_model(made.path)), logits(load_model(base))
    error, change = (apart - whole).norm(), (apart - before).norm()
    assert error < change * {"int4": 0.5, "int8": 0.05}[bits]
    share = float(made.metrics[0]["value"])
    assert 0 < share < {"int4": 0.7, "int8": 0.05}[bits]
    assert load_config(made.path).eos_ids == load_config(adapter).eos_ids != config.eos_ids
    answer = "".join(LLM(made.path).chat([{"role": "user", "content": "Question 3?"}], max_tokens=40))
    assert answer == "Yes, we are open on Sundays."


def test_new_rows_are_folded_in_too(place: Path, tmp_path: Path) -> None:
    adapter = grown(place, "int8", "new-int8-qlora", method="qlora")
    made = make("merge", {"models": [str(adapter)], "requantise": True}, tmp_path / "whole")
    size = load_config(adapter).vocab_size
    apart, whole = logits(load_model(adapter), size), logits(load_model(made.path), size)
    assert float((apart - whole).norm() / apart.norm()) < 0.05
    make("merge", {"models": [str(adapter)]}, tmp_path / "plain")
    torch.testing.assert_close(logits(load_model(tmp_path / "plain"), size), apart)


@pytest.mark.parametrize(
    ("models", "words"),
    [(["base"], "is no adapter"), (["new-base-lora"], "is not a quantised folder"), (["base", "int8"], "one adapter")],
)
def test_what_cannot_be_requantised(place: Path, tmp_path: Path, models: list[str], words: str) -> None:
    grown(place, "base", "new-base-lora")
    with pytest.raises(UserError, match=words):
        make("merge", {"models": [str(place / name) for name in models], "requantise": True}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


# --- long chats ---


def long_chats(folder: Path) -> Path:
    turns = [{"role": role, "content": f"{role} says {n} " * 3} for n in range(5) for role in ("user", "assistant")]
    turns[4]["content"] = "a question that is far too long for any context here, " * 12
    rows = [
        {"messages": [{"role": "system", "content": "Be kind."}, *turns]},
        {"messages": turns[:2]},
        {"messages": turns[4:6]},
    ]
    path = folder / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_chats_are_split_between_rounds_and_counted(tmp_path: Path) -> None:
    data, tokenizer, template = long_chats(tmp_path), tiny.tokenizer(), builtin_template("criadero")
    recipe = SftRecipe(base="", data=str(data), too_long="split", held_out_share=0.0)
    prepared = prepare(recipe, data, tokenizer, template, 100)
    report = prepared.report
    chat = prepared.chat_file.chats[0]
    parts, left_out = split_rounds(chat, lambda m: len(render(m, tokenizer, template).ids), 100)
    assert left_out == 1
    assert len(parts) >= 2
    assert [e.ids for e in prepared.train[: len(parts)]] == [render(part, tokenizer, template).ids for part in parts]
    assert all(len(example.ids) <= 100 for example in prepared.train)
    assert all(part[0]["role"] == "system" and part[-1]["role"] == "assistant" for part in parts)
    assert (report.chats, report.too_long, report.parts) == (len(parts) + 1, 2, len(parts))
    assert (report.long_rounds, report.dropped, report.truncated_tokens) == (2, 1, 0)
    assert len(prepared.places) == len(prepared.train)
    assert prepared.places[0].endswith("long.jsonl:1")


def test_the_pre_flight_says_how_they_were_split(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = QUICK | {
        "base": str(place / "base"),
        "data": str(long_chats(tmp_path)),
        "too_long": "split",
        "epochs": 0.1,
    }
    made = make("sft", values | {"held_out_share": 0.0, "max_length": 100}, tmp_path / "x")
    counts = made.passport["data"]["counts"]
    said = f"2 chats: split into {counted(counts['parts'], 'part')}, 1 dropped, 0 tokens cut, 2 rounds left out"
    assert said in capsys.readouterr().err


# --- plain documents ---


def test_every_token_of_a_document_is_learned_once() -> None:
    tokenizer = tiny.tokenizer()
    text = " ".join(tiny.LINES) * 3
    whole = tokenizer.encode(text, bos=True, eos=True)
    for length in (2, 7, 50, len(whole) - 1, len(whole), len(whole) + 5):
        parts = pieces_of(text, tokenizer, length)
        assert max(len(part.ids) for part in parts) <= length
        learned = [token for part in parts for token, yes in zip(part.ids, part.loss_mask, strict=True) if yes]
        assert learned == whole[1:]
        assert all(part.ids[0] == before.ids[-1] for before, part in itertools.pairwise(parts))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tuning_on_plain_documents(
    place: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(12):
        (folder / f"{n}.txt").write_text(f"Number {n}. " + " ".join(tiny.LINES))
    (tmp_path / "bare").mkdir()
    base = tiny.base(tmp_path / "bare", template=None)  # no template is needed
    lr = {"lora": 2e-2, "full": 5e-3}[method]
    values = QUICK | {
        "base": str(base),
        "data": str(folder),
        "train_on": "text",
        "method": method,
        "lr": lr,
        "max_length": 64,
    }
    made = make("sft", values | {"held_out_share": 0.2, "epochs": 3.0}, tmp_path / "x")
    assert made.kind == {"lora": "adapter", "full": "base"}[method]
    losses = {m["slice"]: float(m["value"]) for m in made.metrics if m["metric"] == "loss"}
    assert losses["after"] < losses["before"] - 1
    said = capsys.readouterr().err
    assert "documents kept apart by a hash of their text" in said
    assert "pieces to learn" in said or "piece to learn" in said or "to learn," in said
    counts = made.passport["data"]["counts"]
    assert counts["tokens"] == counts["supervised"] + counts["chats"]  # all but the first of each piece


def test_documents_are_read_and_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"text {n // 2}"}) + "\n" for n in range(40)))
    texts, bad = read_texts(tmp_path / "rows.jsonl", "train", skip_bad=False)
    assert (len(texts), bad) == (40, [])
    kept, apart = keep_apart(texts, 0.3, 1)
    assert kept
    assert apart
    assert not {one.text for one in kept} & {one.text for one in apart}
    (tmp_path / "chats.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(UserError, match="no text in the field 'text'"):
        read_texts(tmp_path / "chats.jsonl", "train", skip_bad=False)


def test_documents_where_chats_are_wanted_say_how(place: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(UserError, match="plain documents are learned with --train_on text"):
        make("sft", {"base": str(place / "base"), "data": str(tmp_path / "rows.jsonl")}, tmp_path / "x")


# --- a loss that is not a number ---


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_a_number_stops_keeps_the_state_and_names_the_batch(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original, calls = sft.next_token_loss, []

    def loss(model: Llama, batch: Any) -> Any:
        value, count, metrics = original(model, batch)
        if torch.is_grad_enabled():
            calls.append(1)
        if len(calls) == 2 + 4:  # two of the speed measurement
            if where == "loss":
                value = value * torch.nan
            else:
                value.register_hook(lambda grad: grad * torch.inf)
        return value, count, metrics

    monkeypatch.setattr(sft, "next_token_loss", loss)
    values = QUICK | {"base": str(place / "base"), "data": str(place / "shop.jsonl")}
    with pytest.raises(UserError) as caught:
        make("sft", values, tmp_path / "x")
    said = str(caught.value)
    assert "\n" not in said
    assert f"step 4: the {where} is not finite in the batch of " in said
    assert "shop.jsonl:" in said
    assert "the last good state is kept in" in said
    found = checkpoint.latest(tmp_path / "x.partial" / "resume")
    assert found is not None
    assert found[0]["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint.load(found[1]).values())
    assert not (tmp_path / "x").exists()


def test_a_base_whose_weights_are_no_numbers_is_refused_before_it_learns(place: Path, tmp_path: Path) -> None:
    base = tiny.base(tmp_path / "broken")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"broken: the held-out loss is not finite before anything is learned, .* take another"
    ):
        make("sft", QUICK | {"base": str(base), "data": str(place / "shop.jsonl")}, tmp_path / "x")
    assert not list(tmp_path.glob("x*"))


def breaks_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are no numbers any more after this step, whose own loss and gradient were."""
    original, calls = Optimizer.step, []

    def update(self: Optimizer, *args: Any, **kwargs: Any) -> float:
        norm = original(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == step:
            with torch.no_grad():
                next(iter(self.parameters.values()))[0] = torch.nan
        return norm

    monkeypatch.setattr(Optimizer, "step", update)


def test_weights_that_break_between_two_losses_do_not_end_in_a_crash(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = QUICK | {"base": str(place / "base"), "data": str(place / "shop.jsonl"), "eval_every": 1, "patience": 0}
    breaks_after(3, monkeypatch)
    with pytest.raises(UserError, match="step 4: the loss is not finite in the batch of "):
        make("sft", values, tmp_path / "x")
    lines = [json.loads(line) for line in (tmp_path / "x.partial" / "metrics.jsonl").read_text().splitlines()]
    assert math.isnan(lines[2]["held_out"]["chats"]["loss"])
    assert set(lines[2]["answers"]) == {"(no answer: the model gave NaN for a logit)"}
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("eval_every", [1, 1000])
def test_weights_that_break_in_the_last_step_are_not_sealed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, eval_every: int
) -> None:
    """The best of the measured ones are; where none was measured, nothing is."""
    values = QUICK | {"base": str(place / "base"), "data": str(place / "shop.jsonl"), "patience": 0}
    whole = make("sft", values, tmp_path / "whole").passport["step"]["steps"]
    breaks_after(whole, monkeypatch)
    if eval_every == 1:
        made = make("sft", values | {"eval_every": 1}, tmp_path / "x")
        assert 0 < made.passport["step"]["best_step"] < whole
        assert all(torch.isfinite(one).all() for one in load_file(made.path / "adapter_model.safetensors").values())
        return
    with pytest.raises(UserError, match="not finite after tuning, so nothing is sealed: start over"):
        make("sft", values | {"eval_every": eval_every}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
