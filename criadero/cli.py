"""The command line: verb -> module, imported when the verb runs (``criadero --help`` imports neither torch nor tokenizers).

Results go to standard output, what is said on the way to standard error. Exit codes: 0, 2 for a mistake in what was given
(one line, ``error: ...``), 130 after Ctrl-C; ``licence check`` and
``passport verify`` have more, told in their help. A traceback is a bug.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from criadero import cli_passport, cli_serve, cli_store, cli_trace
from criadero.errors import UserError

_PLAIN: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
_FIELDS: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}  # recipe fields are flags too
_OWN = ("out", "recipe", "overwrite", "no-resume", "json", "help")  # flags of the command itself, for near misses

# what the system refuses, whatever this program does: told in a line, unlike a bug
_REFUSED = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ELOOP,
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EMFILE,
)  # fmt: skip

app = typer.Typer(
    help="Raise your own Llama, in the open, on your own machine.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_PLAIN,
)
data_app = typer.Typer(help="Look at data, and make it ready: documents, tokenizer, tokens.", no_args_is_help=True)
passport_app = typer.Typer(help="Check, sign, export and prove what an artifact says of itself.", no_args_is_help=True)
synth_app = typer.Typer(help="Make chats to learn from: with a teacher, of shared chats, of your documents; and judge.")
app.add_typer(data_app, name="data")
app.add_typer(synth_app, name="synth")
app.add_typer(passport_app, name="passport")
cli_passport.add(passport_app)
licence_app = typer.Typer(help="Say what the licences of all that an artifact was made of ask.", no_args_is_help=True)
app.add_typer(licence_app, name="licence")

Out = Annotated[Path | None, typer.Option("--out", help="where the artifact goes (a new folder)")]
Words = Annotated[list[str] | None, typer.Argument(hidden=True)]  # positional words and recipe fields, told apart later
Recipe = Annotated[Path | None, typer.Option("--recipe", help="a TOML file with fields; a flag outweighs it")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="replace the artifact at --out, once the new one is whole")
]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="go on with a run that was cut off, or start over")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from criadero import __version__

        print(f"criadero {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# -- models -----------------------------------------------------------------------------------------------------------


@app.command()
def demo() -> None:
    """Customise the bundled model with a shop's chats, compare, and talk to it: three minutes."""
    from criadero.demo import demo as run_demo

    raise typer.Exit(run_demo() or 0)


@app.command()
def chat(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a bundled model, a folder, or a .gguf file")
    ] = "cria-chat",
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 0.3,
    max_tokens: Annotated[int, typer.Option(help="the longest answer, in tokens")] = 200,
    seed: Annotated[int | None, typer.Option(help="the same seed gives the same answers")] = None,
    require_passport: Annotated[
        bool, typer.Option("--require-passport", help="open it only when every file is as its passport says")
    ] = False,
    pubkey: Annotated[
        Path | None, typer.Option("--pubkey", help="and when it is signed with this key (implies --require-passport)")
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(
            metavar="INDEX", help="stop an answer that copies what may not be copied of this index of the model's data"
        ),
    ] = None,
    guard_tokens: Annotated[int, typer.Option(help="the longest run that --guard lets pass, in tokens")] = 50,
) -> None:
    """Talk to a model in the terminal; /help there lists its commands. Piped, each line is a question: echo hi | criadero chat

    The last answer and what was typed are kept for you alone, under $XDG_STATE_HOME (~/.local/state): see criadero trace --last.
    """
    from criadero.terminal import chat as talk

    talk(
        model, system=system, temperature=temperature, max_tokens=max_tokens, seed=seed, require_passport=require_passport,
        pubkey=pubkey, guard=guard, guard_tokens=guard_tokens,
    )  # fmt: skip


def _recipe_command(stage: str, words: str = "") -> type[TyperCommand]:
    """A command whose help ends with the fields of the stage's recipe, read from the dataclass."""

    class RecipeCommand(TyperCommand):
        def collect_usage_pieces(self, ctx: Any) -> list[str]:
            return [f"{words} [--FIELD VALUE]... --out DIR".strip()]

        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            _print_fields(stage)

    return RecipeCommand


def _print_fields(stage: str) -> None:
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from criadero.recipe import recipe_fields, required, type_name
    from criadero.run import STAGES

    cls, _ = STAGES[stage]()
    table = Table(title="Fields of the recipe, as flags or in a --recipe file", title_justify="left", box=None)
    for column in ("flag", "default", "what"):
        table.add_column(column, overflow="fold", no_wrap=column == "flag")
    for name, (field, hint) in recipe_fields(cls).items():
        default = "(must be given)" if required(field) else field.default
        about = field.metadata.get("help", "") or type_name(hint)
        if default is dataclasses.MISSING or default is None:
            shown = ""
        elif isinstance(default, tuple):
            shown = ", ".join(map(str, default))
        else:
            shown = str(default).lower() if isinstance(default, bool) else str(default)
        table.add_row(f"--{name}", shown, about)
    Console(markup=False, highlight=False).print(table)


def _make(
    stage: str, positional: tuple[str, ...], args: list[str] | None, out: Path | None, recipe: Path | None,
    overwrite: bool, resume: bool,
) -> None:  # fmt: skip
    """Run one stage from positional words, flags and a recipe file, and say what was made."""
    from criadero.recipe import flags_to_values, split_flags
    from criadero.run import STAGES, make, quantised_name, read_recipe, tuned_name

    cls, _ = STAGES[stage]()
    words, flags = split_flags(cls, args or [], also=_OWN)
    if len(words) > len(positional):
        raise UserError(f"unexpected argument {words[len(positional)]!r}: settings are written --field value")
    values = read_recipe(recipe, stage) if recipe else {}
    named = dict(zip(positional, words, strict=False))
    if empty := [name.upper() for name, word in named.items() if not word]:
        raise UserError(f"{empty[0]} is an empty word: name a file or folder")
    for name in named.keys() & flags.keys():
        raise UserError(f"{name} is given twice: {named[name]!r} and --{name} {flags[name]!r}")
    listed = flags_to_values(cls, [part for name, word in named.items() for part in (f"--{name}", word)])
    values |= listed | flags
    missing = [name.upper() for name in positional if name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given: see --help")
    if out is None and stage == "sft":
        out = Path(tuned_name(values["base"], values["data"]))
    if out is None and stage == "quantize":
        out = Path(quantised_name(values["model"], str(values.get("to", "int4"))))
    if out is None:
        raise UserError("--out must be given: the folder to make")
    where = f"{recipe} and flags" if recipe and flags else str(recipe or "flags")
    made = make(stage, values, out, overwrite=overwrite, resume=resume, where=where)
    print(f"{made.path}: {made.kind} {made.id.removeprefix('sha256:')[:12]}")
    if stage in ("sft", "quantize"):
        print(f"talk to it: criadero chat {made.path}")


def _add_stage(verbs: typer.Typer, name: str, stage: str, positional: tuple[str, ...], about: str) -> None:
    """The command that runs one stage: every one takes the same options, and its recipe's fields."""
    cls = _recipe_command(stage, " ".join(positional).upper())

    @verbs.command(name, cls=cls, context_settings=_FIELDS, help=about)
    def command(
        args: Words = None,
        out: Out = None,
        recipe: Recipe = None,
        overwrite: Overwrite = False,
        resume: Resume = True,
    ) -> None:
        _make(stage, positional, args, out, recipe, overwrite, resume)


_add_stage(app, "tune", "sft", ("base", "data"), "Customise a model with examples of your own.")
_add_stage(
    app, "quantize", "quantize", ("model",), "Make a model small: 4 or 8 bits a weight, measured before and after."
)
_add_stage(app, "merge", "merge", ("models",), "Fold an adapter into its base, or average several models into one.")
_add_stage(app, "pretrain", "pretrain", ("data",), "Train a base model on tokens, from random weights.")


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a bundled model or a folder")],
    out: Annotated[Path, typer.Option("--out", help="a new folder, or a file that ends with .gguf")],
    to: Annotated[str, typer.Option("--to", help="gguf (llama.cpp, Ollama) or hf (transformers)")] = "gguf",
    type: Annotated[str | None, typer.Option("--type", help="q8_0 q4_0 f16 bf16 f32")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model in another layout."""
    from criadero.export import export as write

    made = write(model, to=to, out=out, type=type, overwrite=overwrite)
    cli_passport.warn_before_sharing(model)
    print(made if isinstance(made, Path) else made.path)


# -- data -------------------------------------------------------------------------------------------------------------


@data_app.command("show")
def data_show(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a file or folder of examples or documents, or a dataset artifact")
    ],
    limit: Annotated[int, typer.Option(help="how many examples to print", min=0)] = 3,
) -> None:
    """Say what shape the data has, how much there is, and print some of it."""
    from criadero.data.show import show as show_data

    print(show_data(path, limit=limit))


_add_stage(
    data_app, "build", "data", (),
    "Sources to a dataset: cleaned, deduplicated, with a held-out part and a table by source.",
)  # fmt: skip
_add_stage(data_app, "tokenizer", "tokenizer", ("data",), "Train a byte-level BPE tokenizer on a dataset.")
_add_stage(data_app, "pack", "tokens", ("data",), "A dataset to token shards, ready for pretraining.")
_add_stage(
    data_app, "logits", "logits", ("teacher", "data"),
    "What a larger model would say at each learned token of the data, for tune to follow (distillation).",
)  # fmt: skip
_add_stage(data_app, "index", "index", ("tokens",), "Tokens to an index, in which any text is found at once.")
_add_stage(data_app, "unique", "unique", ("tokens", "index"), "Tokens without the passages that stand in them twice.")
cli_trace.add(app, data_app)
cli_serve.add(app)
cli_store.add(app, data_app)


# -- synth ------------------------------------------------------------------------------------------------------------

_add_stage(
    synth_app, "documents", "document_questions", ("documents",),
    "A folder of documents to questions and answers that stand in them, each traceable to its paragraph.",
)  # fmt: skip
_add_stage(
    synth_app, "self-instruct", "self_instruct", ("teacher",), "A few tasks to many, written by a teacher (Alpaca)."
)
_add_stage(
    synth_app,
    "evol-instruct",
    "evol_instruct",
    ("teacher",),
    "Tasks to harder ones, in rounds, by a teacher (WizardLM).",
)
_add_stage(
    synth_app, "clean-chats", "clean_chats", ("data",), "Chats as people share them, cleaned and split (Vicuna)."
)
_add_stage(
    synth_app, "answers", "answers", ("teacher", "data"), "The questions of some chats, answered by a teacher instead."
)
_add_stage(
    synth_app, "judge", "judge", ("questions",), "A teacher compares two models' answers, or marks one's (MT-bench)."
)


# -- recipes and artifacts --------------------------------------------------------------------------------------------


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a folder of NN-name.toml files")],
    out: Annotated[Path | None, typer.Option("--out", help="default: out/FOLDERNAME")] = None,
    start: Annotated[str | None, typer.Option("--from", help="make this stage and all later ones again")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would be done")] = False,
) -> None:
    """Run the recipes of a folder in order, skipping what is up to date."""
    from criadero.run import run as run_folder

    run_folder(folder, out=out, start=start, dry_run=dry_run)


@app.command()
def show(
    ref: Annotated[str, typer.Argument(metavar="REF", help="a bundled model or a folder")],
    lineage: Annotated[bool, typer.Option("--lineage", help="print only its family tree")] = False,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="draw the family tree into this file (.svg or .html)")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="tokens of context to say the memory for; default: the model's whole")
    ] = None,
    speed: Annotated[
        bool, typer.Option("--speed", help="measure for a second how many tokens/s this machine's memory allows")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="print where the page lies that compares a tuned model with its base")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say what an artifact is, what it was made of, and what memory it takes here."""
    if report:
        from criadero.summary import report_of

        return print(report_of(ref))
    if lineage or svg:
        return cli_passport.picture(ref, lineage, svg)
    from criadero.summary import as_dict, describe, licence_of, needs_of

    if as_json:
        facts = as_dict(ref) | {"needs": needs_of(ref, context=context, speed=speed)}
        if (computed := licence_of(ref)) is not None:
            facts["licence"] = (facts.get("licence") or {}) | {"computed": computed}
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        print(describe(ref, context=context, speed=speed))


@licence_app.command("check")
def licence_check(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a bundled model or a folder")],
    commercial: Annotated[bool, typer.Option("--commercial", help="it is used for money")] = False,
    distribute: Annotated[bool, typer.Option("--distribute", help="it is given to others")] = False,
    name: Annotated[str | None, typer.Option(help="the name it is shared under; default: its own")] = None,
    licence: Annotated[
        str | None, typer.Option(help="the licence it is shared under; default: the declared one")
    ] = None,
    mau: Annotated[
        list[str] | None, typer.Option(metavar="MONTH=NUMBER", help="your monthly users then, such as 2023-06=7.1e8")
    ] = None,
    region: Annotated[str | None, typer.Option(help="where you are established: EU, or two letters such as ES")] = None,
    end_user: Annotated[bool, typer.Option("--end-user", help="you got it inside a product for end users")] = False,
    data_effect: Annotated[
        str, typer.Option(help="what licences of training data do to the weights: none, attribution or careful")
    ] = "attribution",
    fix: Annotated[bool, typer.Option("--fix", help="write what is missing into a sealed copy")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="the copy of --fix; default: DIR-licensed")] = None,
    texts: Annotated[Path | None, typer.Option("--texts", help="a folder with licence texts for --fix")] = None,
    lang: Annotated[str, typer.Option(help="language of the text: en or es")] = "en",
    as_json: AsJson = False,
) -> None:
    """Duties and conflicts along the lineage: exit 0 in order (duties or none), 2 bad input, 3 conflict, 4 not known."""
    from criadero.trust import licence_report, licences
    from criadero.trust.licence_fix import fix as write
    from criadero.trust.licence_fix import left_to_do

    intent = licences.Intent(
        commercial=commercial, distribute=distribute, mau=licences.parse_mau(mau or []), end_user=end_user, name=name,
        region=licences.parse_region(region), declared=licence, data_effect=data_effect,
    )  # fmt: skip
    licence_report.check_language(lang)
    if not fix and (out or texts):
        raise UserError("--out and --texts say where --fix writes and reads: give --fix too")
    report = licences.check(folder, intent)
    if fix:
        made, wrote = write(folder, report, out or f"{str(folder).rstrip('/')}-licensed", texts=texts)
        print(f"{made.path}: {', '.join(wrote) or 'name or licence changed'}", file=sys.stderr)
        report = licences.check(made, intent)
        for missing in left_to_do(report):
            print(f"note: no text of {missing} is at hand: give its folder with --texts", file=sys.stderr)
    if as_json:
        print(json.dumps(licence_report.as_dict(report, lang), ensure_ascii=False, indent=2))
    else:
        print(licence_report.describe(report, lang))
    raise typer.Exit(report.exit_code)


# -- the way out ------------------------------------------------------------------------------------------------------


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; see the module's docstring for the codes."""
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace" if stream is sys.stderr else "replace"
            )  # a terminal of few letters
    try:
        code = app(args=args, prog_name="criadero", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit complains
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _REFUSED:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror}", file=sys.stderr)
            return 2
        # typer brings its own copy of click in some versions: go by what the exception offers, not by its class
        if type(error).__name__ == "Abort":
            return 130
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ != "NoArgsIsHelpError":  # that one has printed the help
            print("error: " + " ".join(error.format_message().split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    main()
