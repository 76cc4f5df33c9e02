"""Traces of answers, the guard, and which index is a model's own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from copier import make as make_copier
from test_trace_index import brute, brute_longest, index_of, some_texts

from criadero import terminal
from criadero.artifact import bundled_models, create
from criadero.data.build import DataRecipe, JsonlWriter, Source, as_row, build_data
from criadero.data.documents import Document
from criadero.data.pack import TokensRecipe, build_tokens
from criadero.engine.llm import LLM
from criadero.errors import UserError
from criadero.run import run
from criadero.trust import trace as tracing
from criadero.trust.asks import asks, forbids
from criadero.trust.guard import Guard, Hit, same_words
from criadero.trust.index import IndexRecipe, build_index
from criadero.trust.last import keep_last, last_answer, last_file
from criadero.trust.search import Index, open_index
from criadero.trust.trace import data_of, index_for, long_matches, maximal, share, trace

pytest.importorskip("pydivsufsort", reason="criadero[trace] is not installed")

POEM = (
    "The old lighthouse keeper climbed the spiral stairs each evening, counting one hundred and twelve of them aloud, and "
    "lit the lamp before the fishing boats turned home."
)
RECIPE = (
    "Se pelan las patatas, se cortan en rodajas finas y se fríen a fuego lento en abundante aceite de oliva; después se "
    "mezclan con los huevos batidos."
)
FILLER = [
    f"On day {n} the ferry left at {n % 12 + 1} and carried {n * 7 % 50} people, {n * 3 % 11} dogs and a cart of apples."
    for n in range(40)
]


def documents() -> list[Document]:
    texts = [(POEM, "en", "poems", "CC-BY-NC-4.0"), (RECIPE, "es", "cocina", "CC-BY-SA-4.0")]
    texts += [(text, "en", "ferry", "CC0-1.0") for text in FILLER]
    texts += [(f"Quoted in a letter: {POEM} So it ends.", "en", "letters", "CC-BY-ND-4.0")]
    miles = " ".join(f"Mile {n} of the road: {n * n} stones, {n * 13 % 17} crows." for n in range(20))
    texts += [(miles, "en", "road", "CC0-1.0")]
    return [
        Document(f"{source}/{n}", text, lang, source, licence) for n, (text, lang, source, licence) in enumerate(texts)
    ]


def plain_recipe(file: Path, **more: Any) -> DataRecipe:
    """A data recipe that takes a file as it is."""
    source = Source(name=file.stem, path=str(file), licence="CC0-1.0", min_words=1, lang="en", trusted=True)
    return DataRecipe(source=(source,), quality_filter=False, language_filter=False, held_out=0.0, **more)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, its tokens, an index of them, and a model that says it was trained on them."""
    from criadero.tokenizer import train_bpe

    root = tmp_path_factory.mktemp("trace")
    rows = documents()
    with create(root / "data", kind="dataset", config={}) as draft:
        with JsonlWriter(draft.path / "train-00000.jsonl.zst") as writer:
            for row in rows:
                writer.write({**as_row(row), "date": "1911"} if row.source == "poems" else as_row(row))
        draft.data["by_source"] = [
            {
                "name": name,
                "licence": next(r.licence for r in rows if r.source == name),
                "url": f"https://example.org/{name}",
            }
            for name in dict.fromkeys(r.source for r in rows)
        ]
    with create(root / "tokenizer", kind="tokenizer", config={}) as draft:
        train_bpe([row.text for row in rows], 400).save(draft.path)
    build_tokens(TokensRecipe(str(root / "data"), str(root / "tokenizer")), root / "tokens")
    build_index(IndexRecipe(str(root / "tokens")), root / "index")
    with create(root / "model", kind="base", config={}) as draft:
        draft.add_input("trained_on", root / "tokens")
    with create(root / "tuned", kind="chat", config={}) as draft:
        draft.add_input("finetune_of", root / "model")
    return root


@pytest.fixture(scope="module")
def index(built: Path) -> Index:
    return open_index(built / "index")


# -- spans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_least", [2, 3, 5, 8])
def test_long_matches_are_those_of_every_position(tmp_path: Path, at_least: int) -> None:
    texts = some_texts(at_least, 4)
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=800)
    random = np.random.default_rng(1)
    for _ in range(10):
        query = [token for _ in range(3) for token in texts[int(random.integers(len(texts)))][:30]]
        expected = np.array([brute_longest(texts, query, start) for start in range(len(query))])
        expected[expected < at_least] = 0
        assert long_matches(index, query, at_least).tolist() == expected.tolist()
        runs = maximal(expected, np.arange(len(query)), len(query), at_least)
        every = [(s, s + int(n)) for s, n in enumerate(expected) if n]
        inside = [one for one in every if not any(a <= one[0] and one[1] <= b and (a, b) != one for a, b in every)]
        assert runs == inside


def test_share_counts_a_token_once() -> None:
    assert share([(0, 8), (4, 20), (50, 60)], 100, 8) == pytest.approx(0.3)
    assert share([(0, 8), (4, 20), (50, 60)], 100, 16) == pytest.approx(0.16)
    assert share([], 10, 8) == 0


def test_an_answer_with_a_copied_sentence(index: Index) -> None:
    copied = POEM[: POEM.index(", and lit")]
    answer = f"I think it was so: {copied}. Nobody has told me more than that, whoever you ask."
    found = trace(index, answer)
    assert found.longest is not None
    assert found.longest.text.strip(" :") == copied  # the letter has a colon before it too
    assert found.longest.count in (1, 2)
    assert {one.document.source for one in found.longest.found} <= {"poems", "letters"}
    span = max(found.spans, key=lambda one: one.tokens)
    assert answer[span.from_char : span.to_char] == span.text
    assert span.count == brute([index.tokens.tolist()], index.encode(answer)[span.start : span.end])
    assert found.covered[8] >= found.covered[16] >= found.covered[32] > 0
    assert json.loads(json.dumps(found.as_dict()))["caution"][1] == "coincidencia literal, no prueba de causa"


def test_a_document_has_its_id_licence_and_date(index: Index) -> None:
    found = trace(index, POEM)
    assert found.covered[32] == 1.0
    assert found.longest is not None
    assert found.longest.count == 2  # the poem, and the letter that quotes it: with and without a space before it
    poem = next(one for one in found.longest.found if one.document.source == "poems")
    assert (poem.document.name, poem.document.licence) == ("poems/0", "CC-BY-NC-4.0")
    assert (poem.document.date, poem.document.lang) == ("1911", "en")
    assert poem.document.url == "https://example.org/poems"
    assert poem.text.strip() == POEM
    letter = next(one for one in found.longest.found if one.document.source == "letters")
    assert letter.before.strip().endswith("in a letter:")
    assert letter.after.startswith(" So it")


def test_spans_begin_and_end_with_words(index: Index) -> None:
    found = trace(index, "xylo" + POEM[1:60] + "zzz and then the ferry left at 3 and carried 7 people, said he.")
    assert found.spans
    for span in found.spans:
        before, after = found.text[: span.from_char], found.text[span.to_char :]
        assert not (before[-1:].isalnum() and span.text[:1].isalnum())
        assert not (after[:1].isalnum() and span.text[-1:].isalnum())


def test_what_was_never_read(index: Index) -> None:
    found = trace(index, "Quantum zebras juggle vivid hexagons; why would anybody expect jazz from them?")
    assert found.spans == []
    assert found.longest is None
    assert set(found.covered.values()) == {0.0}


def test_short_long_and_empty_texts(index: Index) -> None:
    one = trace(index, "the")
    assert (one.spans, one.longest) == ([], None)
    long = trace(index, (POEM + " But then. ") * 300)
    assert len(long.spans) <= tracing.MOST_SPANS
    assert long.covered[32] > 0.8
    for text in ("", "  \n"):
        with pytest.raises(UserError, match="the text is empty"):
            trace(index, text)
    trace(index, "half a \ud83d is a token that was never read")
    with pytest.raises(UserError, match="min_tokens must be 2 or more"):
        trace(index, "the ferry", min_tokens=1)


def test_words_of_scripts_without_spaces() -> None:
    assert tracing.word_starts("ab", [(0, 1), (1, 2)]).tolist() == [True, False, True]
    assert tracing.word_starts("東京", [(0, 1), (1, 2)]).tolist() == [True, True, True]


# -- whose index ------------------------------------------------------------------------------------------------------


def test_a_model_is_traced_in_the_index_of_its_own_data(built: Path, tmp_path: Path) -> None:
    assert index_for(built / "model").path == built / "index"  # it lies beside it
    assert index_for(built / "tuned", built / "index").size
    (tmp_path / "notes.txt").write_text("something else")
    with create(tmp_path / "other", kind="base", config={}) as draft:
        draft.add_input("trained_on", tmp_path / "notes.txt")
        draft.add_input("evaluated_on", built / "tokens")  # what it was measured on it has not learned
    with pytest.raises(UserError, match="was not made of those"):
        index_for(tmp_path / "other", built / "index")
    with pytest.raises(UserError, match="no index of what other was trained on"):
        index_for(tmp_path / "other")
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no passport"):
        data_of(tmp_path / "imported")
    with pytest.raises(UserError, match="is a tokens, not an index"):
        index_for(built / "model", built / "tokens")


def test_an_index_of_a_part_of_the_data_is_taken_and_says_so(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model tuned on a dataset, or on the very files of one, is traced in an index of that dataset's tokens."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "a", "text": f"{POEM} {FILLER[0]}"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "b", "text": RECIPE}) + "\n")
    made = build_data(plain_recipe(tmp_path / "a.jsonl"), tmp_path / "data")
    build_tokens(TokensRecipe(str(made.path), str(built / "tokenizer")), tmp_path / "tokens")
    build_index(IndexRecipe(str(tmp_path / "tokens")), tmp_path / "out" / "x" / "index")
    with create(tmp_path / "of-dataset", kind="base", config={}) as draft:
        draft.add_input("trained_on", made)
    with create(tmp_path / "models" / "of-files", kind="base", config={}) as draft:
        draft.add_input("trained_on", tmp_path / "a.jsonl")
        draft.add_input("trained_on", tmp_path / "b.jsonl")
    with create(tmp_path / "of-b", kind="base", config={}) as draft:
        draft.add_input("trained_on", tmp_path / "b.jsonl")
    monkeypatch.chdir(tmp_path)
    index = Path("out/x/index")
    capsys.readouterr()
    assert index_for("of-dataset", index).path == index
    assert capsys.readouterr().err == ""
    assert index_for("models/of-files").path == index  # found under out/
    assert "holds a part of what of-files learned from; not in it: b.jsonl (1 of 2)" in capsys.readouterr().err
    with pytest.raises(UserError, match="of-b was not made of those"):
        index_for("of-b", index)


def test_the_bundled_chat_model_is_traced_in_the_chats_of_this_repository(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """recipes/cria-chats as it stands: what a clone can trace without downloading anything."""
    if "cria-chat" not in bundled_models():
        pytest.skip("criadero/bundled/cria-chat is not there yet: it is raised by recipes/cria")
    monkeypatch.chdir(tmp_path)
    run(Path(__file__).resolve().parents[1] / "recipes" / "cria-chats")
    found = trace(index_for("cria-chat"), "Claro: la miel es un alimento dulce. La hacen las abejas.")
    assert "out/cria-chats/03-index holds a part of what cria-chat learned from" in capsys.readouterr().err
    assert found.longest is not None
    assert found.longest.found[0].document.source == "cria_chats"


def test_the_index_says_what_it_is_of(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from criadero.artifact import open_artifact, verify

    made = open_artifact(built / "index")
    assert verify(made.path) == []
    assert made.inputs[0]["relation"] == "converted_from"
    assert made.inputs[0]["id"] == open_artifact(built / "tokens").id
    assert made.sources()[0]["name"] == "poems"
    with pytest.raises(UserError, match="is a dataset, not tokens"):
        build_index(IndexRecipe(str(built / "data")), tmp_path / "index")
    with pytest.raises(UserError, match="is not the dataset"):
        build_index(IndexRecipe(str(built / "tokens"), str(built / "model")), tmp_path / "index")
    monkeypatch.setitem(__import__("sys").modules, "pydivsufsort.dll", None)
    with pytest.raises(UserError, match=r"pip install pydivsufsort, or 'criadero\[trace\]'"):
        build_index(IndexRecipe(str(built / "tokens")), tmp_path / "index")


def test_without_the_dataset_documents_have_numbers(
    built: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from shutil import copytree, move

    copytree(built / "tokens", tmp_path / "tokens")
    move(built / "data", built / "away")
    try:
        build_index(IndexRecipe(str(tmp_path / "tokens")), tmp_path / "index")
    finally:
        move(built / "away", built / "data")
    assert "the dataset is not at hand" in capfd.readouterr().err
    place = open_index(tmp_path / "index").document(0)
    assert (place.name, place.licence) == ("poems #0", "CC-BY-NC-4.0")


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"format": "criadero-index/9"}'])
def test_a_spoilt_head_is_a_line(built: Path, tmp_path: Path, text: str) -> None:
    from shutil import copytree

    copytree(built / "index", tmp_path / "index")
    (tmp_path / "index" / "index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        open_index(tmp_path / "index")


# -- the guard --------------------------------------------------------------------------------------------------------


def naive_guard(texts: list[list[int]], refused: set[int], ids: list[int], most: int) -> list[bool]:
    """At each token whether the last most + 1 stand in the texts, and only in refused ones."""
    out = []
    for n in range(1, len(ids) + 1):
        run = ids[max(0, n - most - 1) : n]
        where = {k for k, text in enumerate(texts) if brute([text], run)}
        out.append(n > most and bool(where) and where <= refused)
    return out


@pytest.mark.parametrize("most", [8, 9, 13, 20])
def test_the_guard_sees_what_looking_at_every_token_sees(tmp_path: Path, most: int) -> None:
    texts = some_texts(most, 5)
    index = index_of(
        tmp_path / "index", texts, 300, shard_bytes=900
    )  # every second document is CC0, the others unknown
    refused = {n for n in range(len(texts)) if n % 2}
    random = np.random.default_rng(most)
    seen = 0
    for _ in range(4):
        parts = [texts[int(random.integers(len(texts)))] for _ in range(4)]
        ids = [token for part in parts for token in part[int(random.integers(5)) : int(random.integers(10, 90))]]
        guard = Guard(index, most)
        hits = [guard.push(token) for token in ids]
        assert [hit is not None for hit in hits] == naive_guard(texts, refused, ids, most)
        for n, hit in enumerate(hits, 1):
            if hit:
                seen += 1
                assert hit.document.licence == "unknown"
                assert brute(texts, ids[n - hit.tokens : n])
                assert hit.tokens == n or not brute(texts, ids[n - hit.tokens - 1 : n])
    assert seen


def test_the_guard_asks_what_the_licence_allows(index: Index) -> None:
    def hits(text: str, **settings: Any) -> int:
        guard = Guard(index, 12, **settings)
        return sum(guard.push(token) is not None for token in index.encode(text))

    assert hits(POEM) > 0  # CC-BY-NC and CC-BY-ND, and nowhere else
    assert hits(RECIPE) == 0  # CC-BY-SA: it may be copied, with attribution
    assert hits(FILLER[3]) == 0
    assert hits(RECIPE, forbidden=lambda licence: "SA" in licence) > 0
    with pytest.raises(UserError, match="give 8 or more"):
        Guard(index, 3)


@pytest.mark.parametrize(
    ("licence", "words", "refused"),
    [
        ("CC0-1.0", "nothing", False),
        ("public domain in the US", "nothing", False),
        ("CC BY 4.0", "its authors named", False),
        ("CC-BY-SA-4.0", "its authors named, the same licence for what it becomes part of", False),
        ("CC-BY-NC-4.0", "not for commercial use, its authors named", True),
        ("CC BY-NC-ND 4.0", "not for commercial use, only whole and unchanged, its authors named", True),
        ("CC-BY-ND-4.0", "only whole and unchanged, its authors named", True),
        ("CC-BY-NC-4.0 OR MIT", "the copyright notice and the licence kept", False),
        ("public domain (life+70), markup CC0-1.0", "nothing", False),
        (
            "MIT / Verdant-1.0",
            "the copyright notice and the licence kept, not known (Verdant-1.0): ask before use",
            True,
        ),
        ("Apache-2.0 / PSF-2.0", "the copyright notice and the licence kept", False),
        ("MIT", "the copyright notice and the licence kept", False),
        (
            "GPL-3.0-only",
            "the copyright notice and the licence kept, the same licence for what it becomes part of",
            False,
        ),
        ("", "not known (no licence given): ask before use", True),
        ("unknown", "not known (unknown): ask before use", True),
        ("All rights reserved", "nothing is allowed beyond what the law allows", True),
    ],
)
def test_what_a_licence_asks(licence: str, words: str, refused: bool) -> None:
    assert (asks(licence), forbids(licence)) == (words, refused)


# -- the last answer --------------------------------------------------------------------------------------------------


def test_the_last_answer_is_kept_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with pytest.raises(UserError, match="there is no last answer"):
        last_answer()
    keep_last("cria", "Sí, claro.")
    assert last_answer() == ("cria", "Sí, claro.")
    assert last_file().stat().st_mode & 0o777 == 0o600
    last_file().write_text("{")
    with pytest.raises(UserError, match="there is no last answer"):
        last_answer()
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null/nowhere")
    keep_last("cria", "lost")  # a home that cannot be written stops no chat


@pytest.fixture(scope="module")
def copier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[int]]:
    return make_copier(tmp_path_factory.mktemp("copier"))


def test_a_guarded_chat_stops_where_it_copies(copier: tuple[Path, Path, list[int]]) -> None:
    model, index, said = copier
    assert len(said) > 20
    out = io.StringIO()
    terminal.chat(model, temperature=0.0, max_tokens=40, guard=str(index), guard_tokens=10, lines=["Hi"], out=out)
    assert "stopped by the guard: 11 tokens as in own #0 (own): " in out.getvalue()
    out = io.StringIO()
    terminal.chat(model, temperature=0.0, max_tokens=40, guard=str(index), lines=["Hi"], out=out)  # 50 may pass
    assert "guard" not in out.getvalue()
    llm = LLM(model)
    stream = llm.chat(
        [{"role": "user", "content": "Hi"}], max_tokens=40, temperature=0.0, watch=Guard(open_index(index), 10).push
    )
    list(stream)
    assert stream.result is not None
    assert stream.result.ids == said[:11]
    assert isinstance(stream.hit, Hit)
    assert stream.hit.tokens == 11
    llm.engine.step()
    assert not llm.engine.busy  # what was cancelled leaves nothing behind


def test_a_guard_of_other_data_or_other_tokens_is_refused(copier: tuple[Path, Path, list[int]], built: Path) -> None:
    model, index, _ = copier
    with pytest.raises(UserError, match="was not made of those"):
        terminal.chat(model, guard=str(built / "index"), lines=["Hi"], out=io.StringIO())
    with pytest.raises(UserError, match="give 8 or more"):
        terminal.chat(model, guard=str(index), guard_tokens=3, lines=["Hi"], out=io.StringIO())
    with pytest.raises(UserError, match="another tokenizer"):
        same_words(open_index(built / "index"), LLM(model).tokenizer)
    guard = Guard(open_index(index))
    assert guard.push(10**6) is None  # a token that the model has and the data has not
