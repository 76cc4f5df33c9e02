"""Recipes: TOML <-> frozen dataclass <-> command-line flags, with strict keys and checked types.

A recipe is a flat frozen dataclass that stands beside the code that reads it; each field has
``field(default=..., metadata={"help": "..."})``. Field types that may stand in one: ``str int float bool Path``,
``X | None``, ``Literal[...]``, ``tuple[X, ...]``, ``dict[str, X]`` and, for a list of TOML tables such as
``[[source]]``, a tuple of nested dataclasses. Every error is a UserError naming the file, the key and what to write.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from criadero.errors import UserError

T = TypeVar("T")
_LARGEST_EXACT = (
    2**53 - 1
)  # beyond it a JSON number is not the same integer for every reader (RFC 8785, section 3.2.2.3)
_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


# -- plain values and digests -----------------------------------------------------------------------------------------


def plain(obj: Any) -> Any:
    """The same value in str, int, bool, list, dict and None only: what a passport may hold.

    Floats become decimal strings (``1e-05`` -> ``"0.00001"``), as do integers beyond 2**53; dataclasses become dicts,
    tuples lists, paths strings, and NumPy or torch scalars Python ones. Raises TypeError for anything else, and UserError
    for text that UTF-8 cannot hold.
    """
    if obj is None or isinstance(obj, bool):
        return obj
    if isinstance(obj, str):
        if not obj.isascii():
            try:
                obj.encode()
            except UnicodeEncodeError:  # a file name from another time, or half of a character
                raise UserError(f"{obj!r} is not UTF-8, so no passport can hold it: give it another name") from None
        return str(obj)
    if isinstance(obj, int):
        return int(obj) if abs(obj) <= _LARGEST_EXACT else str(int(obj))
    if isinstance(obj, float):
        return format(Decimal(repr(float(obj))), "f") if math.isfinite(obj) else str(float(obj))
    if isinstance(obj, Path):
        return plain(str(obj))
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {f.name: plain(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    if isinstance(obj, Mapping):
        return {str(key): plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        items = [plain(value) for value in obj]
        return sorted(items, key=canonical_json) if isinstance(obj, set | frozenset) else items
    if hasattr(obj, "item") and getattr(obj, "shape", None) == ():
        return plain(obj.item())
    raise TypeError(f"{type(obj).__name__} cannot be written in a passport: {obj!r:.80}")


def canonical_json(obj: Any) -> bytes:
    """UTF-8 bytes of `obj` as RFC 8785 canonical JSON, after :func:`plain`: equal values give equal bytes."""

    def ordered(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: ordered(value[key]) for key in sorted(value, key=lambda k: k.encode("utf-16-be"))}
        return [ordered(item) for item in value] if isinstance(value, list) else value

    return json.dumps(ordered(plain(obj)), ensure_ascii=False, separators=(",", ":")).encode()


def digest(obj: Any) -> str:
    """``sha256:...`` of the canonical JSON of a recipe or any plain value."""
    return "sha256:" + hashlib.sha256(canonical_json(obj)).hexdigest()


# -- values -> dataclass ----------------------------------------------------------------------------------------------


def stage_name(cls: type) -> str:
    """The stage a recipe class belongs to: ``SftRecipe`` -> ``"sft"``, ``SelfInstructRecipe`` -> ``"self_instruct"``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__.removesuffix("Recipe")).lower()


def recipe_fields(cls: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Name -> (field, resolved type) of every field a recipe may set, in order."""
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in dataclasses.fields(cls) if f.init}


def required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def parse(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """A `cls` made of `values`; `where` (a file name, "command line") begins every error message.

    A key that is no field, a required field that is absent, and a value of the wrong type raise UserError. ``stage`` is
    accepted when it is the right one, so that a recipe file can be handed over as it was read.
    """
    known = recipe_fields(cls)
    given = dict(values)
    if "stage" not in known and "stage" in given and given.pop("stage") != stage_name(cls):
        raise UserError(f"{where}: stage = {values['stage']!r} is not a {stage_name(cls)} recipe")
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}: {nearest(key, known, 'the keys are')}")
    made: dict[str, Any] = {}
    for name, (field, hint) in known.items():
        if name in given:
            made[name] = _convert(given[name], hint, f"{where}: {name}")
            if (
                name == "seed" and isinstance(made[name], int) and not 0 <= made[name] < 2**32
            ):  # what every generator of random numbers takes
                raise UserError(f"{where}: seed must be between 0 and {2**32 - 1}, not {made[name]}")
        elif required(field):
            about = field.metadata.get("help", "")
            raise UserError(f"{where}: {name!r} must be given" + (f" ({about})" if about else ""))
    try:
        return cls(**made)
    except (UserError, ValueError) as error:
        text = str(error)
        raise UserError(text if text.startswith(where) else f"{where}: {text}") from error


def nearest(word: str, known: typing.Iterable[str], otherwise: str) -> str:
    """``did you mean 'x'?``, or `otherwise` and the whole list when nothing comes near."""
    names = list(known)
    close = difflib.get_close_matches(word.replace("-", "_"), names, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise} {', '.join(names) or '(none)'}"


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def type_name(hint: Any) -> str:
    """What a field of this type takes, in words."""
    if hint in _NAMES:
        return _NAMES[hint]
    if hint is type(None):
        return "nothing"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(choice) for choice in get_args(hint))
    if _is_union(hint):
        return " or ".join(type_name(arm) for arm in get_args(hint) if arm is not type(None))
    if get_origin(hint) in (tuple, list):
        return f"a list (each {type_name(get_args(hint)[0])})"
    if dataclasses.is_dataclass(hint) or get_origin(hint) is dict:
        return "a table"
    return getattr(hint, "__name__", str(hint))


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if _is_union(hint):
        if value is None and type(None) in get_args(hint):
            return None
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        for arm in arms:
            try:
                return _convert(value, arm, where)
            except UserError:
                if len(arms) == 1:
                    raise
    elif origin is Literal:
        choices = get_args(hint)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return value
        if isinstance(value, str):
            hint_text = nearest(value, [str(choice) for choice in choices], "choose from")
            raise UserError(f"{where}: {value!r} is not a choice: {hint_text}")
    elif origin in (tuple, list):
        if isinstance(value, list | tuple):
            item = get_args(hint)[0]
            return tuple(_convert(one, item, f"{where}[{n}]") for n, one in enumerate(value, 1))
    elif origin is dict:
        if isinstance(value, Mapping):
            return {str(key): _convert(one, get_args(hint)[1], f"{where}.{key}") for key, one in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return parse(hint, value, where=where)
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{where}: must be a finite number, not {value}")
            return float(value)
    elif hint is Path:
        if isinstance(value, str | Path):
            return Path(value)
    elif hint is str:
        if isinstance(value, str | Path):
            return str(value)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{where}: must be {type_name(hint)}, not {_said(value)}")


def _said(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# -- TOML -------------------------------------------------------------------------------------------------------------


def read_toml(path: str | Path) -> dict[str, Any]:
    """The values of a TOML file. UserError names the file, and the line when the file is not TOML."""
    path = Path(path)
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text: save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        at = re.search(r"\s*\(at line (\d+), column (\d+)\)$", message)
        line = int(at[1]) if at else text.count("\n") + 1  # "at end of document" has no number
        reason = message[: at.start()] if at else message.removesuffix(" (at end of document)")
        raise UserError(f"{path}, line {line}: not TOML: {reason[:1].lower()}{reason[1:]}") from None


def to_toml(obj: Any, *, say: Callable[[str], str] = str) -> str:
    """A recipe dataclass as TOML: ``stage`` first, then every field (those that are None are left out), tables last.

    `say` gives each text of it as it is to be written.
    """
    lines = (
        [] if any(f.name == "stage" for f in dataclasses.fields(obj)) else [f"stage = {_toml(stage_name(type(obj)))}"]
    )
    _write_table(obj, "", lines, say)
    return "\n".join(lines) + "\n"


def _write_table(obj: Any, prefix: str, lines: list[str], say: Callable[[str], str]) -> None:
    tables: list[tuple[str, Any]] = []
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        if dataclasses.is_dataclass(value) or (
            isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value)
        ):
            tables.append((field.name, value))
        elif value is not None:
            lines.append(f"{field.name} = {_toml(value, say)}")
    for name, value in tables:
        for item in value if isinstance(value, tuple) else (value,):
            lines += ["", f"[[{prefix}{name}]]" if isinstance(value, tuple) else f"[{prefix}{name}]"]
            _write_table(item, f"{prefix}{name}.", lines, say)


def _toml(value: Any, say: Callable[[str], str] = str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return json.dumps(say(str(value)), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(key), say)} = {_toml(item, say)}" for key, item in value.items()) + " }"
    return "[" + ", ".join(_toml(item, say) for item in value) + "]"


# -- command line -----------------------------------------------------------------------------------------------------


def flags_to_values(cls: type, args: Sequence[str]) -> dict[str, Any]:
    """``["--lora_rank", "16", "--packing"]`` -> ``{"lora_rank": 16, "packing": True}``; else a UserError."""
    words, values = split_flags(cls, args)
    if words:
        raise UserError(f"unexpected argument {words[0]!r}: settings are written --field value")
    return values


def split_flags(cls: type, args: Sequence[str], also: Sequence[str] = ()) -> tuple[list[str], dict[str, Any]]:
    """The arguments that are no flags, in order, and the values of the flags.

    ``--lora_rank 16``, ``--lora-rank=16``, ``--packing``, ``--no-packing``; a list is separated by commas or the flag
    is given several times. ``--`` ends the flags. `also` are flags of others, for near misses.
    """
    known = recipe_fields(cls)
    words: list[str] = []
    values: dict[str, Any] = {}
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return words + rest, values
        if not arg.startswith("--"):
            words.append(arg)
            continue
        flag, equals, text = arg[2:].partition("=")
        name = flag.replace("-", "_")
        negated = name.removeprefix("no_")
        if name not in known and negated in known and _base_type(known[negated][1]) is bool and not equals:
            values[negated] = False
            continue
        if name not in known:
            raise UserError(f"no such option --{flag}: {nearest(name, [*known, *also], 'the fields are')}")
        hint = _base_type(known[name][1])
        if not equals:
            if hint is bool and not (rest and rest[0].lower() in ("true", "false")):
                values[name] = True
                continue
            if not rest or (rest[0].startswith("--") and rest[0] != "--"):
                raise UserError(f"--{flag} needs a value ({type_name(known[name][1])})")
            text = rest.pop(0)
        value = _from_text(text, known[name][1], f"--{flag}")
        if get_origin(hint) in (tuple, list):
            value = values.get(name, ()) + value
        values[name] = value
    return words, values


def _base_type(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    arms = [arm for arm in get_args(hint) if arm is not type(None)] if _is_union(hint) else [hint]
    return arms[0] if len(arms) == 1 else hint


def _from_text(text: str, hint: Any, where: str) -> Any:
    if _is_union(hint):
        if text.lower() in ("none", "null") and type(None) in get_args(hint):
            return None
        arms = [arm for arm in get_args(hint) if arm is not type(None)]
        for arm in sorted(arms, key=lambda one: one is str):  # text last: it takes anything
            try:
                return _from_text(text, arm, where)
            except UserError:
                if len(arms) == 1:
                    raise
    elif get_origin(hint) in (tuple, list):
        item = get_args(hint)[0]
        if not dataclasses.is_dataclass(item):
            return tuple(_from_text(part.strip(), item, where) for part in text.split(",") if part.strip())
        raise UserError(f"{where}: is a list of tables: write it in a recipe file")
    elif get_origin(hint) is Literal:
        for choice in get_args(hint):
            if str(choice).lower() == text.lower():
                return choice
        return _convert(text, hint, where)
    elif hint is bool:
        if text.lower() in ("true", "yes", "1", "false", "no", "0"):
            return text.lower() in ("true", "yes", "1")
    elif hint in (int, float):
        try:
            return _convert(hint(text), hint, where)
        except ValueError:
            pass
    elif hint in (str, Path):
        return hint(text)
    raise UserError(f"{where}: must be {type_name(hint)}, not {_said(text)}")
