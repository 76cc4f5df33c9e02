"""Models by name: adapters beside their base, loading on demand within a budget, unloading when idle; and the verb's own errors."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from pathlib import Path

import pytest
import tiny
from serving import MODEL, Live, serving, wait_for
from test_engine_adapters import make

from criadero import cli
from criadero.artifact import create
from criadero.checkpoints import weights_sample
from criadero.engine.llm import LLM
from criadero.serve.errors import ApiError
from criadero.serve.models import Pool
from criadero.serve.settings import Settings

PROMPT = [5, 80, 199, 20] * 6
ASK = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny.base(root / "base")
    tiny.base(root / "other", seed=1)
    make(root / "one", root / "base", 1)
    (root / "watched").mkdir()
    return root


def text(live: Live, model: str) -> str:
    answer = live.post("/v1/completions", {**ASK, "model": model})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_an_adapter_is_a_name_beside_its_base(places: Path) -> None:
    base, one = places / "base", places / "one"
    with serving(Settings(models=(str(one),), adapters=places / "watched")) as live:
        # it was named, its base came with it: it is the default one, which lists say first
        assert [row["id"] for row in live.get("/v1/models").json()["data"]] == ["one", "base"]
        page = live.get("/api/models").json()
        assert (page["default"], [row["id"] for row in page["models"]]) == ("one", ["one", "base"])
        wait_for(lambda: live.get("/ready").status_code == 200)
        assert [row["loaded"] for row in live.get("/api/models").json()["models"]] == [True, True]
        alone = LLM(base).complete(PROMPT, max_tokens=12, ignore_eos=True).text
        adapted = LLM(base)
        adapted.load_adapter("one", one)
        known = adapted.complete(PROMPT, max_tokens=12, ignore_eos=True, adapter="one").text
        assert alone != known
        found: dict[int, str] = {}
        names = ["base", "one"] * 4
        threads = [
            threading.Thread(target=lambda at=at: found.update({at: text(live, names[at])})) for at in range(len(names))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[at] for at in range(8)] == [alone, known] * 4
        receipt = live.post("/v1/completions", {**ASK, "model": "one"}).json()["criadero"]["receipt"]
        assert receipt["adapter"] == "one"
        assert receipt["model"] == "base"
        assert len(receipt["adapter_sha256"]) == 64
        # another appears while the server runs
        assert live.post("/v1/completions", {**ASK, "model": "two"}).status_code == 404
        make(places / "watched" / "two", base, 2)
        assert not live.get("/v1/models/two").json()["criadero"]["loaded"]  # its base is, but not it
        assert text(live, "two") not in (alone, known)
        assert live.get("/v1/models/two").json()["criadero"]["loaded"]
        assert "two" in [row["id"] for row in live.get("/v1/models").json()["data"]]
        # one that cannot be read says nothing of the default model
        make(places / "watched" / "broken", base, 3)
        assert live.get("/v1/models/broken").status_code == 200
        (places / "watched" / "broken" / "adapter_model.safetensors").write_bytes(b"no weights")
        assert live.post("/v1/completions", {**ASK, "model": "broken"}).status_code == 503
        assert live.get("/ready").status_code == 200


@pytest.mark.parametrize("kind", ["dora", "rows"])
def test_an_adapter_that_cannot_stand_beside_its_base(
    kind: str, places: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In the watched folder it is refused with the remedy before anything is loaded; named, it is a model of its own."""
    base, watched = places / "base", tmp_path / "watched"
    watched.mkdir()
    odd = make(watched / "odd", base, 4, dora=kind == "dora", rows=[5, 80] if kind == "rows" else [])
    what = {"dora": "scales the base's answer (DoRA)", "rows": "brings new tokens"}[kind]
    caplog.set_level("INFO", logger="criadero.serve")
    with serving(Settings(models=(str(base),), adapters=watched)) as live:
        wait_for(lambda: live.get("/ready").status_code == 200)
        for _ in range(2):
            answer = live.post("/v1/completions", {**ASK, "model": "odd"})
            assert answer.status_code == 404
            said = answer.json()["error"]["message"]
            assert f"odd is not served: odd: this adapter {what}" in said
            assert "fold it in with criadero merge odd and serve the result" in said
            assert str(tmp_path) not in said
        assert [row["id"] for row in live.get("/v1/models").json()["data"]] == ["base"]
    assert caplog.text.count("the adapter odd is not served") == 1
    wanted = LLM(odd).complete(PROMPT, max_tokens=12, ignore_eos=True).text
    assert wanted != LLM(base).complete(PROMPT, max_tokens=12, ignore_eos=True).text
    with serving(Settings(models=(str(odd),))) as live:
        assert text(live, "odd") == wanted
    assert f"this adapter {what}: it is a model of its own here" in caplog.text


def test_models_make_room_for_each_other(places: Path) -> None:
    names = (str(places / "base"), str(places / "other"))
    need = max(body.memory for body in Pool(Settings(models=names))._bodies.values())
    with serving(Settings(models=names, memory=round(need * 1.5))) as live:
        bodies = {entry.name: entry.body for entry in live.service.pool.entries.values()}
        wait_for(lambda: bodies["base"].worker is not None)
        first = text(live, "base")
        second = text(live, "other")
        assert (bodies["base"].worker, bodies["other"].worker is None) == (None, False)
        assert text(live, "base") == first
        assert text(live, "other") == second
        # one in use is not put out: the other has to wait
        worker = bodies["other"].worker
        assert worker is not None
        bodies["other"].users += 1
        refused = live.post("/v1/completions", {**ASK, "model": "base"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "models_busy")
        assert "retry-after" in refused.headers
        bodies["other"].users -= 1
        assert text(live, "base") == first
        assert text(live, "other") == second
        assert live.get("/ready").status_code == 200  # the default model comes back when it is asked for
        assert text(live, "base") == first
        assert 'criadero:model_loaded{model_name="other"} 0.0' in live.get("/metrics").text


def test_a_model_that_nobody_uses_is_unloaded_and_comes_back(places: Path) -> None:
    with serving(Settings(models=(str(places / "base"),), idle_unload=0.2)) as live:
        body = live.service.pool.entries["base"].body
        first = text(live, "base")
        wait_for(lambda: body.worker is None)
        assert live.get("/ready").status_code == 200
        assert text(live, "base") == first


def test_a_base_model_does_not_chat(tmp_path: Path) -> None:
    with serving(Settings(models=(str(tiny.base(tmp_path / "bare", template=None)),))) as live:
        answer = live.chat()
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")
        assert str(tmp_path) not in answer.text


def test_an_empty_name_is_the_default_model(places: Path) -> None:
    with serving(Settings(models=(str(places / "base"),))) as live:
        assert text(live, "") == text(live, "base")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", *words, "--no-open"])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert not said.out
    return said.err


def test_what_the_verb_refuses(
    places: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = ("--database", str(tmp_path / "x.db"))
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} is in use" in refused(capsys, MODEL, "--port", port)
    free = (*database, "--port", "0")
    assert "did you mean 'cria-chat'" in refused(capsys, "cria-chta", *free)
    assert "is too big" in refused(capsys, str(places / "base"), *free, "--memory", "1MB")
    assert "give a size" in refused(capsys, str(places / "base"), *free, "--memory", "much")
    assert "make one first with criadero keys create" in refused(
        capsys, str(places / "base"), *free, "--host", "0.0.0.0"
    )
    assert "make one first" in refused(capsys, str(places / "base"), *free, "--require-key")
    assert "not an address" in refused(capsys, str(places / "base"), *free, "--host", "999.1.1.1")
    assert "no such folder" in refused(capsys, str(places / "base"), *free, "--adapters", str(tmp_path / "none"))
    (tmp_path / "again").mkdir()
    both = str(tiny.base(tmp_path / "again" / "base", seed=3))
    assert "would both be served as 'base'" in refused(capsys, str(places / "base"), both, *free)
    (tmp_path / "a b").mkdir()
    assert "letters, digits" in refused(capsys, str(tiny.base(tmp_path / "a b" / "x y")), *free)
    assert "passport" in refused(capsys, str(places / "base"), *free, "--require-passport")
    with create(tmp_path / "sealed", kind="adapter", config={}) as draft:
        shutil.copytree(places / "one", draft.path, dirs_exist_ok=True)
        draft.model["base_sample"] = weights_sample(places / "other")
    assert "was made on other weights than" in refused(capsys, str(tmp_path / "sealed"), *free)
    monkeypatch.setenv("CRIADERO_API_KEY", "short")
    assert "shorter than" in refused(capsys, str(places / "base"), *free)


def test_the_pool_knows_the_nearest_name(places: Path) -> None:
    pool = Pool(Settings(models=(str(places / "base"),)))
    with pytest.raises(ApiError, match="did you mean 'base'"):
        pool.find("bas")
    assert pool.find("base").made_of is None
