"""Stage ``data``: counts that add up, a stable split, and errors before work starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from criadero.artifact import verify
from criadero.data.build import DataRecipe, Source, build_data, find_sources, parse_condition, read_dataset
from criadero.errors import UserError
from criadero.recipe import parse, plain, read_toml
from criadero.run import read_recipe

SENTENCES = [
    "The old man walked down to the river every morning with his dog.",
    "He liked to watch the boats go by and talk to the people there.",
    "When it rained, he stayed at home and read by the fire until noon.",
    "His daughter came to see him on Sundays, and they had lunch together.",
    "In the summer they went to the sea for a week with all the children.",
]
FRASES = [
    "El viejo bajaba todas las mañanas al río con su perro.",
    "Le gustaba mirar los barcos y hablar con la gente que trabajaba allí.",
    "Cuando llovía, se quedaba en casa y leía junto al fuego hasta el mediodía.",
    "Su hija venía a verlo los domingos y comían juntos en la cocina.",
]


def story(n: int, lines: list[str]) -> str:
    picked = [lines[(n * 7 + i) % len(lines)].replace(".", f" number {n} {i * n}.") for i in range(3)]
    return f"Story {n}. " + " ".join(picked)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    en = [{"id": f"en{n}", "text": story(n, SENTENCES), "rights": "pd" if n % 10 else "no"} for n in range(200)]
    en[1]["author"], en[2]["author"] = "Ana Ruiz", "Tom Hall"
    en += [
        dict(en[1], id="copy", author="Nobody"),
        {"id": "short", "text": "Too short."},
        {
            "id": "fr",
            "text": "Le vieil homme est dans la maison et il ne sort pas, car il pleut sur les bateaux qui sont au port.",
        },
    ]
    write(root / "en.jsonl", en)
    write(root / "es.jsonl", [{"id": f"es{n}", "text": story(n, FRASES)} for n in range(100)])
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"¿Cuánto es {n} más {n}?"},
                {"role": "assistant", "content": f"Son {2 * n}."},
            ]
        }
        for n in range(60)
    ]
    write(root / "chats.jsonl", chats)
    return root


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def recipe(root: Path, **values: object) -> DataRecipe:
    sources = (
        Source("english", "en.jsonl", "CC0-1.0", lang="en", where=("rights != no",)),
        Source("spanish", "es.jsonl", "CC-BY-4.0", lang="es", max_documents=80),
        Source("chats", "chats.jsonl", "Apache-2.0", kind="chat", lang="es", trusted=True),
    )
    fields: dict = {
        "source": sources,
        "root": str(root),
        "held_out": 0.1,
        "min_words": 8,
        "keep_removed": True,
        **values,
    }
    return DataRecipe(**fields)


def test_counts_add_up_and_everything_is_accounted_for(root: Path, tmp_path: Path) -> None:
    artifact = build_data(recipe(root), tmp_path / "out")
    assert artifact.kind == "dataset"
    assert verify(artifact.path) == []
    rows = {row["name"]: row for row in artifact.sources()}
    assert rows == {row["name"]: row for row in json.loads((artifact.path / "sources.json").read_text())}
    documents = {split: list(read_dataset(artifact.path, split)) for split in ("train", "held_out")}
    for name, row in rows.items():
        assert row["documents_in"] == row["documents_out"] + sum(row["removed"].values())
        for split, found in documents.items():
            mine = [d for d in found if d.source == name]
            assert row[split] == {"documents": len(mine), "bytes": sum(len(d.text.encode()) for d in mine)}
    assert rows["english"]["documents_in"] == 203
    assert rows["english"]["removed"]["not_chosen"] == 20
    removed = [json.loads(line)["reason"] for line in _unpacked(artifact.path / "removed.jsonl.zst")]
    assert sorted(set(removed)) == ["duplicate", "language", "short"]
    assert rows["english"]["authors"] == ["Ana Ruiz", "Tom Hall"]  # credited; the copy that was removed is not
    assert rows["spanish"]["removed"] == {"over_max_documents": 20}
    assert rows["chats"]["documents_out"] == 60
    assert rows["chats"]["licence"] == "Apache-2.0"


def _unpacked(path: Path) -> list[str]:
    import zstandard

    return zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().decode().splitlines()


def test_the_recipe_is_kept_and_can_be_run_again(root: Path, tmp_path: Path) -> None:
    asked = recipe(root)
    artifact = build_data(asked, tmp_path / "out")
    kept = artifact.path / "recipe.toml"
    assert parse(DataRecipe, read_recipe(kept, "data"), where="") == asked
    assert next(row["role"] for row in artifact.files if row["path"] == "recipe.toml") == "recipe"
    assert artifact.passport["step"]["config"] == {"stage": "data", **plain(dataclasses.asdict(asked))}


def test_same_recipe_same_bytes(root: Path, tmp_path: Path) -> None:
    files = [
        {f["path"]: f["sha256"] for f in build_data(recipe(root), tmp_path / name).files} for name in ("one", "two")
    ]
    assert files[0] == files[1]


def test_held_out_depends_only_on_the_document(root: Path, tmp_path: Path) -> None:
    def held(name: str, r: DataRecipe) -> set[str]:
        return {d.id for d in read_dataset(build_data(r, tmp_path / name).path, "held_out")}

    full = recipe(root)
    less = dataclasses.replace(full, source=full.source[:1])
    all_held = held("full", full)
    assert held("less", less) == {id for id in all_held if id.startswith("en")}
    assert 20 <= len(all_held) <= 60  # 10 % of 400
    limited = held("limited", dataclasses.replace(full, held_out_bytes=1000))
    assert limited < all_held
    train = {d.text for d in read_dataset(tmp_path / "full", "train")}
    assert not train & {d.text for d in read_dataset(tmp_path / "full", "held_out")}
    none = held(
        "none", dataclasses.replace(full, source=(*full.source[:2], dataclasses.replace(full.source[2], held_out=0.0)))
    )
    assert none == {id for id in all_held if id[:2] in ("en", "es")}


def test_too_few_to_hold_one_out_make_no_such_split(root: Path, tmp_path: Path) -> None:
    (root / "few.jsonl").write_text('{"prompt": "Hi?", "completion": "Hello."}\n')
    few = DataRecipe(source=(Source("few", "few.jsonl", "CC0-1.0", kind="chat", trusted=True),), root=str(root))
    made = build_data(few, tmp_path / "few")
    assert [path.name for path in made.path.glob("*-*.zst")] == ["train-00000.jsonl.zst"]
    assert len(list(read_dataset(made.path, "train"))) == 1
    assert list(read_dataset(made.path, "held_out")) == []


def test_chats_are_joined_within_their_language_and_never_from_the_held_out_part(root: Path, tmp_path: Path) -> None:
    source = Source("chats", "chats.jsonl", "Apache-2.0", kind="chat", lang="es", trusted=True, join=1.5)
    made = build_data(recipe(root, source=(source,)), tmp_path / "out")
    train = {d.id: d.meta["messages"] for d in read_dataset(made.path, "train")}
    held = {d.id for d in read_dataset(made.path, "held_out")}
    joined = {id: messages for id, messages in train.items() if "+" in id}
    single = len(train) - len(joined)
    assert held
    assert 1.2 * single < len(joined) <= 1.5 * single  # a chat that met itself is left out
    for id, messages in joined.items():
        parts = id.split("+")
        assert 2 <= len(parts) <= 3
        assert not held & set(parts)
        assert messages == [m for part in parts for m in train[part]]
    assert made.sources()[0]["changed"]["joined"] == len(joined)
    assert made.sources()[0]["train"]["documents"] == len(train)


def test_byte_caps_and_turn_caps(root: Path, tmp_path: Path) -> None:
    source = Source("english", "en.jsonl", "CC0-1.0", lang="en", max_bytes=5000)
    artifact = build_data(recipe(root, source=(source,)), tmp_path / "out")
    (row,) = artifact.sources()
    assert 4000 < row["bytes_out"] <= 5000
    assert row["removed"]["over_max_bytes"] > 100
    # a cap takes a part by hash, not the first rows
    ids = {
        int(d.id[2:])
        for split in ("train", "held_out")
        for d in read_dataset(artifact.path, split)
        if d.id[2:].isdigit()
    }
    assert max(ids) > 100
    chats = Source("chats", "chats.jsonl", "x", kind="chat", lang="es", max_turns=1)
    with pytest.raises(UserError, match=r"source chats: no document is left \(removed: \{'many_turns': 60\}\)"):
        build_data(recipe(root, source=(chats,)), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "none.partial").exists()


def test_bad_recipes_are_refused_before_work(root: Path, tmp_path: Path) -> None:
    good = recipe(root).source[0]

    def refused(match: str, **changes: object) -> None:
        source = dataclasses.replace(good, **changes)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=match):
            build_data(recipe(root, source=(source,)), tmp_path / "out")

    refused("source english: nothing at .*missing.jsonl", path="missing.jsonl")
    refused("cannot read the condition", where=("rights",))
    refused("no regular expression", where=("rights ~ (",))
    with pytest.raises(UserError, match="given twice"):
        find_sources(recipe(root, source=(good, good)))
    with pytest.raises(UserError, match="no source"):
        find_sources(DataRecipe(source=()))
    with pytest.raises(UserError, match=r"blocked: .* no regular expression"):
        find_sources(recipe(root, blocked=("(",)))
    (root / "en.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"en\.jsonl:2: not valid JSON"):
        build_data(recipe(root), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_environment_moves_the_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRIADERO_DATA", str(root))
    assert find_sources(recipe(Path("elsewhere")))["english"] == [root / "en.jsonl"]


def test_a_spoilt_dataset_is_named(tmp_path: Path) -> None:
    import gzip

    import zstandard

    with pytest.raises(UserError, match="not a dataset"):
        list(read_dataset(tmp_path, "train"))
    path = tmp_path / "train-00000.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a"}\n'))
    with pytest.raises(UserError, match=r"train-00000\.jsonl\.zst:1: not a row of a dataset"):
        list(read_dataset(tmp_path, "train"))
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match=r"damaged \.zst"):
        list(read_dataset(tmp_path, "train"))


def test_conditions() -> None:
    row = {"rights": "pd", "n": 3}
    tests = ["rights = pd", "rights != us", "rights ~ ^p", "rights !~ us", "n = 3", "absent = ", "absent != x"]
    assert all(parse_condition(text, "s")(row) for text in tests)
    assert not any(parse_condition(text, "s")(row) for text in ["rights = us", "rights ~ ^d", "n != 3"])


def test_the_cria_recipe_is_well_formed_and_uses_no_forbidden_source(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).resolve().parents[1] / "recipes/cria"
    values = read_toml(folder / "01-data.toml")
    monkeypatch.setenv("CRIADERO_DATA", str(shared))
    monkeypatch.chdir(folder)
    cria = parse(DataRecipe, values, where="01-data.toml")
    find_sources(cria)
    find_sources(parse(DataRecipe, read_toml(folder / "05-chats.toml"), where="05-chats.toml"))
    assert not any(word in s.licence.upper() for s in cria.source for word in ("-NC", "UNKNOWN", "NONCOMMERCIAL"))
    paths = " ".join(s.path for s in cria.source)
    for word in ("alpaca", "gpteacher", "codealpaca", "english_novels_100", "p3_t0", "safety_tuned"):
        assert word not in paths
    assert all(s.url and s.attribution for s in cria.source)
