"""Write docs/reference from the code: the command line, the fields of recipes, the Python names. ``--check`` only compares.

``python docs/generate.py`` (or ``make docs``) after a change of a help text, a default or a docstring.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

FOLDER = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code: change the code, then run `make docs`. -->"
# verb -> the stage whose recipe fields are its flags
STAGE_OF = {
    "tune": "sft",
    "pretrain": "pretrain",
    "merge": "merge",
    "synth documents": "document_questions",
    "synth self-instruct": "self_instruct",
    "synth evol-instruct": "evol_instruct",
    "synth clean-chats": "clean_chats",
    "synth judge": "judge",
    "data build": "data",
    "data tokenizer": "tokenizer",
    "data pack": "tokens",
    "data index": "index",
    "data unique": "unique",
}


def main() -> int:
    """Write the pages, or with ``--check`` say which are out of date; the exit code."""
    pages = {"command-line.md": command_line(), "recipes.md": recipes(), "python.md": python_names()}
    pages |= {"api.md": api(), "conformance.md": conformance()}
    if "--check" not in sys.argv[1:]:
        FOLDER.mkdir(exist_ok=True)
        for name, text in pages.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    stale = [name for name, text in pages.items() if not same(FOLDER / name, text)]
    for name in stale:
        print(f"error: docs/reference/{name} is not what the code says: run make docs", file=sys.stderr)
    return 1 if stale else 0


def api() -> str:
    """The server's parameters."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from api_reference import page

    return page(NOTE, table)


def conformance() -> str:
    """What the suites of others say of the server, from what tools/conformance/run.py wrote down."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from conformance_reference import page

    return page(table)


def same(file: Path, text: str) -> bool:
    """Whether the file holds this text."""
    return file.is_file() and file.read_text(encoding="utf-8") == text


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A Markdown table."""
    cells = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in [head, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def code(text: object) -> str:
    return f"`{text}`"


# -- the command line -------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every verb with its arguments and flags."""
    import typer

    from criadero.cli import __doc__ as about
    from criadero.cli import app

    root: Any = typer.main.get_command(app)
    lines = ["# Command line", NOTE, "", "`criadero VERB [THING] [--flag value]`", "", *_paragraphs(about, skip=1)]
    for name, command in root.commands.items():
        parts = getattr(command, "commands", None)
        for sub, one in parts.items() if parts else [("", command)]:
            lines += _verb(f"{name} {sub}".strip(), one)
    return "\n".join(lines).rstrip() + "\n"


def _verb(name: str, command: Any) -> list[str]:
    visible = [param for param in command.params if not getattr(param, "hidden", False) and param.name != "help"]
    words = [param for param in visible if param.param_type_name == "argument"]
    flags = [param for param in visible if param.param_type_name == "option"]
    stage = STAGE_OF.get(name)
    if stage:
        usage = command.collect_usage_pieces(None)[0]
    else:
        usage = " ".join([*(param.metavar for param in words), *(["[--flag value]..."] if flags else [])])
    lines = [f"## {name}", "", f"{command.help}", "", "```text", f"criadero {name} {usage}".rstrip(), "```", ""]
    if words and not stage:
        lines += table(("argument", "what"), [(param.metavar, param.help or "") for param in words])
    if flags:
        rows = []
        for param in flags:
            spelled = " ".join(map(code, [*param.opts, *param.secondary_opts]))
            rows.append((spelled, _flag_default(param), param.help or ""))
        lines += table(("flag", "default", "what"), rows)
    if stage:
        lines += [f"Its other flags are the fields of the [{stage} recipe](recipes.md#{stage}).", ""]
    return lines


def _flag_default(param: Any) -> str:
    if param.required:
        return "(must be given)"
    value = param.default
    if value is None or type(value).__name__ == "Sentinel" or (param.is_flag and not param.secondary_opts):
        return ""
    if param.is_flag:
        return code((param.opts if value else param.secondary_opts)[0])
    return code(value)


# -- recipes ----------------------------------------------------------------------------------------------------------


def recipes() -> str:
    """Every stage's recipe: fields, types, defaults."""
    from criadero.run import STAGES
    from criadero.run import __doc__ as about

    lines = ["# Recipes", NOTE, "", *_paragraphs(about, skip=0)]
    lines += [
        "Every field can be written in a TOML file or given as a flag (`--field value`); a flag outweighs a file.",
        "",
    ]
    for stage, load in STAGES.items():
        cls, function = load()
        lines += [f"## {stage}", "", *_paragraphs(cls.__doc__), *_paragraphs(function.__doc__), *_fields(cls)]
    return "\n".join(lines).rstrip() + "\n"


def _fields(cls: type) -> list[str]:
    from criadero.recipe import recipe_fields, required, type_name

    rows, nested = [], []
    for name, (field, hint) in recipe_fields(cls).items():
        inner = [arg for arg in get_args(hint) if isinstance(arg, type) and dataclasses.is_dataclass(arg)]
        kind = f"tables, see [{name}](#{name})" if inner else type_name(hint)
        if inner:
            nested.append((name, inner[0]))
        default = "(must be given)" if required(field) else _value(_default(field))
        rows.append((code(name), kind, default, field.metadata.get("help", "")))
    lines = table(("field", "what it takes", "default", "what it is"), rows)
    for name, inner_cls in nested:
        lines += [f"### {name}", "", *_paragraphs(inner_cls.__doc__), *_fields(inner_cls)]
    return lines


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return code(",".join(map(str, value))) if value else "none"
    if isinstance(value, bool):
        return code(str(value).lower())
    return code(value) if value != "" else "empty"


# -- Python -----------------------------------------------------------------------------------------------------------


def python_names() -> str:
    """The names that ``import criadero`` offers."""
    import criadero

    lines = ["# Python", NOTE, "", *_paragraphs(criadero.__doc__, skip=0)]
    for name in (one for one in criadero.__all__ if one != "__version__"):
        thing = getattr(criadero, name)
        lines += [f"## {name}", "", "```text", _signature(name, thing), "```", "", *_paragraphs(inspect.getdoc(thing))]
        if inspect.isclass(thing) and not issubclass(thing, Exception):
            lines += _members(name, thing)
    return "\n".join(lines).rstrip() + "\n"


class _Plain(str):
    """An annotation that is written as it stands in the code, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return f"{name}(message)"
    signature = inspect.signature(thing)
    kept = [
        one.replace(annotation=_Plain(one.annotation)) if isinstance(one.annotation, str) else one
        for one in signature.parameters.values()
        if one.name != "self"
    ]
    back = signature.return_annotation
    text = str(signature.replace(parameters=kept, return_annotation=inspect.Signature.empty))
    return f"{name}{text} -> {back}" if isinstance(back, str) and back != "None" else name + text


def _members(owner: str, cls: type) -> list[str]:
    """The public methods and properties of a class; properties whose name says it all stand in one line."""
    public = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    bare = [name for name, value in public.items() if isinstance(value, property) and not value.__doc__]
    lines = [f"Properties: {', '.join(map(code, bare))}.", ""] if bare else []
    for name, value in public.items():
        about = _paragraphs(inspect.getdoc(value))
        if isinstance(value, property) and name not in bare:
            lines += [f"### {owner}.{name}", "", *about]
        elif inspect.isfunction(value) and about:
            lines += [f"### {owner}.{name}", "", "```text", _signature(f"{owner}.{name}", value), "```", "", *about]
    return lines


def _paragraphs(text: str | None, *, skip: int = 0) -> list[str]:
    """A docstring as Markdown; `skip` leaves out that many paragraphs at the top. Doctests become Python blocks."""
    parts = inspect.cleandoc(text or "").split("\n\n")[skip:]
    lines: list[str] = []
    for part in filter(None, parts):
        if part.startswith(">>>"):
            source = [line[4:] for line in part.splitlines() if line.startswith((">>> ", "... "))]
            lines += ["```text", *source, "```", ""]
        else:
            lines += [re.sub(r":\w+:(`\w+`)", r"\1", part).replace("``", "`"), ""]
    return lines


if __name__ == "__main__":
    sys.exit(main())
