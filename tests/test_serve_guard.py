"""``criadero serve --guard``: an answer ends where it copies what may not be copied, and every API says so."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import serving
from copier import ASKED, make

from criadero import cli
from criadero.engine.request import Output, Usage
from criadero.errors import UserError
from criadero.serve.app import make_pool
from criadero.serve.guarding import Guarding, Watch
from criadero.serve.replay import replay
from criadero.serve.settings import Settings
from criadero.serve.store import Store, open_store
from criadero.serve.telemetry import attributes
from criadero.tokenizer import StreamDecoder, load_tokenizer
from criadero.trust.search import open_index

pytest.importorskip("pydivsufsort", reason="criadero[trace] is not installed")
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    return make(tmp_path_factory.mktemp("copier"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = open_store(tmp_path_factory.mktemp("guard") / "criadero.db")
    yield made
    made.close()


@pytest.fixture(scope="module")
def live(copier: tuple[Path, Path, list[int]], store: Store) -> Iterator[serving.Live]:
    settings = Settings(models=(str(copier[0]),), guard=(str(copier[1]),), guard_tokens=10, keep_prompts=True)
    with serving.serving(settings, store=store) as made:
        yield made


@pytest.fixture(scope="module")
def copied(copier: tuple[Path, Path, list[int]]) -> str:
    """As much of the text as may be said: ten tokens, and the one that was too many."""
    decoder = StreamDecoder(load_tokenizer(copier[0]))
    return "".join(map(decoder.push, copier[2][:11]))  # half a character is never said


def idle(live: serving.Live) -> bool:
    return not live.worker.llm.engine.busy


def test_a_whole_answer_ends_and_says_why(
    copier: tuple[Path, Path, list[int]], live: serving.Live, store: Store, copied: str
) -> None:
    answer = live.chat(messages=ASKED, **GREEDY)
    assert answer.headers["x-criadero-guard"] == "stopped"
    body = answer.json()
    [choice] = body["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (copied, "content_filter")
    assert body["usage"]["completion_tokens"] == 11
    guard = body["criadero"]["guard"]
    assert (guard["index"], guard["tokens"]) == ("index", 10)
    [stopped] = guard["stopped"]
    assert (stopped["choice"], stopped["copied_tokens"], stopped["document"]) == (0, 11, "own #0")
    assert (stopped["source"], stopped["licence"]) == ("own", "CC-BY-NC-4.0")
    assert "not for commercial use" in stopped["asks"]
    receipt = store.receipt("local", body["criadero"]["receipt"]["id"])
    assert receipt is not None
    assert (receipt["finish_reasons"], receipt["guard"], receipt["answer_tokens"]) == (["guard"], guard, [11])
    again = replay(receipt, model=copier[0])
    assert (again.same, again.texts) == (True, [copied])  # and no more of it than was given
    assert replay(receipt | {"answer_ids": None}, model=copier[0]).same  # of hashes alone
    serving.wait_for(lambda: idle(live))


def test_a_stream_ends_as_the_whole(live: serving.Live, copied: str) -> None:
    answer = live.chat(messages=ASKED, stream=True, stream_options={"include_usage": True}, **GREEDY)
    assert answer.headers["x-criadero-guard"] == "on"  # nobody knew yet
    *pieces, last, usage, done = serving.events(answer.text)
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in pieces) == copied
    assert last["choices"][0]["finish_reason"] == "content_filter"
    assert last["criadero"]["guard"]["stopped"][0]["document"] == "own #0"
    assert (usage["usage"]["completion_tokens"], done) == (11, "[DONE]")
    serving.wait_for(lambda: idle(live))


def test_several_choices_and_token_ids(live: serving.Live, copied: str) -> None:
    body = live.chat(messages=ASKED, n=2, **GREEDY).json()
    assert [one["message"]["content"] for one in body["choices"]] == [copied] * 2
    assert [one["choice"] for one in body["criadero"]["guard"]["stopped"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 22
    ids = live.post("/tokenize", {"messages": ASKED, "add_generation_prompt": True}).json()["tokens"]
    made = live.post("/v1/completions", {"prompt": [ids, ids], **GREEDY})
    assert [(one["text"], one["finish_reason"]) for one in made.json()["choices"]] == [(copied, "content_filter")] * 2
    assert made.headers["x-criadero-guard"] == "stopped"
    serving.wait_for(lambda: idle(live))


def test_the_other_apis_say_it_in_their_words(live: serving.Live, copied: str) -> None:
    gpt = openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0)
    made = gpt.responses.create(model="model", input="Hi", temperature=0, max_output_tokens=40)
    assert (made.status, made.output_text) == ("incomplete", copied)
    assert made.incomplete_details
    assert made.incomplete_details.reason == "content_filter"
    with gpt.responses.stream(model="model", input="Hi", temperature=0, max_output_tokens=40) as events:
        assert [one.type for one in events][-1] == "response.incomplete"
    claude = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    asked: Any = {"model": "model", "max_tokens": 40, "messages": ASKED, "extra_body": {"temperature": 0}}
    message = claude.messages.create(**asked)
    assert (message.stop_reason, message.content[0].text) == ("refusal", copied)  # type: ignore[union-attr]
    with claude.messages.stream(**asked) as stream:
        assert stream.get_final_message().stop_reason == "refusal"


def test_what_is_no_copy_goes_on(copier: tuple[Path, Path, list[int]], live: serving.Live) -> None:
    other = live.chat(messages=[{"role": "user", "content": "Where is the shop?"}], **GREEDY)
    assert other.headers["x-criadero-guard"] == "on"
    assert other.json()["choices"][0]["finish_reason"] in ("length", "stop")
    assert other.json()["criadero"]["guard"]["stopped"] == []
    with serving.serving(Settings(models=(str(copier[0]),), guard=(str(copier[1]),))) as lenient:  # 50 may pass
        answer = lenient.chat(messages=ASKED, **GREEDY)
        assert (answer.headers["x-criadero-guard"], answer.json()["choices"][0]["finish_reason"]) == ("on", "length")
    with serving.serving(Settings(models=(str(copier[0]),))) as plain:
        answer = plain.chat(messages=ASKED, **GREEDY)
        assert "x-criadero-guard" not in answer.headers
        assert answer.json()["criadero"]["guard"] is None


def test_one_choice_may_go_on_while_another_is_stopped(copier: tuple[Path, Path, list[int]]) -> None:
    _, index, said = copier
    watch = Watch(Guarding(open_index(index), 10))
    for token in said[:11]:
        assert watch.look(Output(1, 0, [token], "x")).ids == [token]
        assert watch.look(Output(1, 1, [5], "y")).text == "y"
    assert watch.stopped.keys() == {0}
    assert not watch.over(2)  # the other goes on
    assert watch.look(Output(1, 0, [said[11]], "z")) == Output(1, 0)  # computed, but not said
    ended = watch.look(Output(1, 1, [], "", finish_reason="stop"))
    assert ended.finish_reason == "stop"
    assert watch.over(2)  # nobody listens any more: time to cancel
    last = watch.look(Output(1, 0, finish_reason="cancelled", done=True, usage=Usage(prompt=3, completion=24)))
    assert (last.finish_reason, last.done) == ("guard", True)
    assert last.usage is not None
    assert last.usage.completion == 22
    assert not watch.over(2)


def test_a_span_tells_of_it(live: serving.Live, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Recorder:
        def record(self, run: Any) -> None:
            seen.append(attributes(run, "chat"))

    monkeypatch.setattr(live.service, "telemetry", Recorder())
    live.chat(messages=ASKED, **GREEDY)
    serving.wait_for(lambda: seen)
    assert (seen[0]["gen_ai.response.finish_reasons"], seen[0]["criadero.guard.stopped"]) == (["guard"], 1)


def test_a_guard_that_cannot_be_is_said_at_the_start(
    copier: tuple[Path, Path, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, index, _ = copier
    other = make_other(tmp_path)
    for guard, tokens, why in (
        (str(tmp_path / "nothing"), 50, "no such file or folder"),
        (str(other), 50, "was not made of those"),
        (str(index), 3, "give 8 or more"),
    ):
        command = ["serve", str(model), "--port", "0", "--no-open", "--guard", guard, "--guard-tokens", str(tokens)]
        assert cli._run([*command, "--database", str(tmp_path / "db.sqlite")]) == 2
        said = capsys.readouterr().err.splitlines()
        [line] = [line for line in said if line.startswith("error: ")]
        assert why in line
    with pytest.raises(UserError, match=re.escape("--guard: ")):  # a bundled model, of other data than the index
        make_pool(Settings(models=(str(model), "cria-chat"), guard=(str(index),)))
    pool = make_pool(Settings(models=(str(model),), guard=(str(other), str(index))))  # of several, its own
    guarding = pool.entries["model"].guarding
    assert guarding is not None
    assert guarding.index.path == index


def make_other(folder: Path) -> Path:
    """An index of other tokens than the model's."""
    import numpy as np
    import tiny

    from criadero.artifact import create
    from criadero.trust.index import IndexRecipe, build_index

    words = tiny.tokenizer()
    with create(folder / "tokens", kind="tokens", config={}) as draft:
        np.asarray([words.bos_id, 5, 6, 7, words.eos_id], "<u2").tofile(draft.path / "train.bin")
        np.save(draft.path / "train.docs.npy", np.asarray([[0, 5, 0]], np.uint64))
        words.save(draft.path)
        about = {
            "dtype": "uint16",
            "vocab_size": words.vocab_size,
            "sources": [{"name": "a", "lang": "en", "kind": "text"}],
        }
        (draft.path / "tokens.json").write_text(json.dumps(about))
        draft.data["by_source"] = [{"name": "a", "licence": "CC0-1.0"}]
    return build_index(IndexRecipe(str(folder / "tokens")), folder / "other").path
