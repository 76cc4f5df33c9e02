"""recipe.py: strict keys, checked types, TOML both ways, flags, digests."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from criadero.errors import UserError
from criadero.recipe import canonical_json, digest, flags_to_values, parse, plain, read_toml, split_flags, to_toml


@dataclass(frozen=True)
class Source:
    path: str
    weight: float = 1.0
    licence: str | None = None


@dataclass(frozen=True)
class SftRecipe:
    base: str = field(metadata={"help": "the model to start from"})
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lr: float = 1e-4
    packing: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    max_steps: int | None = None
    targets: tuple[str, ...] = ("q", "v")
    shares: dict[str, float] = field(default_factory=dict)
    limit: int | str = 3
    folder: Path | None = None
    source: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank: must not be negative, it is {self.lora_rank}")


def sft(**values: Any) -> SftRecipe:
    return parse(SftRecipe, {"base": "cria", **values}, where="r.toml")


def test_values_are_taken() -> None:
    recipe = sft(
        stage="sft",
        lr=1,
        packing=True,
        dtype="float32",
        max_steps=5,
        targets=["q"],
        shares={"a": 1},
        limit="all",
        folder="x",
        source=[{"path": "a"}, {"path": "b", "weight": 2, "licence": "MIT"}],
    )
    assert recipe == SftRecipe(
        base="cria",
        lr=1.0,
        packing=True,
        dtype="float32",
        max_steps=5,
        targets=("q",),
        shares={"a": 1.0},
        limit="all",
        folder=Path("x"),
        source=(Source("a"), Source("b", 2.0, "MIT")),
    )
    assert isinstance(recipe.lr, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rnak": 4}, "r.toml: unknown key 'lora_rnak': did you mean 'lora_rank'?"),
        ({"lora-rank": 4}, "r.toml: unknown key 'lora-rank': did you mean 'lora_rank'?"),
        ({"zzz": 4}, "r.toml: unknown key 'zzz': the keys are base, lora_rank, lr,"),
        ({"lora_rank": 4.0}, "r.toml: lora_rank: must be a whole number, not 4.0"),
        ({"lora_rank": "4"}, "r.toml: lora_rank: must be a whole number, not '4'"),
        ({"lora_rank": True}, "r.toml: lora_rank: must be a whole number, not true"),
        ({"lora_rank": -1}, "r.toml: lora_rank: must not be negative, it is -1"),
        ({"lr": True}, "r.toml: lr: must be a number, not true"),
        ({"lr": float("nan")}, "r.toml: lr: must be a finite number, not nan"),
        ({"packing": 1}, "r.toml: packing: must be true or false, not 1"),
        ({"packing": "true"}, "r.toml: packing: must be true or false, not 'true'"),
        ({"base": 3}, "r.toml: base: must be text, not 3"),
        ({"dtype": "bfloat61"}, "r.toml: dtype: 'bfloat61' is not a choice: did you mean 'bfloat16'?"),
        ({"dtype": 16}, "r.toml: dtype: must be one of 'auto', 'float32', 'bfloat16', not 16"),
        ({"max_steps": "ten"}, "r.toml: max_steps: must be a whole number, not 'ten'"),
        ({"limit": 1.5}, "r.toml: limit: must be a whole number or text, not 1.5"),
        ({"targets": "q"}, "r.toml: targets: must be a list (each text), not 'q'"),
        ({"targets": ["q", 1]}, "r.toml: targets[2]: must be text, not 1"),
        ({"shares": {"a": "b"}}, "r.toml: shares.a: must be a number, not 'b'"),
        ({"source": {"path": "a"}}, "r.toml: source: must be a list (each a table), not {'path': 'a'}"),
        ({"source": [{"path": "a"}, {"pth": "b"}]}, "r.toml: source[2]: unknown key 'pth': did you mean 'path'?"),
        ({"source": [{"weight": 1.0}]}, "r.toml: source[1]: 'path' must be given"),
        ({"stage": "pretrain"}, "r.toml: stage = 'pretrain' is not a sft recipe"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        sft(**values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named_with_its_help() -> None:
    with pytest.raises(UserError, match=r"r\.toml: 'base' must be given \(the model to start from\)"):
        parse(SftRecipe, {}, where="r.toml")


# -- TOML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a = 1\nb = = 2\n", "line 2: not TOML: invalid value"),
        (b"a = 1\na = 2\n", "line 2: not TOML: cannot overwrite a value"),
        (b"a = [1,\n", "line 2: not TOML: "),
        (b"a = 1\n\xff", "line 2: not UTF-8"),
    ],
)
def test_toml_errors_name_file_and_line(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "r.toml").write_bytes(text)
    with pytest.raises(UserError) as caught:
        read_toml(tmp_path / "r.toml")
    assert str(caught.value).startswith(f"{tmp_path / 'r.toml'}, {message}")


def test_toml_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot be read"):
        read_toml(tmp_path)


def test_to_toml_says_the_stage_first() -> None:
    text = to_toml(sft(source=[{"path": "a"}], max_steps=None))
    assert text.startswith('stage = "sft"\nbase = "cria"\n')
    assert "max_steps" not in text
    assert text.rstrip().endswith('[[source]]\npath = "a"\nweight = 1.0')


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    base=texts,
    lr=st.floats(allow_nan=False, allow_infinity=False),
    rank=st.integers(0, 2**62),
    packing=st.booleans(),
    targets=st.lists(texts).map(tuple),
    shares=st.dictionaries(texts, st.floats(allow_nan=False, allow_infinity=False)),
    sources=st.lists(st.builds(Source, texts, st.floats(0, 1), st.none() | texts)).map(tuple),
)
def test_to_toml_and_back(
    base: str, lr: float, rank: int, packing: bool, targets: Any, shares: Any, sources: Any
) -> None:
    recipe = SftRecipe(base, rank, lr, packing, targets=targets, shares=shares, source=sources)
    assert parse(SftRecipe, tomllib.loads(to_toml(recipe)), where="") == recipe


# -- flags


def test_flags() -> None:
    args = ["--lora_rank", "16", "--packing", "--lr=3e-4", "--dtype", "BFLOAT16", "--targets", "q,k", "--targets", "v"]
    assert flags_to_values(SftRecipe, args) == {
        "lora_rank": 16,
        "packing": True,
        "lr": 3e-4,
        "dtype": "bfloat16",
        "targets": ("q", "k", "v"),
    }
    assert flags_to_values(SftRecipe, ["--no-packing", "--lora-rank", "4"]) == {"packing": False, "lora_rank": 4}
    assert flags_to_values(SftRecipe, ["--packing", "false"]) == {"packing": False}
    assert flags_to_values(SftRecipe, ["--max_steps", "none", "--limit", "7"]) == {"max_steps": None, "limit": 7}
    assert flags_to_values(SftRecipe, ["--limit", "all", "--lr", "-1"]) == {"limit": "all", "lr": -1.0}
    words, values = split_flags(SftRecipe, ["--packing", "cria", "--lr", "1", "shop.jsonl", "--", "--odd"])
    assert (words, values) == (["cria", "shop.jsonl", "--odd"], {"packing": True, "lr": 1.0})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora_rnak", "4"], "no such option --lora_rnak: did you mean 'lora_rank'?"),
        (["--no-lr"], "no such option --no-lr"),
        (["--lora_rank"], "--lora_rank needs a value (a whole number)"),
        (["--lora_rank", "--packing"], "--lora_rank needs a value"),
        (["--lora_rank", "x"], "--lora_rank: must be a whole number, not 'x'"),
        (["--lr", "nan"], "--lr: must be a finite number"),
        (["--packing=maybe"], "--packing: must be true or false"),
        (["--dtype", "float23"], "--dtype: 'float23' is not a choice: did you mean 'float32'?"),
        (["--source", "x"], "--source: is a list of tables: write it in a recipe file"),
        (["16"], "unexpected argument '16'"),
    ],
)
def test_bad_flags_are_named(args: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        flags_to_values(SftRecipe, args)
    assert str(caught.value).startswith(message)


# -- canonical JSON


def test_canonical_json_rfc_8785() -> None:
    """RFC 8785, section 3.2.3: the keys of its example in the order it gives (by UTF-16 code units)."""
    values = {"\u20ac": 1, "\r": 2, "\ufb33": 3, "1": 4, "\U0001f600": 5, "\u0080": 6, "\u00f6": 7}
    assert [*json.loads(canonical_json(values))] == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]
    # section 3.2.2.2: what is escaped, and how
    assert canonical_json('\u20ac$\u000f\nA\'B"\\\\"/') == '"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'.encode()
    assert canonical_json({"b": [1, True, None], "a": {}}) == b'{"a":{},"b":[1,true,null]}'


def test_plain_values() -> None:
    assert plain(1e-05) == "0.00001"
    assert plain(0.1) == "0.1"
    assert plain(2**53) == "9007199254740992"
    assert plain(2**53 - 1) == 2**53 - 1
    assert plain({"a": (np.int64(3), np.float32(0.5)), "p": Path("x/y")}) == {"a": [3, "0.5"], "p": "x/y"}
    assert plain(Source("a")) == {"path": "a", "weight": "1.0", "licence": None}
    with pytest.raises(TypeError, match="object cannot be written"):
        plain(object())


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_keep_their_value(value: float) -> None:
    text = plain(value)
    assert "e" not in text.lower()
    assert float(text) == value


def test_digest() -> None:
    assert digest({"b": 1, "a": "x"}) == "sha256:" + hashlib.sha256(b'{"a":"x","b":1}').hexdigest()
    assert digest(sft()) == digest(sft())
    assert digest(sft()) != digest(sft(lr=1e-3))
