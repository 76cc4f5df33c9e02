"""Run stages: one from values (`make`), or a folder of numbered recipes in order (`run`).

A recipe folder holds ``NN-name.toml`` files, each with one of :data:`STAGES` as its ``stage``. A text
value that equals an earlier file's name (``base = "04-pretrain"``) means what that stage made; one that
begins with ``./`` or ``../`` is relative to the recipe folder, with ``~/`` to the home folder. A stage is
skipped when its sealed artifact was made with the same recipe from inputs with the same ids.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import glob
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criadero import places
from criadero.artifact import Artifact, content_id, open_artifact, read_passport, resolve, short_id
from criadero.errors import UserError
from criadero.recipe import parse, plain, read_toml

StageFunction = Callable[..., Artifact]  # f(recipe, out: Path, *, overwrite=False, resume=True) -> Artifact
Stages = Mapping[str, Callable[[], tuple[type, StageFunction]]]


def _load(module: str, recipe: str, function: str) -> tuple[type, StageFunction]:
    loaded = importlib.import_module(module)
    return getattr(loaded, recipe), getattr(loaded, function)


STAGES: Stages = {
    "data": functools.partial(_load, "criadero.data.build", "DataRecipe", "build_data"),
    "tokenizer": functools.partial(_load, "criadero.data.train_tokenizer", "TokenizerRecipe", "build_tokenizer"),
    "tokens": functools.partial(_load, "criadero.data.pack", "TokensRecipe", "build_tokens"),
    "index": functools.partial(_load, "criadero.trust.index", "IndexRecipe", "build_index"),
    "unique": functools.partial(_load, "criadero.trust.repeats", "UniqueRecipe", "build_unique"),
    "pretrain": functools.partial(_load, "criadero.train.pretrain", "PretrainRecipe", "pretrain"),
    "logits": functools.partial(_load, "criadero.train.distil", "LogitsRecipe", "logits"),
    "sft": functools.partial(_load, "criadero.train.sft", "SftRecipe", "sft"),
    "quantize": functools.partial(_load, "criadero.quantization.stage", "QuantizeRecipe", "quantize"),
    "merge": functools.partial(_load, "criadero.merge", "MergeRecipe", "merge"),
    "self_instruct": functools.partial(_load, "criadero.synth.self_instruct", "SelfInstructRecipe", "self_instruct"),
    "evol_instruct": functools.partial(_load, "criadero.synth.evol_instruct", "EvolInstructRecipe", "evol_instruct"),
    "clean_chats": functools.partial(_load, "criadero.synth.clean_chats", "CleanChatsRecipe", "clean_chats"),
    "document_questions": functools.partial(
        _load, "criadero.synth.documents", "DocumentQuestionsRecipe", "document_questions"
    ),
    "answers": functools.partial(_load, "criadero.synth.answers", "AnswersRecipe", "answers"),
    "judge": functools.partial(_load, "criadero.synth.judge", "JudgeRecipe", "judge"),
}


NEEDS = {
    "index": ("pydivsufsort", "trace")
}  # stage -> a package that not every installation has, and the extra with it


def make(
    stage: str,
    values: Mapping[str, Any],
    out: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    where: str = "settings",
    stages: Stages = STAGES,
) -> Artifact:
    """Run one stage with recipe `values` (artifacts may stand for their folders) and return what it sealed at `out`."""
    cls, function = stages[stage]()
    given = {key: str(one.path) if isinstance(one, Artifact) else one for key, one in values.items()}
    return function(parse(cls, given, where=where), Path(out), overwrite=overwrite, resume=resume)


def tune(base: Any, data: Any, *, out: str | Path | None = None, overwrite: bool = False, **fields: Any) -> Artifact:
    """Customise a model with examples: ``tune("cria", "shop.jsonl", lora_rank=16)``. `fields` are the sft recipe's."""
    values = {"base": base, "data": data, **fields}
    return make("sft", values, out or tuned_name(base, data), overwrite=overwrite, where="tune")


def tuned_name(base: Any, data: Any) -> str:
    """Where `tune` writes when it is not told: ``cria`` and ``shop.jsonl`` give ``cria-shop``."""
    names = [one.path if isinstance(one, Artifact) else Path(one) for one in (base, data)]
    return f"{names[0].name}-{names[1].name.partition('.')[0]}"


def pretrain(*, out: str | Path, overwrite: bool = False, **fields: Any) -> Artifact:
    """Train a base model from random weights. `fields` are the pretrain recipe's."""
    return make("pretrain", fields, out, overwrite=overwrite, where="pretrain")


def quantize(
    model: Any, to: str = "int4", *, out: str | Path | None = None, overwrite: bool = False, **fields: Any
) -> Artifact:
    """Make a model small: ``quantize("cria", "int4")``. `fields` are the quantize recipe's."""
    values = {"model": model, "to": to, **fields}
    return make("quantize", values, out or quantised_name(model, to), overwrite=overwrite, where="quantize")


def quantised_name(model: Any, to: str) -> str:
    """Where `quantize` writes when it is not told: ``cria`` and ``int4`` give ``cria-int4``."""
    path = model.path if isinstance(model, Artifact) else Path(model)
    return f"{path.name.removesuffix('.gguf')}-{to}"


def read_recipe(file: Path, stage: str) -> dict[str, Any]:
    """The values of one recipe file of `stage`; its ./ and ../ paths are relative to the file."""
    values = read_toml(file)
    said = values.pop("stage", stage)
    if said != stage:
        raise UserError(f"{file}: stage = {said!r} is not a {stage} recipe")
    return _resolved(values, file, [], [], Path(), set())


# -- a folder of recipes ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One recipe file, read and checked."""

    stem: str
    stage: str
    out: Path
    recipe: Any
    function: StageFunction
    paths: frozenset[str]  # the values that were made into paths, as they stand in the recipe


def run(
    folder: str | Path,
    *,
    out: str | Path | None = None,
    start: str | None = None,
    dry_run: bool = False,
    stages: Stages = STAGES,
    say: Callable[[str], None] = print,
) -> list[Artifact]:
    """Run the recipes of a folder in order and return what they made; each line said tells what is done and why.

    `out` is ``out/FOLDERNAME`` by default. `start` (a file's name, number or stage) takes what lies before it as it is
    and makes that stage and all later ones again. `dry_run` says what would be done. Every recipe is checked before the
    first stage starts. UserError: a bad recipe, a missing input, a package that a stage needs, a `start` that is not there.
    """
    folder = Path(folder)
    steps = plan(folder, Path(out) if out else Path("out") / folder.resolve().name, stages)
    first = _position(steps, start, folder) if start else 0
    if not dry_run:
        _check_installed(steps[first:], again=start is not None)
    made: list[Artifact] = []
    stale: set[str] = set()  # in a dry run: what would have been made again
    width = max(len(step.stem) for step in steps)
    for n, step in enumerate(steps):
        name = f"{step.stem:<{width}}  {step.stage:<9}"
        sealed = step.out / "passport.json"
        if n < first:
            if not sealed.exists():
                raise UserError(
                    f"--from {start}: {step.stem} before it is not made yet ({step.out}): run without --from"
                )
            say(f"{name}  taken as it is ({short_id(open_artifact(step.out).id)})")
            made.append(open_artifact(step.out))
            continue
        reason = f"--from {start}" if start else _why(step, stale)
        if reason is None:
            say(f"{name}  up to date ({short_id(open_artifact(step.out).id)}), skipped")
            made.append(open_artifact(step.out))
            continue
        resuming = (step.out.with_name(step.out.name + ".partial") / "resume").is_dir()
        say(f"{name}  {'would be made' if dry_run else 'resuming' if resuming else 'making'}: {reason}")
        if dry_run:
            stale.add(str(step.out))
        else:
            made.append(step.function(step.recipe, step.out, overwrite=sealed.exists(), resume=True))
            say(f"{name}  made: {step.out} ({short_id(made[-1].id)})")
    return made


def _check_installed(steps: list[Step], *, again: bool) -> None:
    """What a late stage needs is asked for before the first one has computed for hours. UserError naming the extra."""
    for n, step in enumerate(steps):
        package, extra = NEEDS.get(step.stage, ("", ""))
        if not package or importlib.util.find_spec(package) is not None:
            continue
        if again or any(_why(one, set()) is not None for one in steps[: n + 1]):
            raise UserError(
                f"{step.stem} needs the package {package}: pip install {package} (or 'criadero[{extra}]'), then run again"
            )


def plan(folder: Path, out: Path, stages: Stages = STAGES) -> list[Step]:
    """Read and check every recipe of a folder, in order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of recipes")
    files = [file for file in folder.glob("*.toml") if re.match(r"\d+-", file.name)]
    files.sort(key=lambda file: (int(file.name.partition("-")[0]), file.name))
    if not files:
        raise UserError(f"{folder} holds no recipe: their names begin with a number, such as 01-data.toml")
    others = sorted({file.name for file in folder.glob("*.toml")} - {file.name for file in files})
    if others:
        raise UserError(
            f"{folder / others[0]}: its name has no number, so it has no place in the order: call it NN-name.toml"
        )
    stems = [file.stem for file in files]
    steps = []
    for n, file in enumerate(files):
        values = read_toml(file)
        stage = values.pop("stage", None)
        if stage not in stages:
            near = difflib.get_close_matches(str(stage), stages, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "write one of " + ", ".join(stages)
            raise UserError(f"{file}: stage = {stage!r} is not a stage: {hint}")
        paths: set[str] = set()
        cls, function = stages[stage]()
        recipe: Any = parse(cls, _resolved(values, file, stems[:n], stems[n:], out, paths), where=str(file))
        steps.append(Step(file.stem, stage, out / file.stem, recipe, function, frozenset(paths)))
    return steps


def _resolved(value: Any, file: Path, earlier: list[str], later: list[str], out: Path, paths: set[str]) -> Any:
    """`value` with the names of earlier stages and ./ ../ paths in it made into paths, which are added to `paths`."""
    if isinstance(value, dict):
        return {key: _resolved(one, file, earlier, later, out, paths) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolved(one, file, earlier, later, out, paths) for one in value]
    if not isinstance(value, str):
        return value
    if value in earlier:
        path = str(out / value)
    elif value in later:
        raise UserError(f"{file}: {value!r} is not made before it: a stage uses only earlier ones")
    elif value.startswith(("./", "../")):
        path = os.path.normpath(file.parent / value)
        if not os.path.exists(path) and not glob.has_magic(path):
            raise UserError(f"{file}: {value!r} is not there ({path})")
    elif value.startswith("~/"):  # as a sealed recipe writes what lies in the home folder
        path = str(places.find(value))
    elif re.fullmatch(r"\d+-[\w-]+", value) and not os.path.exists(value):
        near = difflib.get_close_matches(value, earlier, n=1)
        raise UserError(f"{file}: {value!r} is no earlier stage" + (f": did you mean {near[0]!r}?" if near else ""))
    else:
        return value
    paths.add(path)
    return path


def _position(steps: list[Step], start: str, folder: Path) -> int:
    for n, step in enumerate(steps):
        number = step.stem.partition("-")[0]
        if start in (step.stem, step.stem + ".toml", number, number.lstrip("0"), step.stage):
            return n
    near = difflib.get_close_matches(start, [step.stem for step in steps], n=1)
    hint = f"did you mean {near[0]!r}?" if near else "the stages are " + ", ".join(step.stem for step in steps)
    raise UserError(f"--from {start}: no such stage in {folder}: {hint}")


# -- is it up to date? ------------------------------------------------------------------------------------------------


def _why(step: Step, stale: set[str]) -> str | None:
    """Why a stage has to be made, in words; None when its sealed artifact is what the recipe and its inputs give."""
    passport = read_passport(step.out) if step.out.is_dir() else None
    if passport is None:
        return "not made yet"
    for row in passport["files"]:
        file = step.out / row["path"]
        if not file.is_file() or file.stat().st_size != row.get("size"):
            return f"{row['path']} in it is missing or has changed"
    recorded = {str(row.get("locator") or row.get("name")): row["id"] for row in passport["inputs"]}
    old = (passport.get("step") or {}).get("config") or {}
    new = plain(dataclasses.asdict(step.recipe))
    ids = _Ids()
    fresh = {f.name: plain(f.default) for f in dataclasses.fields(step.recipe) if f.default is not dataclasses.MISSING}
    for key in new:
        if key not in old and key in fresh and new[key] == fresh[key]:
            continue  # a setting that this version has and that one had not: left alone, it changes nothing
        if (change := _changed(key, old.get(key), new[key], recorded, ids)) is not None:
            return change
    # The makers' words in a card change nothing that was computed: a new wording does not make hours of training stale.
    paths = step.paths - {str(new.get("card"))}
    here = {one for path in paths for one in (glob.glob(path) if glob.has_magic(path) else [path])}
    if again := sorted(here & stale):
        return f"{Path(again[0]).name} is made again"
    known, found = set(recorded.values()), set()
    for path in sorted(here):
        said = places.told(path)
        if said in recorded:
            if (id := ids.of(path)) != recorded[said]:
                return f"{path} has changed"
        elif any(_inside(one, path) for one in recorded):
            continue  # looked at below, file by file
        elif (id := ids.of(path)) not in known:
            return f"{path} is not what it was made of"
        found.add(id)
    for locator, id in recorded.items():
        if "://" in locator:
            continue  # an endpoint that answered: what it said is in the artifact
        if id not in found and ids.of(locator) != id:
            return f"{locator} has changed"
    return None


def _changed(key: str, old: Any, new: Any, recorded: Mapping[str, str], ids: _Ids) -> str | None:
    """How two plain values differ. A path differs only when what lies there has another id than was recorded."""
    if old == new or old == places.told(new):
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new}]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(f"{key}[{n}]", *pair) for n, pair in enumerate(zip(old, new, strict=True), 1)]
    elif isinstance(old, str) and isinstance(new, str) and old in recorded and ids.of(new) == recorded[old]:
        return None
    else:
        return f"{key} is {_short(new)}, it was {_short(old)}"
    return next((text for pair in pairs if (text := _changed(*pair, recorded, ids)) is not None), None)


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _inside(locator: str, folder: str) -> bool:
    return os.path.abspath(places.find(locator)).startswith(os.path.abspath(folder) + os.sep)


class _Ids:
    """Content ids by reference, each hashed once; None for what is not there."""

    def __init__(self) -> None:
        self._known: dict[str, str | None] = {}

    def of(self, ref: str) -> str | None:
        if ref not in self._known:
            try:
                self._known[ref] = content_id(resolve(ref))
            except (UserError, OSError):
                self._known[ref] = None
        return self._known[ref]
