"""Stages ``tokenizer`` and ``tokens``: what is on disk is what transformers would encode, byte for byte accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_build import FRASES, SENTENCES, story, write

from criadero.artifact import Artifact, verify
from criadero.data.build import DataRecipe, Source, build_data, read_dataset
from criadero.data.pack import TokensRecipe, build_tokens
from criadero.data.train_tokenizer import TokenizerRecipe, build_tokenizer, sample
from criadero.errors import UserError
from criadero.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    root = tmp_path_factory.mktemp("data")
    write(root / "en.jsonl", [{"id": f"en{n}", "text": story(n, SENTENCES)} for n in range(150)])
    write(root / "es.jsonl", [{"id": f"es{n}", "text": story(n, FRASES) + " ¿Sí? 😀 <|end|>"} for n in range(150)])
    turns = [
        ("user", "¿Cuánto es {0} más {0}?"),
        ("assistant", "Son {1}."),
        ("user", "Gracias {0}"),
        ("assistant", "De nada."),
    ]
    chats = [{"messages": [{"role": r, "content": t.format(n, 2 * n)} for r, t in turns]} for n in range(40)]
    write(root / "chats.jsonl", chats)
    recipe = DataRecipe(
        source=(
            Source("english", "en.jsonl", "CC0-1.0", lang="en"),
            Source("spanish", "es.jsonl", "CC-BY-4.0", lang="es"),
            Source("chats", "chats.jsonl", "Apache-2.0", kind="chat", lang="es", trusted=True),
        ),
        root=str(root), held_out=0.1, near_dedup=0.0, paragraph_words=0, max_code=1.0,
    )  # fmt: skip
    return build_data(recipe, root / "out")


@pytest.fixture(scope="module")
def tokenizer(data: Artifact) -> Artifact:
    return build_tokenizer(TokenizerRecipe(data=str(data.path), vocab_size=500), data.path.parent / "tokenizer")


@pytest.fixture(scope="module")
def tokens(data: Artifact, tokenizer: Artifact) -> Artifact:
    recipe = TokensRecipe(data=str(data.path), tokenizer=str(tokenizer.path))
    return build_tokens(recipe, data.path.parent / "tokens")


def test_tokenizer_artifact(data: Artifact, tokenizer: Artifact) -> None:
    assert tokenizer.kind == "tokenizer"
    assert verify(tokenizer.path) == []
    assert load_tokenizer(tokenizer.path).vocab_size == 500
    assert [one["id"] for one in tokenizer.inputs] == [data.id]
    names = {row["name"] for row in tokenizer.metrics}
    assert names == {f"bytes per token, held out, {group}" for group in ("en text", "es text", "es chat")}
    assert (tokenizer.path / "chat_template.jinja").is_file()


def test_sample_takes_equal_shares_and_never_the_held_out(data: Artifact) -> None:
    size = {
        lang: sum(len(d.text.encode()) for d in read_dataset(data.path, "train") if d.lang == lang)
        for lang in ("en", "es")
    }
    counts: dict[str, dict[str, int]] = {}
    texts = set(sample(TokenizerRecipe(data=str(data.path), sample_bytes=size["es"]), counts))
    assert not texts & {d.text for d in read_dataset(data.path, "held_out")}
    for lang in ("en", "es"):
        assert counts[lang]["bytes"] == pytest.approx(size["es"] / 2, rel=0.35)
    everything: dict[str, dict[str, int]] = {}
    list(sample(TokenizerRecipe(data=str(data.path), sample_bytes=0), everything))
    assert {lang: row["bytes"] for lang, row in everything.items()} == size


def test_shards_hold_what_transformers_would_encode(data: Artifact, tokenizer: Artifact, tokens: Artifact) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.path)
    about = json.loads((tokens.path / "tokens.json").read_text())
    for split in ("train", "held_out"):
        ids = np.fromfile(tokens.path / f"{split}.bin", np.dtype(about["dtype"]).newbyteorder("<"))
        docs = np.load(tokens.path / f"{split}.docs.npy", allow_pickle=False)
        assert docs.dtype == np.uint64
        documents = list(read_dataset(data.path, split))
        assert len(docs) == len(documents)
        assert docs[0, 0] == 0
        assert docs[-1, 1] == len(ids)
        assert (docs[1:, 0] == docs[:-1, 1]).all()
        for document, (start, end, number) in zip(documents, docs.tolist(), strict=True):
            if document.kind == "chat":
                rendered = theirs.apply_chat_template(document.meta["messages"], tokenize=False)
                expected = theirs(rendered, add_special_tokens=False)["input_ids"]
            else:
                # transformers reads "<|end|>" in a text as the control token; here it is text
                pieces = document.text.split("<|end|>")
                plain = load_tokenizer(tokenizer.path).encode("<|end|>")
                assert len(plain) > 1
                expected = [theirs.bos_token_id, *theirs(pieces[0], add_special_tokens=False)["input_ids"]]
                expected += plain if len(pieces) == 2 else []
                if len(pieces) == 2:  # the split may fall otherwise beside the marker: compare what the ids spell
                    assert theirs.decode(ids[start + 1 : end - 1]) == document.text
                    expected = ids[start : end - 1].tolist()
            assert ids[start:end].tolist() == [*expected, theirs.eos_token_id]
            source = about["sources"][number]
            assert (source["name"], source["lang"], source["kind"]) == (document.source, document.lang, document.kind)


def test_counts_by_source_language_and_kind(data: Artifact, tokens: Artifact) -> None:
    about = json.loads((tokens.path / "tokens.json").read_text())
    for split in ("train", "held_out"):
        docs = np.load(tokens.path / f"{split}.docs.npy")
        documents = list(read_dataset(data.path, split))
        for number, row in enumerate(about["sources"]):
            mine = docs[docs[:, 2] == number]
            assert row[split]["documents"] == len(mine)
            assert row[split]["tokens"] == int((mine[:, 1] - mine[:, 0]).sum())
            assert row[split]["bytes"] == sum(len(d.text.encode()) for d in documents if d.source == row["name"])
        for table in ("by_language", "by_kind"):
            assert sum(row[split]["tokens"] for row in about[table].values()) == int(docs[-1, 1])
    rows = {row["name"]: row for row in tokens.sources()}
    assert set(rows) == {"english", "spanish", "chats"}
    assert rows["spanish"]["licence"] == "CC-BY-4.0"
    assert rows["spanish"]["tokens"] == rows["spanish"]["train_tokens"] + rows["spanish"]["held_out_tokens"] > 0
    assert {one["id"] for one in tokens.inputs} == {
        data.id,
        json.loads((tokens.path / "tokens.json").read_text())["tokenizer"],
    }


@pytest.fixture(scope="module")
def llama3(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama3")
    shutil.copyfile(shared / "tokenizers/llama3/models__llama3__tokenizer.model", folder / "tokenizer.model")
    return str(folder)


@pytest.mark.slow
def test_a_large_vocabulary_takes_four_bytes(data: Artifact, llama3: str, tmp_path: Path) -> None:
    recipe = TokensRecipe(data=str(data.path), tokenizer=llama3, template="llama3")
    artifact = build_tokens(recipe, tmp_path / "out")
    about = json.loads((artifact.path / "tokens.json").read_text())
    assert about["dtype"] == "uint32"
    ids = np.fromfile(artifact.path / "train.bin", "<u4")
    assert ids.max() >= 128000
    assert len(ids) == sum(row["train"]["tokens"] for row in about["sources"])


def test_bad_input(data: Artifact, tokenizer: Artifact, llama3: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocab_size 100: at least 263"):
        build_tokenizer(TokenizerRecipe(data=str(data.path), vocab_size=100), tmp_path / "t")
    with pytest.raises(UserError, match="more text or a smaller vocab_size"):
        build_tokenizer(TokenizerRecipe(data=str(data.path), vocab_size=60_000), tmp_path / "t")
    with pytest.raises(UserError, match="not a dataset"):
        build_tokenizer(TokenizerRecipe(data=str(tokenizer.path), vocab_size=500), tmp_path / "t")
    with pytest.raises(UserError):
        build_tokens(TokensRecipe(data=str(tmp_path / "none"), tokenizer=str(tokenizer.path)), tmp_path / "t")
    with pytest.raises(UserError, match="template"):
        build_tokens(TokensRecipe(data=str(data.path), tokenizer=llama3), tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_the_training_loop_opens_it(tokens: Artifact) -> None:
    from criadero.train.batches import TokenFile

    file = TokenFile.open(tokens.path, "train")
    assert len(file.docs) == sum(source["train"]["documents"] for source in file.sources)
