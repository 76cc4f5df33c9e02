"""Names of licences: SPDX expressions, Hugging Face's tags and plain words, read into what terms.toml knows.

``read_licence("Apache-2.0 OR llama2")`` gives the choices a licensee has, each a set of licences that hold together. What cannot
be read is kept, with the nearest name that can. SPDX expressions are parsed by ``license-expression``; a slash, a comma or
"and" between names means that several hold, as where a dataset's table lists the licences of its rows.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_FILES = ("terms.toml", "relations.toml")
_NONE = {"", "unknown", "none", "null", "other", "n/a", "na", "?", "noassertion", "desconocida", "license", "licence"}
# words around a name that say nothing about the licence
_WORDS = re.compile(
    r"\b(?:markup|texts?|code|data|content|the|per row|licen[cs]ed?|international|unported|under|only books.*|"
    r"in the us(?:a)?)\b:?",
    re.I,
)
_REMARKS = (
    (r"open ?ai|chat-?gpt|\bgpt(?:\b|-?[345])|davinci", "openai-terms"),
    (r"non-?commercial|research (?:use )?only", "research-only"),
)
_MAX_TEXT = 2000  # characters; a name is not a text
_MAX_CHOICES = 64  # alternatives of one expression; more is refused as unreadable


@dataclass(frozen=True)
class Reading:
    """What a licence text means.

    `choices`: the alternatives (OR) a licensee has, each the keys of terms.toml that hold together (AND). `unknown`: words
    that no key stands for, with the nearest known name or "", and whether SPDX's list has them. `exceptions`: WITH clauses,
    which are not modelled: the plain licence is taken, which asks for no less. `loose`: it was read from plain words, not from
    one name or an expression.
    """

    text: str
    choices: tuple[frozenset[str], ...] = ()
    unknown: tuple[tuple[str, str, bool], ...] = ()
    exceptions: tuple[str, ...] = ()
    loose: bool = False


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """terms.toml: licence key -> its row."""
    return tomllib.loads((_HERE / "terms.toml").read_text(encoding="utf-8"))["licences"]


@functools.cache
def relations() -> dict[str, Any]:
    """relations.toml: ``relations``, ``compose`` and ``carries``."""
    return tomllib.loads((_HERE / "relations.toml").read_text(encoding="utf-8"))


@functools.cache
def rules_id() -> str:
    """``sha256:`` of both files of rules: what a computed verdict was computed with."""
    total = hashlib.sha256()
    for name in _FILES:
        total.update((_HERE / name).read_bytes())
    return f"sha256:{total.hexdigest()}"


def _fold(text: str) -> str:
    """Case, spaces, underscores and hyphens made equal."""
    return re.sub(r"[\s_-]+", " ", text.strip().strip(".").lower())


@functools.cache
def _aliases() -> dict[str, str]:
    found: dict[str, str] = {}
    for key, row in table().items():
        for name in (row["id"], row["title"], *row["aliases"]):
            found.setdefault(_fold(name), key)
    return found


def names() -> list[str]:
    """What a user may write, for messages: identifiers and first aliases."""
    return sorted(
        {row["id"] for row in table().values()} | {row["aliases"][0] for row in table().values() if row["aliases"]}
    )


@functools.lru_cache(maxsize=4096)
def key_of(name: str) -> str | None:
    """The key of terms.toml that one name stands for; None when there is none."""
    return _aliases().get(_fold(name))


@functools.lru_cache(maxsize=4096)
def read_licence(text: str | None) -> Reading:
    """Read the name or expression of a licence. Nothing given, "unknown" and "other" give a reading without choices."""
    words = " ".join((text or "").split())
    if words.lower() in _NONE:
        return Reading(words)
    if key := key_of(words):
        return Reading(words, (frozenset([key]),))
    if len(words) > _MAX_TEXT:
        return Reading(words[:60] + "...", (), ((words[:60] + "...", "", False),))
    if reading := _expression(words):
        return reading
    return _plain_words(words)


def _expression(text: str) -> Reading | None:
    """Read as an SPDX expression; None when it is none, or names something that neither we nor SPDX know."""
    if not re.fullmatch(r"[\w.+:() -]+", text):
        return None
    from license_expression import ExpressionError, ExpressionParseError, LicenseWithExceptionSymbol

    exceptions: list[str] = []
    unknown: list[tuple[str, str, bool]] = []
    try:
        parsed = _spdx().parse(text, validate=False)
        if parsed is None:
            return None
        leaves: dict[Any, frozenset[str]] = {}
        for symbol in parsed.symbols:
            if isinstance(symbol, LicenseWithExceptionSymbol):
                exceptions.append(symbol.exception_symbol.key)
                name = symbol.license_symbol.key
            else:
                name = symbol.key
            key = key_of(name)
            listed = name.lower() in _spdx_names()
            if key is None and not listed and len(parsed.symbols) == 1:
                return None
            if key is None:
                unknown.append((name, "" if listed else nearest(name), listed))
            leaves[symbol] = frozenset([key]) if key else frozenset()
        choices = _choices(parsed, leaves)
    except (ExpressionError, ExpressionParseError, _TooMany, AttributeError, TypeError, ValueError):
        return None
    # an alternative of which a part is unknown can still be avoided when another is known whole
    lost = {symbol for symbol, keys in leaves.items() if not keys}
    whole = _choices(parsed, {s: frozenset([None if s in lost else next(iter(leaves[s]))]) for s in leaves})
    if good := [choice for choice in whole if None not in choice]:
        return Reading(text, _order(good), (), tuple(sorted(set(exceptions))))
    known = [choice - {None} for choice in choices if choice]
    return Reading(text, _order(known), tuple(sorted(set(unknown))), tuple(sorted(set(exceptions))))


def keys_of(licences: Iterable[str]) -> frozenset[str]:
    """Keys that hold for something with all of these licence texts, of each the alternative that asks least.

    A Creative Commons name without version is left out beside the same with one.
    """
    readings = [read_licence(text) for text in licences]
    keys = frozenset[str]().union(*(reading.choices[0] for reading in readings if reading.choices))
    versions = {key.rpartition("-")[0] for key in keys if key.startswith("cc-")}
    return keys - versions


class _TooMany(ValueError):
    pass


def _choices(node: Any, leaves: Mapping[Any, frozenset[Any]]) -> list[frozenset[Any]]:
    """Disjunctive normal form: the alternatives, each a set of keys."""
    if node in leaves:
        return [leaves[node]]
    parts = [_choices(argument, leaves) for argument in node.args]
    if node.operator.strip().upper() == "OR":
        found = [choice for part in parts for choice in part]
    else:
        found = [frozenset()]
        for part in parts:
            found = [left | right for left in found for right in part]
            if len(found) > _MAX_CHOICES:
                raise _TooMany
    if len(found) > _MAX_CHOICES:
        raise _TooMany
    return found


def _order(choices: list[frozenset[str]]) -> tuple[frozenset[str], ...]:
    return tuple(sorted(set(choices), key=lambda choice: (burden(choice), sorted(choice))))


# How much a licence asks, from nothing to everything: of alternatives the lightest is taken. A fixed order, not one that
# looks at the other inputs, so that adding an input can never take back a conflict.
_WEIGHT = {
    "no_permission": 64, "no_sharing": 48, "non_commercial": 32, "no_derivatives": 32, "output_ban": 24, "no_compete": 24,
    "restrictions": 16, "mau": 8, "region": 8, "share_alike": 8, "source_code": 4, "weak_share_alike": 3, "agreement": 2,
    "name_prefix": 2, "display": 2, "notice": 2, "attribution": 1, "changes": 1, "keep_text": 1, "use_policy": 1,
}  # fmt: skip


def burden(keys: frozenset[str]) -> int:
    """How much a set of licences asks, as one number."""
    return sum(_WEIGHT[term["id"]] for key in keys for term in table()[key].get("terms", ()))


def _plain_words(text: str) -> Reading:
    """Several names joined by / , ; + & or "and"; words such as "markup" are left out.

    A remark in brackets is left out too, unless it says that a service wrote the text or that it is for research only.
    """
    remarks = " ".join(re.findall(r"\(([^()]*)\)", text))
    keys = {key for pattern, key in _REMARKS if re.search(pattern, remarks, re.I)}
    bare_text = re.sub(r"\([^()]*\)", " ", text)
    parts = [part for part in re.split(r"\s*(?:[/,;&]|\s\+\s|\b(?:and|AND|y)\b)\s*", bare_text) if part.strip()]
    unknown: list[tuple[str, str, bool]] = []
    for part in parts or [text]:
        bare = _WORDS.sub(" ", part)
        key = key_of(part) or key_of(" ".join(bare.split()))
        if key:
            keys.add(key)
        else:
            word = part.strip()
            unknown.append((word, nearest(word), word.lower() in _spdx_names()))
    return Reading(text, (frozenset(keys),) if keys else (), tuple(sorted(set(unknown))), loose=True)


def nearest(name: str) -> str:
    """The known name most like this one, or ""."""
    if len(name) > 80:
        return ""
    folded = {_fold(known): known for known in names()}
    folded |= {alias: table()[key]["id"] for alias, key in _aliases().items() if alias not in folded}
    found = difflib.get_close_matches(_fold(name), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else ""


@functools.cache
def _spdx() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


@functools.cache
def _spdx_names() -> frozenset[str]:
    return frozenset(name.lower() for name in _spdx().known_symbols)


def id_of(key: str) -> str:
    """The SPDX identifier or LicenseRef of a key."""
    return table()[key]["id"]


def title_of(key: str) -> str:
    """A licence's name in words."""
    return table()[key]["title"]


def short_name(key: str) -> str:
    """What to type: the SPDX identifier, or where there is none the first alias ("llama2")."""
    row = table()[key]
    return row["aliases"][0] if row["id"].startswith("LicenseRef-") else row["id"]


def expression(keys: frozenset[str] | set[str]) -> str:
    """An SPDX expression in which all of these hold."""
    return " AND ".join(sorted(map(id_of, keys)))


@functools.lru_cache(maxsize=256)
def recognise(text: str) -> str | None:
    """The key of the licence whose text this is, by its hash or by the words in its first lines; None when neither fits."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    for key, row in table().items():
        if any(copy["sha256"] == digest for copy in row.get("texts", ())):
            return key
    head = " ".join(text[:4000].split()).lower()
    best: tuple[int, int, str] | None = None
    for key, row in table().items():
        marks = [" ".join(mark.split()).lower() for mark in row.get("markers", ())]
        if marks and all(mark in head for mark in marks):
            # the more words fit, the better; among equals the one that stands first in the text
            score = (sum(map(len, marks)), -head.index(marks[0]), key)
            best = max(best, score) if best else score
    return best[2] if best else None
