"""What else the index is for: contamination of benchmarks, repeated text, requests for removal, memorisation; and the verbs."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_trace import FILLER, POEM, RECIPE, built, index, plain_recipe
from test_trace_index import BOS, EOS, brute, index_of, some_texts

from criadero import cli
from criadero.artifact import create, open_artifact, verify
from criadero.data.build import build_data, read_dataset
from criadero.data.docset import document_hash, read_table
from criadero.data.pack import TokensRecipe, build_tokens
from criadero.errors import UserError
from criadero.trust import contamination, memorisation
from criadero.trust.index import IndexRecipe, build_index
from criadero.trust.removal import holders, search
from criadero.trust.repeats import UniqueRecipe, build_unique, by_source, repeats
from criadero.trust.search import Index

assert built
assert index  # fixtures


# -- contamination ----------------------------------------------------------------------------------------------------


def naive_contaminated(texts: list[list[int]], query: list[int]) -> list[bool]:
    """Llama 2's rule, every pair of positions one by one."""
    mask = [False] * len(query)
    for text in texts:
        for i in range(len(query)):
            for j in range(len(text)):
                if query[i : i + 10] != text[j : j + 10] or len(query) - i < 10 or len(text) - j < 10:
                    continue
                wrong = 0
                for k in range(min(len(query) - i, len(text) - j)):
                    wrong += query[i + k] != text[j + k]
                    if wrong > 4:
                        break
                    mask[i + k] |= query[i + k] == text[j + k]
    return mask


def test_contaminated_tokens_are_those_of_every_pair_of_places(tmp_path: Path) -> None:
    texts = some_texts(11, 6, n=25)
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=600)
    random = np.random.default_rng(0)
    some = 0
    for _ in range(8):
        query = [token for _ in range(3) for token in texts[int(random.integers(25))][:40]]
        for at in random.integers(0, len(query), 6).tolist():
            query[at] = 299
        mask, document = contamination.contaminated(index, query)
        assert mask.tolist() == naive_contaminated(texts, query)
        some += int(mask.sum())
        assert (document is not None) == bool(mask.any())
    assert some
    assert contamination.contaminated(index, [2, 3])[0].tolist() == [False, False]


def test_up_to_four_tokens_may_differ(tmp_path: Path) -> None:
    text = list(range(10, 60))
    index = index_of(tmp_path / "index", [text], 300)
    query = list(text)
    for at in (12, 15, 20, 30, 40):
        query[at] = 299
    mask, _ = contamination.contaminated(index, query)
    assert np.flatnonzero(~mask).tolist() == [
        12,
        15,
        20,
        30,
        *range(40, 50),
    ]  # the fifth ends it; what follows is too short


def test_scores_of_the_clean_part(index: Index, tmp_path: Path) -> None:
    file = tmp_path / "exam.jsonl"
    fresh = "Which of these vivid zebras juggles hexagons beneath the quiet moon, and what does she expect for it?"
    rows = [{"question": POEM, "answer": "", "right": 1}, {"question": fresh, "answer": "None", "right": 0}]
    rows.append({"question": fresh[:50] + POEM[:70], "answer": "It was.", "right": 0.5})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = contamination.check(index, contamination.read_items(file, ["question", "answer"], "right"))
    assert [item.touched for item in items] == [True, False, True]
    assert items[0].dirty
    assert items[1].clean
    assert items[0].document in ("poems/0", "letters/42")
    table = contamination.summary(items)["parts"]
    assert [table[name]["items"] for name in ("all", "clean", "not clean", "not dirty", "dirty")] == [3, 1, 2, 2, 1]
    assert (table["all"]["score"], table["clean"]["score"], table["dirty"]["score"]) == (0.5, 0.0, 1.0)
    assert table["dirty"]["z"] == pytest.approx(0.5 / np.std([1, 0, 0.5]))
    assert "2 of 3 items have 13 tokens in a row" in contamination.as_text(items)
    for fields, score, message in (
        (["query"], "", "no field 'query'"),
        (["question"], "answer", "not a number"),
        (["right"], "", "no text in it"),
    ):
        with pytest.raises(UserError, match=message):
            list(contamination.read_items(file, fields, score))
    with pytest.raises(UserError, match="no item to check"):
        contamination.summary([])


# -- repeats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "shard_bytes"), [(8, 1 << 20), (9, 700), (20, 500)])
def test_repeats_are_those_of_every_sequence(
    tmp_path: Path, length: int, shard_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from criadero.trust import repeats as module

    monkeypatch.setattr(module, "PIECE", 333)
    texts = some_texts(length, 5)
    texts.append([7] * 50)  # overlaps itself
    index = index_of(tmp_path / "index", texts, 300, shard_bytes=shard_bytes)
    found = repeats(index, length)
    ids = index.tokens.tolist()
    seen: dict[tuple[int, ...], int] = {}
    mask, again = np.zeros(len(ids), bool), np.zeros(len(ids), bool)
    for at in range(len(ids) - length + 1):
        part = tuple(ids[at : at + length])
        if BOS in part or EOS in part:
            continue
        if part in seen:
            mask[at : at + length] = True
            again[seen[part] : seen[part] + length] = again[at : at + length] = True
        seen.setdefault(part, at)
    expected = np.zeros(len(ids), bool)
    for start, end in found.ranges.tolist():
        assert not expected[start:end].any()
        expected[start:end] = True
    assert expected.tolist() == mask.tolist()
    assert (found.tokens, found.again) == (int(mask.sum()), int(again.sum()))
    assert found.tokens
    rows = by_source(index, found)
    assert sum(row["repeated"] for row in rows) == found.tokens
    assert sum(row["tokens"] for row in rows) == index.size
    for (_, a), (b, _) in pairwise(found.ranges.tolist()):
        assert a <= b
    with pytest.raises(UserError, match="give 8 or more"):
        repeats(index, 7)


def test_tokens_without_what_stood_before(built: Path, tmp_path: Path, index: Index) -> None:
    from criadero.data.pack import TokensRecipe, build_tokens
    from criadero.trust.index import IndexRecipe, build_index

    made = build_unique(UniqueRecipe(str(built / "tokens"), str(built / "index"), 20), tmp_path / "unique")
    assert verify(made.path) == []
    about = json.loads((made.path / "tokens.json").read_text())
    metrics = {row["name"]: row["value"] for row in made.metrics}
    gone = metrics["repeated tokens removed"]
    assert gone == repeats(index, 20).tokens > 0
    assert sum(row["train"]["tokens"] for row in about["sources"]) == index.size - gone == metrics["train tokens"]
    assert {row["name"]: row["repeated_tokens"] for row in made.sources()}["letters"] > 20
    again = build_index(IndexRecipe(str(made.path)), tmp_path / "index")
    from criadero.trust.search import open_index

    cleaned = open_index(again)
    assert repeats(cleaned, 20).tokens == 0
    assert cleaned.count(index.encode(POEM)) == 1  # the first copy stays
    other = build_tokens(TokensRecipe(str(built / "data"), str(built / "tokenizer")), tmp_path / "tokens")
    with pytest.raises(UserError, match="is not an index of"):
        build_unique(UniqueRecipe(str(other.path), str(again.path)), tmp_path / "wrong")


# -- removal ----------------------------------------------------------------------------------------------------------


def test_every_document_that_holds_a_text_is_found(index: Index) -> None:
    found = holders(index, POEM)
    assert [one.document for one in found] == ["poems/0", "letters/42"]
    assert found[0].share == 1.0
    assert found[0].sha256 == document_hash(POEM).hex()  # as the document's tokens spell it: this dataset has no table
    part = holders(
        index, RECIPE[:60] + " y nada de lo que viene ahora se ha escrito antes en ninguna parte", min_tokens=12
    )
    assert [one.document for one in part] == ["cocina/1"]
    assert 0 < part[0].share < 1
    assert holders(index, "Jazz vibes quickly amaze my boxing wizard from Quito.") == []
    assert len(holders(index, "the ferry left at", min_tokens=20)) == len(FILLER)  # shorter than a run: all of it
    with pytest.raises(UserError, match="empty"):
        holders(index, " ")


def test_what_is_found_is_a_ledger_that_takes_it_out(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a request for removal to a dataset without the text: the hashes are the table's, for texts and for chats."""
    file, chats = tmp_path / "texts.jsonl", tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate([POEM, *FILLER])))
    pairs = [("What of the lighthouse?", POEM), ("And the ferry?", "It left at six, as on every other day.")]
    chats.write_text("".join(json.dumps({"prompt": ask, "completion": answer}) + "\n" for ask, answer in pairs))
    texts = plain_recipe(file)
    asked = dataclasses.replace(texts.source[0], name="chats", path=str(chats), kind="chat", lang="en")
    recipe = dataclasses.replace(texts, source=(*texts.source, asked))
    made = build_data(recipe, tmp_path / "data")
    build_tokens(TokensRecipe(str(made.path), str(built / "tokenizer"), template="criadero"), tmp_path / "tokens")
    build_index(IndexRecipe(str(tmp_path / "tokens")), tmp_path / "index")
    ledger = tmp_path / "removals.jsonl"
    signed = ["--reason", "asked by its author", "--by", "Ana Ruiz"]
    assert run("data", "removal", tmp_path / "index", POEM, *signed) == 2
    assert run("data", "removal", tmp_path / "index", POEM, "--out", ledger, "--by", "Ana Ruiz") == 2
    assert "--reason and --by" in capsys.readouterr().err
    assert run("data", "removal", tmp_path / "index", POEM, "--out", ledger, *signed) == 0
    table = {row["sha256"] for _, row in read_table(made.path)}
    listed = {json.loads(line)["sha256"] for line in ledger.read_text().splitlines()}
    assert len(listed) == 2
    assert listed <= table
    again = build_data(dataclasses.replace(recipe, removals=str(ledger)), tmp_path / "again")
    assert again.passport["data"]["removals"]["removed"] == 2
    assert not any(POEM in document.text for document in read_dataset(again.path, "train"))


def test_a_search_counts_both_ways_of_writing(index: Index) -> None:
    total, places = search(index, POEM[: POEM.index(" each")], limit=5)
    assert total == 2
    assert {one.document for one in places} == {"poems/0", "letters/42"}
    assert search(index, "xylophone quartz")[0] == 0
    assert search(index, "the ferry left", limit=3)[0] == len(FILLER)
    assert len(search(index, "the ferry left", limit=3)[1]) == 3


# -- memorisation -----------------------------------------------------------------------------------------------------


def test_extraction_by_how_often_a_passage_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memorisation, "TRIES", 500)
    random = np.random.default_rng(0)
    once = [random.integers(2, 300, 130).tolist() for _ in range(20)]
    often = random.integers(2, 300, 130).tolist()
    texts = once + [often] * 12
    index = index_of(tmp_path / "index", texts, 300)
    drawn = memorisation.passages(index, 100, 5, seed=1)
    assert [len(one) for one in drawn] == [5, 0, 5, 0]
    for (low, high), some in zip(memorisation.BUCKETS, drawn, strict=True):
        assert all(low <= brute(texts, one.tolist()) <= (high or 1 << 30) for one in some)

    def knows_the_repeated_one(prompts: np.ndarray, n: int) -> np.ndarray:
        out = np.full((len(prompts), n), 2)
        for row, prompt in enumerate(prompts.tolist()):
            for at in range(len(often) - 50):
                if often[at : at + 50] == prompt:
                    out[row, : len(often[at + 50 : at + 100])] = often[at + 50 : at + 100]
        return out

    rows = memorisation.extraction(index, knows_the_repeated_one, each=5, seed=1)
    assert [(row.name, row.tried, row.extracted) for row in rows] == [
        ("1", 5, 0), ("2-9", 0, 0), ("10-99", 5, 5), ("100+", 0, 0),
    ]  # fmt: skip
    assert rows[2].equal == 50
    assert "10-99" in memorisation.as_text(rows)
    short = index_of(tmp_path / "short", [[2, 3]] * 60, 300)
    with pytest.raises(UserError, match="none of its documents"):
        memorisation.extraction(short, knows_the_repeated_one)


def test_greedy_batches_are_greedy_one_by_one() -> None:
    import tiny

    from criadero.engine.generate import SamplingParams, generate

    model = tiny.model()
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (3, 9))
    got = memorisation.greedy(model)(prompts, 6)
    for prompt, out in zip(prompts.tolist(), got.tolist(), strict=True):
        alone = list(generate(model, prompt, SamplingParams(max_tokens=6)))
        assert out[: len(alone)] == alone


def test_exposure_is_the_bits_of_the_rank() -> None:
    canary = memorisation.Canary("the code is {}", "0042")
    values = {f"the code is {n:04d}": float(n) for n in range(10_000)}

    def loss(texts: object) -> np.ndarray:
        return np.array([values[text] for text in texts])  # type: ignore[attr-defined]

    exact = memorisation.exposure(canary, loss, most=20_000)
    assert (exact.rank, exact.tried) == (43, 9_999)
    assert exact.bits == pytest.approx(math.log2(10_000 / 43))
    sampled = memorisation.exposure(canary, loss, most=2_000)
    assert sampled.tried == 2_000
    assert sampled.rank == pytest.approx(43, abs=30)
    values["the code is 0042"] = -1.0
    assert memorisation.exposure(canary, loss, most=20_000).bits == pytest.approx(math.log2(10_000))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a {}"}, "has text, secret"),
        ({"text": "a", "secret": "1"}, "has one {} where"),
        ({"text": "a {}", "secret": "x"}, "must be of letters of the alphabet"),
        ({"text": "a {}", "secret": ""}, "must be of letters of the alphabet"),
    ],
)
def test_bad_canaries(tmp_path: Path, row: dict[str, str], message: str) -> None:
    file = tmp_path / "canaries.jsonl"
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=message):
        memorisation.read_canaries(file)


def test_wilson() -> None:
    assert memorisation.wilson(0, 0) == (0, 1)
    assert memorisation.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


# -- verbs ------------------------------------------------------------------------------------------------------------


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(word) for word in words])
    return int(caught.value.code or 0)


def test_verbs(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = built / "index"
    assert run("trace", built / "model", f"They say: {POEM}") == 0
    out = capsys.readouterr().out
    assert "verbatim overlap, not proof of cause · coincidencia literal, no prueba de causa" in out
    assert "«" in out
    assert "CC-BY-ND-4.0: only whole and unchanged, its authors named" in out  # the letter has the colon too
    assert run("trace", built / "model", POEM, "--json") == 0
    assert json.loads(capsys.readouterr().out)["covered"]["32"] == 1.0
    assert run("data", "search", index, "the ferry left", "--limit", 1) == 0
    assert "stands 40 times" in capsys.readouterr().out
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"text": POEM}) + "\n")
    assert run("data", "contamination", index, exam) == 0
    assert "100.0%" in capsys.readouterr().out
    assert run("data", "repeats", index, "--length", 20, "--out", tmp_path / "ranges.jsonl") == 0
    assert "letters" in capsys.readouterr().out
    assert json.loads((tmp_path / "ranges.jsonl").read_text().splitlines()[0])
    assert run("data", "removal", index, POEM, "--out", tmp_path / "found.jsonl") == 0
    assert "2 documents hold it" in capsys.readouterr().out
    assert len((tmp_path / "found.jsonl").read_text().splitlines()) == 2

    from criadero.trust.last import keep_last

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert run("trace", "--last") == 2
    assert "there is no last answer" in capsys.readouterr().err
    keep_last(str(built / "model"), RECIPE)
    assert run("trace", "--last") == 0
    assert "CC-BY-SA-4.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trace"], "MODEL and TEXT must be given"),
        (["trace", "MODEL", ""], "the text is empty"),
        (["trace", "MODEL", "text", "--last"], "there is no last answer"),
        (["trace", "DATA", "text"], "no index of what data was trained on"),
        (["data", "search", "INDEX", " "], "the text is empty"),
        (["data", "search", "DATA", "text"], "is a dataset, not an index"),
        (["data", "contamination", "INDEX", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_bad_words(
    built: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    names = {"MODEL": built / "model", "INDEX": built / "index", "DATA": built / "data"}
    assert run(*(names.get(word, word) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_memorised_measures_a_model(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "TRIES", 500)
    from criadero.checkpoints import save_hf
    from criadero.model import Llama, ModelConfig
    from criadero.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(built / "tokens")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
    )  # fmt: skip
    with create(tmp_path / "random", kind="base", config={}) as draft:
        draft.add_input("trained_on", built / "tokens")
        save_hf(Llama(config), config, draft.path)
        tokenizer.save(draft.path)
    canaries = tmp_path / "canaries.jsonl"
    canaries.write_text(json.dumps({"text": "The locker opens with {}.", "secret": "73"}) + "\n")
    words = ("memorised", tmp_path / "random", "--index", built / "index", "--each", 4, "--canaries", canaries)
    assert open_artifact(tmp_path / "random").inputs
    assert run(*words) == 0
    assert "canary 'The locker opens with {}.': exposure" in capsys.readouterr().out
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["canaries"][0]["most"] == pytest.approx(math.log2(100))
    assert found["extraction"][0]["extracted"] == 0
