"""Learning from a teacher: its probabilities, against autograd and the whole divergence; its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from scripted_teacher import scripted_teacher

from criadero import cli
from criadero.artifact import create, open_artifact, verify
from criadero.chat import Example
from criadero.checkpoints import load_model, save_hf
from criadero.data.chats import read_chats
from criadero.errors import UserError
from criadero.kernels import native
from criadero.model import Llama
from criadero.run import make
from criadero.tokenizer import train_bpe
from criadero.train import distil, fast
from criadero.train.batches import rows_to_batch

pytestmark = pytest.mark.usefixtures("one_torch_thread")
QUICK: dict[str, Any] = {"dtype": "float32", "epochs": 6.0, "batch_tokens": 256, "micro_tokens": 256, "lr": 2e-2}


# --- the divergence ---


def coarse(logits: torch.Tensor, top: torch.Tensor, temperature: float) -> torch.Tensor:
    """Probabilities of the kept tokens and of the rest: [M, k + 1]."""
    q = F.softmax(logits / temperature, -1)
    kept = q.gather(1, top)
    return torch.cat([kept, 1 - kept.sum(1, keepdim=True)], 1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [3, 2048])
def test_value_and_gradients_are_those_of_the_formula(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(20, 6, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(8, 20, generator=generator, dtype=torch.float64) * 2
    top = teacher.topk(5).indices
    p = coarse(teacher, top, temperature)
    (p * (p.log() - coarse(hidden @ weight.T, top, temperature).log())).sum().backward()
    a, b = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    value = distil.divergence_sum(a, b, top, p[:, :5].float(), temperature)
    value.backward()
    wanted = (p * (p.log() - coarse(hidden @ weight.T, top, temperature).log())).sum()
    assert float(value) == pytest.approx(float(wanted), rel=1e-4)
    torch.testing.assert_close(a.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def test_with_all_tokens_it_is_the_whole_divergence() -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(12, 6, generator=generator)
    p = F.softmax(torch.randn(7, 12, generator=generator), -1)
    probs, top = p.topk(12)
    hidden.requires_grad_()
    value = distil.divergence_sum(hidden, weight, top, probs, 1.0)
    value.backward()
    twin = hidden.detach().clone().requires_grad_()
    wanted = F.kl_div(F.log_softmax(twin @ weight.T, -1), p, reduction="sum")
    wanted.backward()
    assert float(value) == pytest.approx(float(wanted), abs=1e-3)
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-3, atol=1e-4)


def test_agreement_is_zero_and_numbers_far_away_stay_finite() -> None:
    hidden, weight = (
        torch.eye(4)[:3].clone().requires_grad_(),
        torch.randn(9, 4, generator=torch.Generator().manual_seed(2)),
    )
    probs, top = F.softmax(hidden.detach() @ weight.T, -1).topk(3)
    value = distil.divergence_sum(hidden, weight, top, probs, 1.0)
    value.backward()
    assert float(value) == pytest.approx(0, abs=1e-5)
    assert float(hidden.grad.abs().max()) < 1e-5
    far = (torch.ones(2, 4) * 300).requires_grad_()
    value = distil.divergence_sum(
        far, weight, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1.0, 0.0], [0.5, 0.1]]), 1.0
    )
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(far.grad).all()


def test_what_the_teacher_says_is_kept_in_the_order_of_the_examples() -> None:
    model = tiny.model(scale=1.0)
    generator = torch.Generator().manual_seed(4)
    examples = []
    for n in (5, 30, 12, 7):
        mask = (torch.rand(n, generator=generator) < 0.6).tolist()
        examples.append(Example(torch.randint(0, 280, (n,), generator=generator).tolist(), [False, *mask[1:-1], True]))
    kept = distil._taught(distil.ask(model, examples, 6, 2.0, torch.float32, "cpu"))
    for i, one in enumerate(examples):
        with torch.no_grad():
            alone = F.softmax(model(torch.tensor([one.ids]))[0] / 2.0, -1)
        wanted = alone[[t - 1 for t in range(1, len(one.ids)) if one.loss_mask[t]]].topk(6)
        mine = slice(kept.places[i], kept.places[i + 1])
        np.testing.assert_array_equal(kept.top[mine], wanted.indices.numpy())
        np.testing.assert_allclose(kept.probs[mine], wanted.values.numpy(), rtol=2e-3)
    assert kept.examples == examples
    # and a batch finds the rows of its own examples
    batch = rows_to_batch([[examples[2], examples[0]], [examples[3]]], 32, 0, torch.float32)
    taught = distil.teach(batch, [2, 0, 3], kept)
    assert taught.teacher is not None
    assert distil.mean_divergence(model, [taught], 2.0) == pytest.approx(0, abs=2e-3)


@pytest.mark.skipif(native() is None, reason="the compiled kernels are not installed, or turned off")
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_compiled_kernels_give_the_gradients_of_the_models_own_forward(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.model(scale=1.0)
    examples = [Example(list(range(20, 20 + n)), [False] * (n // 2) + [True] * (n - n // 2)) for n in (9, 30, 14)]
    taught = distil._taught(distil.ask(tiny.model(seed=1), examples, 6, 1.0, torch.float32, "cpu"))
    batch = distil.teach(rows_to_batch([examples[:2], examples[2:]], 48, 0, torch.float32), [0, 1, 2], taught)
    found = []
    for obstacle in (None, "in a test"):
        monkeypatch.setattr(fast, "obstacle", lambda model, said=obstacle: said)
        model.zero_grad()
        total, count, _ = distil.distil_loss(share, 1.0)(model, batch)
        total.backward()
        found.append((float(total.detach()), count, [p.grad.clone() for p in model.parameters()]))
    (loss, count, mine), (slow_loss, slow_count, slow) = found
    assert count == slow_count
    assert loss == pytest.approx(slow_loss, rel=1e-5)
    for a, b in zip(mine, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


# --- the stages ---


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """teacher (tuned, so that it knows something), student (smaller), other (another vocabulary), shop.jsonl, lesson."""
    folder = tmp_path_factory.mktemp("distil")
    for name, changes in (("base", {}), ("student", {"hidden_size": 16, "num_hidden_layers": 1})):
        with create(folder / name, kind="base", config={}) as draft:
            tiny.base(draft.path, **changes)
    data = str(tiny.write_chats(folder / "shop.jsonl", 40))
    make("sft", QUICK | {"base": str(folder / "base"), "data": data, "method": "full", "lr": 5e-3}, folder / "teacher")
    words = train_bpe(["quite other words"] * 3, 277)
    (folder / "other").mkdir()
    model = Llama(tiny.config(vocab_size=words.vocab_size))
    model.initialise(1)
    save_hf(model, model.config, folder / "other")
    from criadero.chat import builtin_template

    words.save(folder / "other", chat_template=builtin_template("criadero").source)
    values = {"teacher": str(folder / "teacher"), "data": data, "top_k": 16, "dtype": "float32", "licence": "CC0-1.0"}
    make("logits", values, folder / "lesson")
    return folder


def test_a_lesson_is_sealed_and_says_how_much_it_keeps(place: Path) -> None:
    made = open_artifact(place / "lesson")
    assert verify(made.path) == []
    assert made.kind == "logits"
    assert {one["relation"] for one in made.inputs} == {"outputs_of", "contains"}
    shares = {m["slice"]: float(m["value"]) for m in made.metrics}
    assert 0.5 < shares["train"] <= 1.001


def test_a_student_follows_its_teacher(place: Path, tmp_path: Path) -> None:
    data = str(place / "lesson")
    values = QUICK | {"base": str(place / "student"), "data": data, "method": "full", "lr": 1e-2, "distil": 1.0}
    made = make("sft", values, tmp_path / "mine")
    assert verify(made.path) == []
    found = {(m["metric"], m["slice"]): float(m["value"]) for m in made.metrics}
    assert found["divergence", "after"] < 0.5 * found["divergence", "before"]
    assert found["loss", "after"] < found["loss", "before"] - 0.5  # it was never shown the text itself
    assert "divergence" in json.loads((made.path / "metrics.jsonl").read_text().splitlines()[0])
    again = make("sft", values, tmp_path / "again")
    assert (again.path / "model.safetensors").read_bytes() == (made.path / "model.safetensors").read_bytes()
    assert "teacher" in made.lineage()


def test_a_part_of_the_loss_may_follow_the_text(place: Path, tmp_path: Path) -> None:
    """With nothing of it following the teacher, the course is that of plain tuning on the same chats."""
    values = QUICK | {"base": str(place / "student"), "method": "full", "lr": 1e-2, "epochs": 2.0, "patience": 0}
    losses = []
    for name, more in (
        ("a", {"data": str(place / "lesson"), "distil": 0.0}),
        ("b", {"data": str(place / "shop.jsonl")}),
    ):
        made = make("sft", values | more, tmp_path / name)
        losses.append([json.loads(line)["loss"] for line in (made.path / "metrics.jsonl").read_text().splitlines()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base": "other"}, "its teacher's vocabulary is not that of"),
        ({"train_on": "last"}, "train_on was settled when .*lesson was made"),
        ({"new_tokens": ["<|x|>"]}, "new_tokens was settled"),
        ({"distil": 1.5}, "distil is a part of the loss, from 0 to 1"),
    ],
    ids=str,
)
def test_what_a_student_cannot_do(place: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    given = {"base": "student"} | values
    with pytest.raises(UserError, match=words):
        make("sft", QUICK | given | {"base": str(place / given["base"]), "data": str(place / "lesson")}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 1000}, "top_k is 1000, but the vocabulary of"),
        ({"temperature": 0.0}, "temperature must lie between"),
        ({"max_length": 6}, "longer than 6 tokens"),
    ],
    ids=str,
)
def test_what_a_teacher_cannot_be_asked(place: Path, tmp_path: Path, values: dict[str, Any], words: str) -> None:
    given = {"teacher": str(place / "teacher"), "data": str(place / "shop.jsonl"), "dtype": "float32"}
    with pytest.raises(UserError, match=words):
        make("logits", given | values, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_damaged_lesson_is_refused(place: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(place / "lesson", tmp_path / "lesson")
    file = tmp_path / "lesson" / "train.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match="lesson"):
        make("sft", QUICK | {"base": str(place / "student"), "data": str(tmp_path / "lesson")}, tmp_path / "x")


def test_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "logits", str(place / "teacher"), str(place / "shop.jsonl"), "--top_k", "4", "--dtype", "float32"]
    assert cli._run([*words, "--out", str(tmp_path / "lesson")]) == 0
    assert "of the teacher's probability" in capsys.readouterr().err


# --- by text ---


def test_a_teachers_answers_take_the_place_of_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "cache"))
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "old"},
                      {"role": "user", "content": f"again {n}"}, {"role": "assistant", "content": "old too"}]}
        for n in range(6)
    ]  # fmt: skip
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def script(text: str, number: int) -> Any:
        if text == "q4":
            return ["half an", "length"]
        if text == "again 5":
            return ""
        return f"new answer to {text}"

    with scripted_teacher(script) as server:
        values = {
            "teacher": server.url, "teacher_model": "m", "teacher_licence": "Apache-2.0", "data": str(data), "held_out": 0.0,
        }  # fmt: skip
        made = make("answers", values, tmp_path / "made")
        second = [r["messages"] for r in server.requests if r["messages"][-1]["content"] == "again 0"]
        assert second[0][1] == {"role": "assistant", "content": "new answer to q0"}  # what it said itself
        asked = len(server.requests)
        make("answers", values, tmp_path / "again")  # every answer is kept
        assert len(server.requests) == asked
    assert verify(made.path) == []
    (file,) = made.path.glob("train-*.jsonl.zst")
    chats = read_chats(file).chats
    assert len(chats) == 5
    assert all(m["content"].startswith("new answer to") for chat in chats for m in chat if m["role"] == "assistant")
    assert sorted(len(chat) for chat in chats) == [2, 4, 4, 4, 4]
    assert made.passport["data"]["synthetic_share"]
    assert made.passport["step"]["derived"] == {"asked": 11, "cut_off": 1, "unanswered": 1}


# --- the bundled teacher ---


@pytest.mark.slow
def test_cria_chat_teaches_a_smaller_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A student a fifth of its size, from random weights, on the example's questions: by probabilities, and by text."""
    from criadero.checkpoints import template_of, tokenizer_of
    from criadero.model import ModelConfig

    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "cache"))
    words = tokenizer_of("cria-chat")
    model = Llama(ModelConfig(
        vocab_size=words.vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=words.bos_id,
        eos_token_id=words.eos_id, pad_token_id=words.pad_id,
    ))  # fmt: skip
    model.initialise(1)
    (tmp_path / "student").mkdir()
    save_hf(model, model.config, tmp_path / "student")
    words.save(tmp_path / "student", chat_template=template_of("cria-chat").source)
    assert model.config.parameters() < load_model("cria-chat").config.parameters() / 5
    data = str(Path(cli.__file__).parents[1] / "examples" / "tienda.jsonl")
    make("answers", {"teacher": "cria-chat", "data": data, "limit": 60, "answer_tokens": 60, "data_licence": "CC0-1.0"},
         tmp_path / "text")  # fmt: skip
    make("logits", {"teacher": "cria-chat", "data": str(tmp_path / "text"), "top_k": 32}, tmp_path / "lesson")
    assert float(open_artifact(tmp_path / "lesson").metrics[0]["value"]) > 0.8
    found = {}
    for share in (0.0, 1.0):
        values = {"base": str(tmp_path / "student"), "data": str(tmp_path / "lesson"), "method": "full", "lr": 2e-3,
                  "epochs": 12.0, "distil": share, "patience": 0}  # fmt: skip
        made = make("sft", values, tmp_path / f"mine-{share}")
        found[share] = {(m["metric"], m["slice"]): float(m["value"]) for m in made.metrics}
    assert found[1.0]["divergence", "after"] < 0.7 * found[1.0]["divergence", "before"]
    assert found[1.0]["divergence", "after"] < found[0.0]["divergence", "after"]  # than learning the text alone
    print(found)
