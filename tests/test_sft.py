"""Customising, end to end on a tiny model: through the command line, with everything that can be wrong with the input."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zstandard

from criadero import cli, kernels
from criadero.artifact import create, open_artifact, verify
from criadero.chat import Example, builtin_template
from criadero.checkpoints import load_config, load_model, save_hf, template_of, tokenizer_of
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.model import Llama
from criadero.train import checkpoint, memory, preflight, sft
from criadero.train.examples import Prepared, prepare, split
from criadero.train.sft import SftRecipe

IDS = torch.randint(0, 280, (2, 17), generator=torch.Generator().manual_seed(3))
QUICK = {"dtype": "float32", "epochs": 4.0, "batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out = model.eval()(IDS)
    return getattr(out, "logits", out).float()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed base, as `pretrain` leaves one."""
    out = tmp_path_factory.mktemp("made") / "base"
    with create(out, kind="base", config={}) as draft:
        tiny.base(draft.path)
    return out


def flags(**values: Any) -> list[str]:
    return [word for name, value in (QUICK | values).items() for word in (f"--{name}", str(value))]


def tune(*words: Any, **values: Any) -> int:
    return cli._run(["tune", *map(str, words), *flags(**values)])


def refusal(capsys: pytest.CaptureFixture[str], out: Path, *words: Any, **values: Any) -> str:
    """The one line with which a run is refused; nothing is left of it."""
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert tune(*words, "--out", out, **values) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said.err.endswith(lines[0] + "\n")
    assert "step 1" not in said.err
    assert sorted(out.parent.iterdir()) == before
    return lines[0]


# --- the whole way ---


@pytest.fixture(scope="module")
def tuned(base: Path) -> tuple[Path, str]:
    """An adapter made through the command line, and what was said on the way."""
    import contextlib
    import io

    folder = base.parent
    data = tiny.write_chats(folder / "shop.jsonl", 40)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert tune(base, data, "--out", folder / "mine", licence="CC0-1.0") == 0
    return folder / "mine", said.getvalue()


def test_an_adapter_is_sealed_and_says_what_it_was_made_of(tuned: tuple[Path, str], base: Path) -> None:
    made = open_artifact(tuned[0])
    assert verify(made.path) == []
    assert made.kind == "adapter"
    assert {row["path"] for row in made.files} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "metrics.jsonl",
        "curves.svg",
    }  # fmt: skip
    assert "model.safetensors" not in {row["path"] for row in made.files}
    assert not (made.path / "resume").exists()
    relations = {row["relation"]: row for row in made.inputs}
    assert relations["finetune_of"]["id"] == open_artifact(base).id
    assert relations["trained_on"]["licence"] == "CC0-1.0"
    rows = made.sources()
    assert [(row["name"], row["licence"]) for row in rows] == [("shop.jsonl", "CC0-1.0")]
    counts = made.passport["data"]["counts"]
    assert counts["chats"] + counts["held_out"] == 40
    assert counts["supervised"] > 0
    assert made.passport["step"]["config"]["stage"] == "sft"
    assert made.passport["step"]["dtype"] == "float32"


def test_held_out_loss_falls(tuned: tuple[Path, str]) -> None:
    losses = {m["slice"]: m for m in open_artifact(tuned[0]).metrics if m["metric"] == "loss"}
    assert float(losses["after"]["value"]) < float(losses["before"]["value"]) - 1
    assert losses["after"]["n"] == losses["before"]["n"] > 0


def test_the_best_is_kept_and_the_report_sealed(tuned: tuple[Path, str]) -> None:
    made = open_artifact(tuned[0])
    step = made.passport["step"]
    lines = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["held_out"]["chats"]["loss"] for line in lines if "held_out" in line}
    assert len(measured) >= 2
    assert step["best_step"] == min(measured, key=lambda n: measured[n])
    after = next(m for m in made.metrics if m["slice"] == "after")
    assert float(after["value"]) == pytest.approx(
        min(measured.values()), abs=2e-6
    )  # what is sealed is what was measured
    assert all(len(line["answers"]) == 2 for line in lines if "held_out" in line)
    page = (made.path / "report.html").read_text()
    assert "report.html" in {row["path"] for row in made.files}
    assert "Yes, we are open on Sundays." in page
    assert "Question" in page


def test_a_run_that_learns_by_heart_ends_early(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two kinds of answers: what is held out is answered otherwise than what is learned."""
    data = tiny.write_chats(tmp_path / "data.jsonl", 20)
    apart = tiny.write_chats(tmp_path / "apart.jsonl", 4, answer="No, la tienda cierra a las ocho.")
    words = [base, data, "--held_out", apart, "--out", tmp_path / "out"]
    assert tune(*words, epochs=60.0, eval_every=4, patience=2, track="none") == 0
    said = " ".join(capsys.readouterr().err.split())
    step = open_artifact(tmp_path / "out").passport["step"]
    assert step["ended_early"]
    assert step["best_step"] == step["steps"] - 8
    assert (
        f"ended early after step {step['steps']}: 2 measurements in a row were not below the held-out loss of step"
        in said
    )
    assert f"step {step['best_step']} is kept" in said


@pytest.mark.parametrize("which", ["tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_said_first(
    which: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    data = tiny.write_chats(tmp_path / "data.jsonl")
    assert f"pip install 'criadero[{which}]'" in refusal(capsys, tmp_path / "x", base, data, track=which)


def test_fit_says_what_it_took(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_chats(tmp_path / "data.jsonl")
    assert tune(base, data, "--out", tmp_path / "out", fit=0.5, epochs=1.0) == 0
    said = capsys.readouterr().err
    longest = open_artifact(tmp_path / "out").passport["data"]["counts"]["longest"]
    assert (
        f"fit 0.5 GB: lora; 2 rows of 128 tokens at once; no chat is cut or split, the longest has {longest} tokens\n"
        in said
    )
    assert "too long" not in said
    derived = open_artifact(tmp_path / "out").passport["step"]["derived"]
    assert (derived["method"], derived["max_length"], derived["micro_tokens"]) == ("lora", 128, 256)
    line = refusal(capsys, tmp_path / "x", base, data, fit=0.1)
    assert "fit 0.1: tuning" in line
    assert "takes at least 0.4 GB" in line


def test_the_pre_flight_says_what_will_happen(tuned: tuple[Path, str]) -> None:
    said = tuned[1]
    counts = open_artifact(tuned[0]).passport["data"]["counts"]
    assert f"{counts['chats']} to learn, {counts['held_out']} held out" in said
    assert f"{counts['tokens']:,} a pass, {counts['supervised']:,} supervised" in said
    assert "OpenAI messages" in said
    assert "«Yes, we are open on Sundays.<|end|>»" in said  # the example with its mask
    assert "<|user|>Question" in said
    assert "«<|user|>" not in said
    for word in (
        "lora on",
        "memory     about",
        "ending     at the last step, or when 3 in a row",
        "tokens/s",
        "float32, as asked, with " + ("compiled training kernels (" if kernels.native() else "PyTorch's own kernels ("),
        "held-out loss before",
    ):
        assert word in said, word


def test_the_model_can_be_opened_and_talked_to(tuned: tuple[Path, str], base: Path) -> None:
    folder = tuned[0]
    model = load_model(folder)
    assert not torch.equal(logits(model), logits(load_model(base)))
    llm = LLM(folder)
    answer = "".join(llm.chat([{"role": "user", "content": "Question 3?"}], max_tokens=40))
    assert answer == "Yes, we are open on Sundays."  # and it has learned to stop
    end = tiny.tokenizer().special["<|end|>"]
    assert end in load_config(folder).eos_ids
    assert model.config.eos_ids == load_config(folder).eos_ids


def test_the_same_seed_gives_the_same_adapter(tuned: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    assert tune(base, base.parent / "shop.jsonl", "--out", tmp_path / "again", licence="CC0-1.0") == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tuned[0] / name).read_bytes()


def test_an_adapter_is_not_opened_on_another_base_of_the_same_shape(tuned: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    with create(tmp_path / "other", kind="base", config={}) as draft:
        tiny.base(draft.path, seed=7)
    shutil.copytree(tuned[0], tmp_path / "mine")
    file = tmp_path / "mine" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(UserError, match="made on another base than"):
        load_model(tmp_path / "mine")


@pytest.mark.parametrize("settings", [{"merged": "true"}, {"method": "full", "lr": 1e-2, "optimizer": "muon"}])
def test_whole_weights_open_in_transformers(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    assert tune(base, data, "--out", tmp_path / "whole", **settings) == 0
    made = open_artifact(tmp_path / "whole")
    assert made.kind == "chat"
    assert "adapter_config.json" not in {row["path"] for row in made.files}
    losses = {m["slice"]: float(m["value"]) for m in made.metrics}
    assert losses["after"] < losses["before"] - 1
    ours = load_model(made.path)
    twin = transformers.AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    torch.testing.assert_close(logits(twin), logits(ours), rtol=1e-4, atol=1e-5)
    words = transformers.AutoTokenizer.from_pretrained(made.path)
    chat = [{"role": "user", "content": "Question 3?"}]
    ids = words.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = twin.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert int(answer[-1]) == words.convert_tokens_to_ids("<|end|>")  # it stops at the end of the turn by itself
    assert words.decode(answer, skip_special_tokens=True) == "".join(LLM(made.path).chat(chat, max_tokens=40))


def test_merged_weights_equal_the_adapter_on_its_base(tuned: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    data = base.parent / "shop.jsonl"
    assert tune(base, data, "--out", tmp_path / "whole", licence="CC0-1.0", merged="true") == 0
    torch.testing.assert_close(logits(load_model(tmp_path / "whole")), logits(load_model(tuned[0])))


def test_tuning_goes_on_from_an_adapter_only_to_whole_weights(
    tuned: tuple[Path, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = base.parent / "shop.jsonl"
    said = refusal(capsys, tmp_path / "x", tuned[0], data)
    assert "is an adapter, and an adapter cannot stand on another; add merged = true" in said
    assert tune(tuned[0], data, "--out", tmp_path / "x", merged="true", epochs=1) == 0
    losses = {m["slice"]: float(m["value"]) for m in open_artifact(tmp_path / "x").metrics}
    assert losses["before"] < 1  # it began from what the adapter knew


def test_a_template_can_be_given_to_a_base_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny.base(tmp_path / "plain", template=None)
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    said = refusal(capsys, tmp_path / "x", plain, data)
    assert "has no chat template" in said
    assert "llama3" in said
    assert "there is no built-in chat template 'lama3'" in refusal(
        capsys, tmp_path / "x", plain, data, template="lama3"
    )
    assert tune(plain, data, "--out", tmp_path / "x", template="criadero", epochs=1) == 0
    assert template_of(tmp_path / "x").source == builtin_template("criadero").source


def test_an_adapter_can_be_exported_and_still_knows_where_to_stop(tuned: tuple[Path, str], tmp_path: Path) -> None:
    from criadero.export import export

    chat: list[Any] = [{"role": "user", "content": "Question 3?"}]
    wanted = "".join(LLM(tuned[0]).chat(chat, max_tokens=40))
    export(tuned[0], to="gguf", out=tmp_path / "mine.gguf", type="f32")
    export(tmp_path / "mine.gguf", to="hf", out=tmp_path / "again")  # tokenizer and template travel in the file
    for place in (tmp_path / "mine.gguf", tmp_path / "again"):
        assert "".join(LLM(place).chat(chat, max_tokens=40)) == wanted
        assert tiny.tokenizer().special["<|end|>"] in load_config(place).eos_ids


def dataset(folder: Path, licence: str | None = None, rows: bool = True) -> Path:
    """A ``dataset`` artifact of chats from two sources."""
    plain = tiny.write_chats(folder.parent / "plain.jsonl", 12)
    with create(folder, kind="dataset", config={"stage": "data"}, licence=licence) as draft:
        with zstandard.open(draft.path / "train-00000.jsonl.zst", "wt", encoding="utf-8") as file:
            file.write(plain.read_text(encoding="utf-8"))
        if rows:
            draft.data["by_source"] = [
                {"name": "shop", "licence": "CC0-1.0", "documents_out": 8},
                {"name": "tienda", "licence": "CC-BY-4.0", "documents_out": 4},
            ]
    return folder


def test_a_dataset_keeps_its_own_sources_and_licences(base: Path, tmp_path: Path) -> None:
    data = dataset(tmp_path / "data")

    def made(name: str, source: Path, **settings: Any) -> tuple[list[tuple[str, str]], str]:
        assert tune(base, source, "--out", tmp_path / name, epochs=0.1, **settings) == 0
        artifact = open_artifact(tmp_path / name)
        trained_on = next(row for row in artifact.inputs if row["relation"] == "trained_on")
        return [(r["name"], r["licence"]) for r in artifact.passport["data"]["by_source"]], trained_on["licence"]

    assert made("a", data) == ([("shop", "CC0-1.0"), ("tienda", "CC-BY-4.0")], "CC-BY-4.0 / CC0-1.0")
    assert "| tienda | CC-BY-4.0 | 4 |" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert made("b", data, licence="MIT") == ([("data", "MIT")], "MIT")  # the user's word stands
    bare = dataset(tmp_path / "bare", licence="CC-BY-SA-4.0", rows=False)
    assert made("c", bare) == ([("bare", "CC-BY-SA-4.0")], "CC-BY-SA-4.0")
    unknown = dataset(tmp_path / "none", rows=False)
    assert made("d", unknown) == ([("none", "unknown")], "unknown")


# --- refusals: one line, exit code 2, nothing left ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0 and below 1, not -0.001"),
        ({"lr": 3}, "lr must be at least 0 and below 1, not 3"),
        ({"epochs": -1}, "epochs must be positive"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        (
            {"lora_rank": 99999999999},
            "lora_rank is 99999999999, but the smallest layer that gets an adapter is 16 wide; give at most 16",
        ),
        ({"lora_rank": 33, "lora_targets": "q_proj,down_proj"}, "adapter is 32 wide"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"lora_alpha": -1}, "lora_alpha must be positive and at most 10000, not -1"),
        ({"lora_alpha": 1e300}, "lora_alpha must be positive and at most 10000, not 1e+300"),
        ({"lora_targets": "q_proj,qproj"}, "lora_targets: qproj; choose from q_proj"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"batch_tokens": -1}, "batch_tokens must be positive"),
        ({"held_out_share": 1.0}, "held_out_share must be at least 0 and below 1"),
        ({"warmup": 2}, "warmup is a fraction"),
        ({"max_length": -1}, "max_length must not be negative"),
        ({"max_length": 4096}, "max_length is 4096, but the context of"),
        ({"lora_rnk": 4}, "did you mean"),
        ({"lora_rank": "many"}, "lora_rank"),
        ({"method": "qlora"}, "method"),
        ({"too_long": "ignore"}, "too_long"),
        ({"base_matmul": "int8", "method": "dora"}, "base_matmul int8 goes with method lora or qlora, without"),
        ({"base_matmul": "int8", "lora_dropout": 0.1}, "base_matmul int8 goes with method lora or qlora, without"),
        ({"base_matmul": "int4"}, "base_matmul"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], message: str
) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    assert message in refusal(capsys, tmp_path / "x", base, data, **settings)


def test_a_missing_base_or_missing_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    assert "no such" in refusal(capsys, tmp_path / "x", tmp_path / "nowhere", data)
    assert "shop.json: no such file" in refusal(capsys, tmp_path / "x", base, tmp_path / "shop.json")
    (tmp_path / "empty").mkdir()
    assert "not a model folder" in refusal(capsys, tmp_path / "x", tmp_path / "empty", data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no chat in it"),
        ("\n \n", "no chat in it"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"mess', ":2: not valid JSON"),
        ('{"messages": [{"role": "user", "content": "a"}]}', ":1: no assistant turn, so there is nothing to learn"),
        ('{"text": "a document"}', ":1: no chat in this row"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}', ":2: turn 2 (assistant) is empty"),
    ],
)  # fmt: skip
def test_data_that_is_no_chats(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    data = tmp_path / "shop.jsonl"
    data.write_text(text)
    said = refusal(capsys, tmp_path / "x", base, data)
    assert message in said
    assert str(data) in said


def test_bad_lines_can_be_skipped_and_are_counted(base: Path, tmp_path: Path) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    with open(data, "a") as file:
        file.write('{"mess\n{"prompt": "a"}\n')
    assert tune(base, data, "--skip_bad", "--out", tmp_path / "x", epochs=1) == 0
    assert open_artifact(tmp_path / "x").passport["data"]["counts"]["bad"] == 2


def test_a_place_that_is_taken(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("mine")
    assert "x exists" in refusal(capsys, tmp_path / "x", base, data)


def test_one_of_a_thing_is_said_as_one(tmp_path: Path) -> None:
    assert [preflight.counted(n, "pass", "passes") for n in (0, 0.5, 1.0, 1, 2, 1200)] == [
        "0 passes", "0.5 passes", "1 pass", "1 pass", "2 passes", "1,200 passes",
    ]  # fmt: skip
    for counts, message in (
        ({"refused_for_length": True, "too_long": 1}, "1 chat is longer than 8 tokens"),
        ({"refused_for_length": True, "too_long": 2}, "2 chats are longer than 8 tokens"),
        ({"unsupervised": 1}, r"\(1 of 1 chat\)"),
        ({"dropped": 1}, "the only one is longer than 8 tokens and was dropped"),
        ({"dropped": 2}, "all 2 are longer than 8 tokens and were dropped"),
        ({"held_out": 1}, "the only chat was kept apart"),
        ({"held_out": 2}, "all 2 chats were kept apart"),
    ):
        with pytest.raises(UserError, match=message):
            preflight.check(preflight.Report("a.jsonl", "", 0, "", 8, **counts))


def test_a_chat_the_template_refuses_is_named(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strict = tiny.base(tmp_path / "strict", template=None)
    source = (
        builtin_template("criadero").source
        + "{% if '2' in messages[0].content %}{{ raise_exception('odd') }}{% endif %}"
    )
    (strict / "chat_template.jinja").write_text(source)
    data = tiny.write_chats(tmp_path / "shop.jsonl", 4)
    said = refusal(capsys, tmp_path / "x", strict, data, held_out_share=0)
    assert said.startswith(f"error: {data}:3: chat template")
    assert "odd" in said


def test_a_tokenizer_larger_than_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny.model(vocab_size=100)
    save_hf(small, small.config, tmp_path / "small")
    tiny.tokenizer().save(tmp_path / "small", chat_template=builtin_template("criadero").source)
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    assert "100 embeddings: the two do not belong together" in refusal(capsys, tmp_path / "x", tmp_path / "small", data)


def test_too_little_memory_is_said_before_the_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 2**20)
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    assert "of memory and 0.0 GiB are free; lower micro_tokens" in refusal(capsys, tmp_path / "x", base, data)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_too_little_room_on_the_disk_is_said_before_the_training(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    said = refusal(capsys, tmp_path / "x", base, data, method=method)
    assert "x: what is made takes at least 0." in said
    assert "MB are free on that disk; free some space, or choose another place with --out" in said


# --- what happens to the chats ---


def prepared(folder: Path, data: Path, context: int = 128, **settings: Any) -> Prepared:
    recipe = SftRecipe(base="unused", data=str(data), **settings)
    return prepare(recipe, data, tiny.tokenizer(), builtin_template("criadero"), context)


def mixed(folder: Path) -> Path:
    """Ten short chats, two whose answer is long, one whose question alone is long."""
    data = tiny.write_chats(folder / "mixed.jsonl", 10, answer="Yes.")
    long = "The shop opens at nine and closes at eight. " * 6
    with open(data, "a") as file:
        for question, answer in (("A?", long), ("B?", long), (long, "Yes.")):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return data


def test_policies_for_long_chats_and_their_counts(tmp_path: Path) -> None:
    data = mixed(tmp_path)
    whole = prepared(tmp_path, data, 1000, held_out_share=0).report
    assert (whole.chats, whole.too_long) == (13, 0)
    drop = prepared(tmp_path, data, 40, held_out_share=0, too_long="drop")
    assert (drop.report.chats, drop.report.too_long, drop.report.dropped, drop.report.truncated_tokens) == (10, 3, 3, 0)
    cut = prepared(tmp_path, data, 40, held_out_share=0, too_long="truncate")
    assert (cut.report.chats, cut.report.too_long, cut.report.dropped, cut.report.unsupervised) == (12, 3, 0, 1)
    assert max(len(e.ids) for e in cut.train) == 40
    assert cut.report.longest == whole.longest > 40
    assert (
        cut.report.tokens + cut.report.truncated_tokens + 40 == whole.tokens
    )  # 40: the chat with nothing left to learn
    preflight.check(drop.report)
    preflight.check(cut.report)
    with pytest.raises(
        UserError, match=r"3 chats are longer than 40 tokens \(the longest has .*choose --too_long split, drop"
    ):
        preflight.check(prepared(tmp_path, data, 40, held_out_share=0).report)


def test_held_out_chats_that_are_cut_are_counted(tmp_path: Path) -> None:
    """They are cut under every rule, as no weights depend on them; but never silently."""
    data = mixed(tmp_path)
    cut = prepared(tmp_path, tiny.write_chats(tmp_path / "short.jsonl", 4), 40, held_out=str(data)).report
    assert (cut.too_long, cut.truncated_tokens, cut.held_out_cut) == (0, 0, 3)
    assert preflight.shortened(cut) == "3 held-out chats cut"
    assert prepared(tmp_path, data, 1000, held_out=str(data)).report.held_out_cut == 0


def test_runs_in_which_nothing_would_be_learned_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    few = {"max_length": 6, "held_out_share": 0}
    assert "24 chats are longer than 6 tokens" in refusal(capsys, tmp_path / "x", base, data, **few)
    assert "all 24 are longer than 6 tokens and were dropped" in refusal(
        capsys, tmp_path / "x", base, data, too_long="drop", **few
    )
    assert "no chat has an assistant's token to learn after cutting them to 6 tokens" in refusal(
        capsys, tmp_path / "x", base, data, too_long="truncate", **few
    )
    assert "kept apart to measure on, none is left" in refusal(
        capsys, tmp_path / "x", base, data, held_out_share=0.9999
    )


def test_a_template_that_masks_everything_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tags in the wrong place: the user's words would be learned, or nothing at all."""
    plain = tiny.base(tmp_path / "plain", template=None)
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% generation %}{% endgeneration %}{% endfor %}"
    )
    (plain / "chat_template.jinja").write_text(source)
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    said = refusal(capsys, tmp_path / "x", plain, data)
    assert "no chat has an assistant's token to learn (" in said


def test_the_split_is_stable_and_keeps_equal_questions_together(tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"Question {n % 50}?" + " " * (n % 3)}, {"role": "assistant", "content": str(n)}]
        for n in range(200)
    ]
    kept, apart = split(chats, 0.2, seed=1)
    assert len(kept) + len(apart) == 200
    assert 0.08 < len(apart) / 200 < 0.35
    asked = [{c[0]["content"].strip() for c in part} for part in (kept, apart)]
    assert not asked[0] & asked[1]
    again = split(chats[:100][::-1], 0.2, seed=1)  # neither order nor company matters
    assert again[1][::-1] == [c for c in apart if c in chats[:100]]
    assert split(chats, 0.2, seed=2)[1] != apart
    assert split(chats, 0.0, seed=1)[1] == []


def test_duplicates_and_held_out_chats_that_are_also_learned_are_counted(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl", 12)
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:10], *lines[:3]]))
    (tmp_path / "held.jsonl").write_text("".join(lines[8:12]))
    report = prepared(tmp_path, data, held_out=str(tmp_path / "held.jsonl")).report
    assert (report.duplicates, report.contaminated, report.chats, report.held_out) == (3, 2, 13, 4)
    assert tune(base, data, "--out", tmp_path / "x", held_out=tmp_path / "held.jsonl", epochs=1) == 0
    said = capsys.readouterr().err
    assert "3 duplicate chats; 2 held-out chats are also in the training part" in said
    relations = {row["relation"] for row in open_artifact(tmp_path / "x").inputs}
    assert relations == {"finetune_of", "trained_on", "evaluated_on"}


def test_train_on_last_learns_only_the_last_answer(tmp_path: Path) -> None:
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    data = tmp_path / "two.jsonl"
    data.write_text(json.dumps({"messages": turns}) + "\n")
    everything = prepared(tmp_path, data, held_out_share=0).train[0]
    last = prepared(tmp_path, data, held_out_share=0, train_on="last").train[0]
    assert everything.ids == last.ids
    words = tiny.tokenizer()

    def learned(example: Example) -> str:
        return words.decode([i for i, m in zip(example.ids, example.loss_mask, strict=True) if m], skip_special=False)

    assert learned(everything) == "b<|end|>d<|end|>"
    assert learned(last) == "d<|end|>"


def test_no_held_out_chats_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl", 6)
    assert tune(base, data, "--out", tmp_path / "x", held_out_share=0, epochs=1) == 0
    assert "no held-out chats: the effect cannot be measured" in capsys.readouterr().err
    assert open_artifact(tmp_path / "x").metrics == []


def test_long_chats_in_a_large_context_make_short_rows() -> None:
    def of(*lengths: int) -> Prepared:
        report = preflight.Report("", "", 0, "", 131072)
        return Prepared([Example([1] * n, [True] * n) for n in lengths], [], report, None)  # type: ignore[arg-type]

    assert sft.row_length(of(50, 60), 512) == 256
    assert sft.row_length(of(50, 60), 128) == 128
    assert sft.row_length(of(50, 60), 131072) == 256
    assert sft.row_length(of(50, 3000), 131072) == 3000


# --- cut off ---


def command(*words: Any, **values: Any) -> list[str]:
    return [sys.executable, "-m", "criadero.cli", "tune", *map(str, words), *flags(**values)]


def test_ctrl_c_leaves_something_to_go_on_with(base: Path, tmp_path: Path) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    out, partial = tmp_path / "mine", tmp_path / "mine.partial"
    settings = {"epochs": 12.0, "lr": 1e-3}
    words = [base, data, "--out", out]
    root = str(Path(cli.__file__).parents[1])
    process = subprocess.Popen(
        command(*words, **settings), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    while not (partial / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)
    assert process.returncode == 130, said[1]
    assert "Traceback" not in said[1]
    assert "run the same again to go on" in said[1]
    assert not out.exists()
    found = checkpoint.latest(partial / "resume")
    assert found is not None
    assert found[0]["step"] > 0
    assert tune(*words, epochs=3) == 2  # with other settings: refused, and nothing is lost
    assert checkpoint.latest(partial / "resume") == found
    assert tune(*words, **settings) == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert not partial.exists()


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """From the save number ``after`` on, no file may grow beyond 100 kB; call what is returned to lift that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, calls = checkpoint.save, []

    def save(*args: Any, **kwargs: Any) -> Path:
        calls.append(1)
        if len(calls) > after:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save", save)
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl")
    lift = full_disk(monkeypatch, after=2)
    try:
        code = tune(base, data, "--out", tmp_path / "mine", save_minutes=1e-9)
    finally:
        lift()
    said = capsys.readouterr().err
    assert code == 2
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: ")
    assert "File too large" in said.splitlines()[-1]
    assert not (tmp_path / "mine").exists()
    found = checkpoint.latest(tmp_path / "mine.partial" / "resume")
    assert found is not None
    assert found[0]["step"] == 2
    monkeypatch.undo()
    assert tune(base, data, "--out", tmp_path / "mine", save_minutes=1e-9) == 0
    assert verify(tmp_path / "mine") == []


def test_a_really_full_disk(base: Path, tmp_path: Path) -> None:
    """The same in a small file system of its own, where mounting one is allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mounting, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    try:
        data = tiny.write_chats(tmp_path / "shop.jsonl")
        recipe = SftRecipe(base=str(base), data=str(data), method="full", save_minutes=1e-9, dtype="float32")
        with pytest.raises(UserError, match="the disk is full: free some space and run again"):
            sft.sft(recipe, disk / "mine")
        assert not (disk / "mine").exists()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_lora_and_full_agree_on_the_base(base: Path) -> None:
    """What the fixture's base is: a model that `load_model` opens with its tokenizer."""
    assert isinstance(load_model(base), Llama)
    assert tokenizer_of(base).vocab_size == tiny.tokenizer().vocab_size


def test_what_is_derived_is_recorded(base: Path, tmp_path: Path) -> None:
    data = tiny.write_chats(tmp_path / "shop.jsonl", 6)
    assert tune(base, data, "--out", tmp_path / "x", epochs=0, batch_tokens=0, lr=0) == 0
    derived = open_artifact(tmp_path / "x").passport["step"]["derived"]
    assert float(derived["epochs"]) == 30  # few chats: many passes, but not more than 30
    assert derived["batch_tokens"] == 512
    assert float(derived["lr"]) == pytest.approx(1.28 / load_config(base).hidden_size)
