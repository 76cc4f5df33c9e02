"""Text in, text out: ``LLM`` against the plain model, its streams, batches, log-probabilities and embeddings."""

from __future__ import annotations

import gc
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from criadero.artifact import resolve
from criadero.chat import Message, render
from criadero.checkpoints import load_model, write_gguf
from criadero.engine.generate import generate
from criadero.engine.llm import LLM
from criadero.engine.request import SamplingParams
from criadero.errors import UserError

WORDS = tiny.tokenizer()


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(tiny.base(tmp_path_factory.mktemp("llm") / "base"), runner="torch", weights="float64")


@pytest.fixture(scope="module")
def plain(llm: LLM) -> Any:
    return load_model(llm.path, dtype=torch.float64)


def ask(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Any:
    yield
    gc.collect()
    llm.engine.step()  # what was cancelled says so
    assert not llm.engine.busy
    assert llm.engine.pages.used() == 0
    assert llm._boxes == {}
    llm.engine.pages.check()


def test_a_passport_can_be_required(tmp_path: Path) -> None:
    whole = Path(shutil.copytree(resolve("cria"), tmp_path / "whole"))
    assert LLM(whole, require_passport=True).complete("Hola", max_tokens=1).ids
    with (whole / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(UserError, match=r"passport is required: .*model\.safetensors"):
        LLM(whole, require_passport=True)
    LLM(whole)  # else nothing is hashed


# --- streams ---


def test_the_pieces_of_a_chat_are_the_text_of_its_ids(llm: LLM, plain: Any) -> None:
    for question in ("Can I pay by card?", "¿Abren los domingos?", "🦙"):
        prompt = render(ask(question), WORDS, llm.template, add_generation_prompt=True).ids
        settings: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_tokens": 60}
        ids = list(generate(plain, prompt, SamplingParams(**settings, stop_ids=WORDS.end_ids)))
        stream = llm.chat(ask(question), **settings)
        pieces = list(stream)
        assert "".join(pieces) == WORDS.decode(ids)
        assert all(pieces)
        assert stream.result is not None
        assert stream.result.ids == ids
        assert stream.result.text == "".join(pieces)
        assert (stream.result.usage.prompt, stream.result.usage.completion) == (len(prompt), len(ids))
    many = "".join("".join(llm.chat(ask(question), temperature=1.5, seed=s, max_tokens=60)) for s in range(4))
    assert "<|" not in many


def test_text_goes_on_from_a_beginning(llm: LLM, plain: Any) -> None:
    prompt = WORDS.encode("The shop", bos=True)
    ids = list(generate(plain, prompt, SamplingParams(max_tokens=20, stop_ids=WORDS.end_ids)))
    assert "".join(llm.generate("The shop", max_tokens=20)) == WORDS.decode(ids)
    assert llm.complete(prompt, max_tokens=20).ids == ids  # ids are taken as they are


def test_both_end_tokens_end_an_answer(llm: LLM) -> None:
    assert {WORDS.special["<|end|>"], WORDS.special["<|eos|>"]} <= set(WORDS.end_ids)
    for id in WORDS.end_ids:
        stream = llm.chat(ask("a"), logit_bias={id: 1000})
        assert list(stream) == []
        assert stream.result is not None
        assert (stream.result.finish_reason, stream.result.samples[0].stopped_by) == ("stop", id)
        assert len(llm.answer(ask("a"), logit_bias={id: 1000}, ignore_eos=True, max_tokens=5).ids) == 5
        kept = llm.answer(ask("a"), logit_bias={id: 500}, min_tokens=3, max_tokens=9)
        assert len(kept.ids) == 3


def test_a_stream_that_is_left_is_cancelled(llm: LLM) -> None:
    stream = llm.chat(ask("a"), max_tokens=80, ignore_eos=True)
    next(stream)
    assert llm.engine.busy
    assert llm.engine.pages.used() > 0
    stream.close()
    assert llm.engine.pages.used() == 0
    assert list(stream) == []
    stream = llm.chat(ask("a"), max_tokens=80, ignore_eos=True)
    next(stream)
    del stream  # letting go is enough


def test_two_streams_at_once_and_many_threads_do_not_mix(llm: LLM) -> None:
    settings: dict[str, Any] = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True}
    alone = ["".join(llm.chat(ask(f"{n}?"), seed=n, **settings)) for n in range(6)]
    one, other = llm.chat(ask("0?"), seed=0, **settings), llm.chat(ask("1?"), seed=1, **settings)
    texts = ["", ""]
    for _ in range(200):
        texts[0] += next(one, "")
        texts[1] += next(other, "")
    assert texts == alone[:2]
    found: dict[int, str] = {}

    def work(n: int) -> None:
        found[n] = "".join(llm.chat(ask(f"{n}?"), seed=n, **settings))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[n] for n in range(6)] == alone


# --- stop texts ---


def test_stop_texts_end_it_and_are_never_shown(llm: LLM) -> None:
    whole = llm.complete("The shop", max_tokens=60, temperature=0.7, seed=2, ignore_eos=True)
    text = whole.text
    for start in range(0, len(text) - 6, 11):
        for size in (1, 2, 5):
            stop = text[start : start + size]
            stream = llm.generate(
                "The shop", max_tokens=60, temperature=0.7, seed=2, ignore_eos=True, stop=[stop, "\0never"]
            )
            pieces = list(stream)
            assert stream.result is not None
            assert "".join(pieces) == text[: text.index(stop)]
            assert (stream.result.finish_reason, stream.result.samples[0].stopped_by) == ("stop", stop)
            assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))
    # what looks like the beginning of one is held back and given in the end
    almost = text[-4:] + "\0"
    assert llm.complete("The shop", max_tokens=60, temperature=0.7, seed=2, ignore_eos=True, stop=almost).text == text
    # none of them counts before min_tokens
    late = llm.complete(
        "The shop", max_tokens=60, min_tokens=20, temperature=0.7, seed=2, ignore_eos=True, stop=text[2:4]
    )
    assert len(late.ids) >= 20


def test_half_characters_are_mended_at_the_end(llm: LLM) -> None:
    first_byte = WORDS.encode("é")  # two byte tokens in this vocabulary, or one: take what begins it
    half = next(id for id in range(WORDS.vocab_size) if WORDS.token_bytes(id) == "é".encode()[:1])
    result = llm.complete("a", max_tokens=2, logit_bias={half: 1000})
    assert result.text == "\ufffd\ufffd"
    assert llm.complete("a", max_tokens=2, logit_bias={half: 1000}, stop="\ufffd\ufffd").text == ""
    assert first_byte


# --- many ---


def test_lists_give_lists_in_their_order(llm: LLM) -> None:
    prompts = ["The shop", "La tienda", "Yes", "No, we", ""]
    alone = [llm.complete(prompt, max_tokens=15).ids for prompt in prompts]
    assert [result.ids for result in llm.complete(prompts, max_tokens=15)] == alone
    found = dict(llm.each(prompts, max_tokens=15))
    assert [found[n].ids for n in range(len(prompts))] == alone
    chats = [ask(prompt) for prompt in prompts[:3]]
    assert [r.text for r in llm.answer(chats, max_tokens=9)] == [
        "".join(llm.chat(chat, max_tokens=9)) for chat in chats
    ]
    assert llm.complete([], max_tokens=3) == []
    for _, _ in llm.each(prompts, max_tokens=15):
        break  # the rest is cancelled


def test_samples_have_streams_of_their_own_and_share_the_prompt(llm: LLM, plain: Any) -> None:
    prompt = WORDS.encode("The shop opens at nine and closes at eight, and we are open on Sundays" * 2, bos=True)
    settings: dict[str, Any] = {"temperature": 1.2, "seed": 3, "max_tokens": 12, "n": 5, "ignore_eos": True}
    result = llm.complete(prompt, **settings)
    wanted = [list(generate(plain, prompt, SamplingParams(**settings), index)) for index in range(5)]
    assert [sample.ids for sample in result.samples] == wanted
    assert len({tuple(ids) for ids in wanted}) == 5
    assert result.usage.prompt == len(prompt)
    assert result.usage.completion == 60
    with pytest.raises(UserError, match="n above 1 has no one stream"):
        llm.generate("a", n=2)


def test_the_next_turn_finds_the_last_one_computed(llm: LLM) -> None:
    llm.engine.pages.clear()
    messages = ask("Can I pay by card, and are you open on Sundays, and do you deliver to the village?")
    first = llm.answer(messages, max_tokens=30)
    assert first.usage.cached == 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "a"}]  # type: ignore[list-item]
    second = llm.answer(messages, max_tokens=4)
    page = llm.runner.page
    assert second.usage.cached >= (first.usage.prompt // page) * page > 0


# --- log-probabilities and vectors ---


def test_log_probabilities_are_the_models(llm: LLM, plain: Any) -> None:
    prompt = WORDS.encode("The shop opens at nine", bos=True)
    result = llm.complete(prompt, max_tokens=8, temperature=2.0, seed=1, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    ids = prompt + result.ids
    with torch.no_grad():
        wanted = torch.log_softmax(plain(torch.tensor([ids]))[0].double(), -1)  # [T, V]
    logprobs = result.samples[0].logprobs
    assert logprobs is not None
    assert [one.id for one in logprobs] == result.ids
    for place, one in enumerate(logprobs, len(prompt)):
        assert one.logprob == pytest.approx(float(wanted[place - 1, ids[place]]), abs=1e-5)
        assert [id for id, _ in one.top] == wanted[place - 1].topk(3).indices.tolist()
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(prompt)
    for place, known in enumerate(result.prompt_logprobs[1:], 1):
        assert known is not None
        assert known.logprob == pytest.approx(float(wanted[place - 1, ids[place]]), abs=1e-5)
    scored = llm.logprobs(["The shop opens at nine", "a"], top=2)
    assert scored[0] == result.prompt_logprobs
    assert llm.complete("a", max_tokens=2).samples[0].logprobs is None


def test_embeddings_are_the_hidden_states(llm: LLM, plain: Any) -> None:
    texts = ["The shop opens at nine and closes at eight.", "a", "¿Abren los domingos?" * 4, "a"]
    for pooling in ("mean", "last"):
        got = llm.embed(texts, pooling=pooling)  # type: ignore[arg-type]
        assert got.dtype == np.float32
        for text, vector in zip(texts, got, strict=True):
            with torch.no_grad():
                hidden = plain(torch.tensor([llm.ids(text)]), return_hidden=True)[0].double()
            wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
            np.testing.assert_allclose(vector, (wanted / wanted.norm()).numpy(), atol=1e-5)
    assert llm.embed([]).shape == (0, 32)
    with pytest.raises(UserError, match="pooling is 'max'"):
        llm.embed(["a"], pooling="max")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="put the text in a list"):
        llm.embed("a")


# --- what cannot be ---


def test_a_chat_that_is_too_long(llm: LLM) -> None:
    turns: list[Message] = [{"role": "system", "content": "Be short."}]
    for n in range(30):
        turns += [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": "Yes, on Sundays."}]
    turns += ask("a")
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens and the model's context is 128; shorten it"):
        llm.chat(turns)
    result = llm.answer(turns, truncate="oldest", max_tokens=10)
    assert 0 < result.dropped_messages < 61
    stream = llm.chat(turns, truncate="oldest", max_tokens=10)
    assert "".join(stream) == result.text
    assert stream.result is not None
    assert stream.result.dropped_messages == result.dropped_messages
    with pytest.raises(UserError, match=r"this message takes \d+ tokens and the model's context is 128"):
        llm.answer(ask("long " * 300), truncate="oldest")
    with pytest.raises(UserError, match="truncate is 'middle'"):
        llm.chat(ask("a"), truncate="middle")  # type: ignore[arg-type]


def test_a_bad_prompt_in_a_list_is_named_before_anything_is_computed(llm: LLM) -> None:
    steps = llm.engine.steps
    with pytest.raises(
        UserError, match="prompt 2 of 3: the prompt has the token id 300, but the vocabulary's are 0 to 299"
    ):
        llm.complete([[1], [300], [2]])
    with pytest.raises(UserError, match="prompt 3 of 3: the prompt is empty"):
        llm.complete([[1], [5], []])
    assert llm.engine.steps == steps
    with pytest.raises(UserError, match="unknown sampling parameter 'temprature'; there are temperature, top_k"):
        llm.chat(ask("a"), temprature=1)
    with pytest.raises(UserError, match="logit_bias names the token id 300"):
        llm.complete("a", logit_bias={300: 1})
    with pytest.raises(UserError, match="there is no adapter 'shop'; loaded: none"):
        llm.complete("a", adapter="shop")


def test_a_base_without_template_can_go_on_but_not_chat(tmp_path: Path) -> None:
    llm = LLM(tiny.base(tmp_path / "plain", template=None), runner="torch")
    assert isinstance("".join(llm.generate("The shop", max_tokens=4)), str)
    with pytest.raises(UserError, match="has no chat template"):
        llm.chat(ask("a"))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = tiny.base(tmp_path / "small", vocab_size=200)
    with pytest.raises(UserError, match="300 tokens but the model 200 embeddings"):
        LLM(folder)


def test_a_gguf_file_can_be_talked_to(llm: LLM, tmp_path: Path) -> None:
    model = load_model(llm.path)
    write_gguf(model, llm.tokenizer, tmp_path / "m.gguf", type="F32", template=llm.template.source)
    other = LLM(tmp_path / "m.gguf", runner="torch", weights="float64")
    messages = ask("Can I pay by card?")
    assert "".join(other.chat(messages, max_tokens=20)) == "".join(llm.chat(messages, max_tokens=20))
    write_gguf(model, llm.tokenizer, tmp_path / "plain.gguf", type="F32")
    with pytest.raises(UserError, match=r"plain\.gguf has no chat template"):
        LLM(tmp_path / "plain.gguf", runner="torch").chat(messages)


def test_other_number_formats_and_runners(llm: LLM) -> None:
    other = LLM(llm.path, runner="torch", weights="bfloat16")
    assert other.runner.name == "torch cpu bfloat16"
    assert isinstance("".join(other.chat(ask("a"), max_tokens=4)), str)
    for options, message in (
        ({"runner": "rust"}, "there is no runner 'rust'"),
        ({"weights": "int3", "runner": "torch"}, "weights 'int3': the torch runner computes in"),
        ({"threads": 0}, "threads must lie between"),
        ({"kv_memory": 1}, "1 bytes for the cache is less than one page"),
        ({"sequences": 0}, "sequences"),
    ):
        with pytest.raises(UserError, match=message):
            LLM(llm.path, **options)  # type: ignore[arg-type]
