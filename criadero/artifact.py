"""Artifacts: folders that are sealed last, hash every file, and name what they were made of.

``with create(OUT, ...) as draft`` works in ``OUT.partial``; leaving the block cleanly hashes the files, writes
``passport.json`` and renames the folder to ``OUT``, so that a folder of that name is always whole. What was not sealed
is not complete. The passport is canonical JSON (RFC 8785, restricted to str, int, bool, list, dict and null; floats are
decimal strings); its ``id`` is the sha256 of it without ``id``, and inputs are named by such ids, so a chain of folders
is tamper-evident without a server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from criadero import machine, places
from criadero.errors import UserError
from criadero.merkle import CHUNK, folder_root, hash_file, sha256_file
from criadero.passport import CHUNKS, FORMAT, Problem, compare, passport_id, read_lineage, read_passport, role_of, walk
from criadero.passport import LINEAGE as _LINEAGE
from criadero.passport import MARK as _MARK
from criadero.passport import PASSPORT as _PASSPORT
from criadero.passport import UNSEALED as _UNSEALED
from criadero.recipe import canonical_json, digest, plain, stage_name, to_toml

KINDS = (
    "dataset", "tokenizer", "tokens", "base", "chat", "adapter", "model", "quantised", "index", "audit", "policy",
    "logits",
)  # fmt: skip
RELATIONS = (
    "finetune_of", "trained_on", "trained_on_outputs_of", "outputs_of", "distilled_from", "merged_from", "quantised_from",
    "converted_from", "tokenizer_of", "code_of", "evaluated_on", "decontaminated_against", "filtered_by", "contains",
)  # fmt: skip
BUNDLED = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Input:
    """Something an artifact was made of.

    `relation` says how: one of :data:`RELATIONS`. `id` is the passport's id, or the sha256 of a plain file, or of a
    folder's sorted (path, sha256) list. `verified` means that a passport vouches for it and that its files matched.
    `ancestors` are passports: its own, then those behind it.
    """

    relation: str
    id: str
    name: str
    licence: str | None = None
    locator: str | None = None
    verified: bool = False
    ancestors: tuple[dict[str, Any], ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Artifact:
    """A sealed folder and its passport."""

    path: Path
    passport: dict[str, Any] = field(repr=False)

    @property
    def id(self) -> str:
        return self.passport["id"]

    @property
    def kind(self) -> str:
        return self.passport["kind"]

    @property
    def name(self) -> str:
        return self.passport["name"]

    @property
    def inputs(self) -> list[dict[str, Any]]:
        return self.passport["inputs"]

    @property
    def files(self) -> list[dict[str, Any]]:
        return self.passport["files"]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return self.passport["metrics"]

    def ancestors(self) -> list[dict[str, Any]]:
        """The passports in lineage.jsonl, nearest first."""
        return read_lineage(self.path)

    def sources(self) -> list[dict[str, Any]]:
        """The by-source rows of the data it was made of: its own, or those of the nearest ancestors that have some."""
        for passport in [self.passport, *self.ancestors()]:
            rows = (passport.get("data") or {}).get("by_source")
            if rows:
                return list(rows)
        return []

    def lineage(self) -> str:
        """What it was made of, as a text tree, from `inputs` and lineage.jsonl: one line each."""
        known = {one["id"]: one for one in self.ancestors()}
        lines = [_title(self.passport)]
        shown: set[str] = set()
        todo: list[tuple[dict[str, Any], str, bool]] = []  # input, indent, whether it is the last of its branch

        def branch(passport: Mapping[str, Any], indent: str) -> None:
            inputs = passport.get("inputs") or []
            todo.extend((one, indent[-120:], n == 0) for n, one in enumerate(reversed(inputs)))

        branch(self.passport, "")
        while todo:  # a stack: a chain may be longer than Python's own
            one, indent, last = todo.pop()
            behind = known.get(one["id"])
            again = behind is not None and one["id"] in shown
            lines.append(
                indent + ("└─ " if last else "├─ ") + _input_title(one, behind) + (" (above)" if again else "")
            )
            if behind is not None and not again:
                shown.add(one["id"])
                branch(behind, indent + ("   " if last else "│  "))
        return "\n".join(lines)


def _title(passport: Mapping[str, Any]) -> str:
    return f"{passport.get('name')} · {passport.get('kind')} · {short_id(str(passport.get('id')))}"


def _input_title(one: Mapping[str, Any], behind: Mapping[str, Any] | None) -> str:
    relation = str(one.get("relation", "")).replace("_", " ")
    licence = f" · {one['licence']}" if one.get("licence") else ""
    if behind is not None:
        return f"{relation}: {_title(behind)}{licence}"
    note = "" if one.get("verified") else " · no passport"
    return f"{relation}: {one.get('name')} · {short_id(str(one.get('id')))}{licence}{note}"


def short_id(id: str) -> str:
    """The first twelve hexadecimal digits of an id."""
    return id.removeprefix("sha256:")[:12]


# -- finding and opening ----------------------------------------------------------------------------------------------


def bundled_models() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in BUNDLED.glob(f"*/{_PASSPORT}"))


def resolve(ref: str | Path | Artifact) -> Path:
    """The folder or file that `ref` means: a path, or the name of a bundled model. The passport is not read.

    A folder of the same name in the working directory goes before a bundled model when it looks like a model; which of
    the two was taken is said on stderr. UserError with the nearest name when there is neither.
    """
    if isinstance(ref, Artifact):
        return ref.path
    text, path = os.fspath(ref), places.find(ref)
    if not text:
        raise UserError("the name of a model is empty: give a folder or one of " + ", ".join(bundled_models()))
    bundled = BUNDLED / text
    if text == path.name and text in bundled_models():
        if not path.exists():
            return bundled
        if path.is_dir() and _looks_like_artifact(path):
            _note(f"{text!r} is taken from the folder ./{text}, not the bundled model of that name")
            return path
        _note(f"{text!r} is the bundled model; write ./{text} for the file or folder here")
        return bundled
    if path.exists():
        return path
    kept = path.with_name(path.name + ".replaced")
    if (kept / _PASSPORT).exists():
        raise UserError(f"{path} is missing: a run was cut off while replacing it; rename {kept} back to {path.name}")
    if (partial := _partial(path)).is_dir():
        raise UserError(f"{path} is not finished: {partial} is there; run the command that makes it again")
    near = difflib.get_close_matches(text, [*bundled_models(), *_neighbours(path)], n=1, cutoff=0.6)
    advice = f"did you mean {near[0]!r}?" if near else "give a folder or a file" + _or_bundled()
    what = "model" if text == path.name else "file or folder"
    raise UserError(f"no such {what} {text!r}: {advice}")


def _or_bundled() -> str:
    names = bundled_models()
    return ", or a bundled model: " + ", ".join(names) if names else ""


def _neighbours(path: Path) -> list[str]:
    try:
        return [str(path.with_name(one.name)) for one in path.parent.iterdir() if not one.name.startswith(".")][:10_000]
    except OSError:
        return []


def _looks_like_artifact(path: Path) -> bool:
    return any((path / name).exists() for name in (_PASSPORT, "config.json", "tokenizer.json")) or any(
        path.glob("*.gguf")
    )


@functools.cache
def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)  # once for each text: resolve is called many times in a run


def open_artifact(ref: str | Path | Artifact, *, require_passport: bool = False) -> Artifact:
    """A folder, or the name of a bundled model, with its passport read. Files are hashed and compared only with
    `require_passport`, and then UserError says what differs; see also :func:`verify`."""
    if require_passport:
        require(ref)
    if isinstance(ref, Artifact):
        return ref
    path = resolve(ref)
    if not path.is_dir():
        raise UserError(f"{path} is a file: an artifact is a folder with a {_PASSPORT}")
    passport = read_passport(path)
    if passport is None:
        raise UserError(f"{path} has no {_PASSPORT}: it was not sealed here (an imported or unfinished folder)")
    return Artifact(path, passport)


# -- hashes -----------------------------------------------------------------------------------------------------------


def content_id(path: Path) -> str:
    """The id of an input: a sealed folder's passport id, a file's sha256, or that of a folder's (path, sha256) list."""
    if not path.is_dir():
        return sha256_file(path)
    passport = read_passport(path)
    return passport["id"] if passport else digest([[name, sha256_file(file)] for name, file in walk(path)])


def verify(path: str | Path) -> list[Problem]:
    """How a sealed folder differs from its passport: every file is hashed. Empty when it does not.

    A passport whose id is not its own hash counts as changed, and so does a lineage.jsonl in which an ancestor is missing
    or forged. ``resume/`` is not looked at. Signatures, samples and deeper checks: `criadero.trust.verify`.
    """
    folder = resolve(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: an artifact is a folder with a {_PASSPORT}")
    return compare(folder)


def require(ref: str | Path | Artifact) -> Path:
    """The folder that `ref` means, once every file of it has been found to be as its passport says; UserError otherwise."""
    folder = resolve(ref)
    problems = verify(folder)
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(f"{folder} is not opened, a passport is required: {problems[0]}{more}")
    return folder


# -- making -----------------------------------------------------------------------------------------------------------


def input_of(
    relation: str,
    ref: str | Path | Artifact,
    *,
    name: str | None = None,
    licence: str | None = None,
    locator: str | None = None,
) -> Input:
    """An :class:`Input` for a sealed folder, a plain folder or a file. It is hashed whole.

    A sealed folder that does not match its passport raises UserError.
    """
    if relation not in RELATIONS:
        raise ValueError(f"relation {relation!r} is not one of {RELATIONS}")
    path = resolve(ref)
    where = locator if locator is not None else str(ref.path if isinstance(ref, Artifact) else ref)
    passport = read_passport(path) if path.is_dir() else None
    try:
        if passport is None:
            return Input(relation, content_id(path), name or path.name, licence, where)
        problems = verify(path)
    except OSError as error:
        raise UserError(f"{error.filename or path}: cannot be read: {error.strerror}") from None
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UserError(
            f"{path} does not match its passport ({problems[0]}{more}): make it again, or delete its {_PASSPORT} to "
            "use it as a folder of unknown origin"
        )
    behind = (passport, *Artifact(path, passport).ancestors())
    declared = licence or (passport.get("licence") or {}).get("declared")
    return Input(relation, passport["id"], name or passport["name"], declared, where, True, behind)


@dataclass
class Draft:
    """An artifact in the making: write files under `path`, fill the tables, and leave the block."""

    path: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    version: str = "1"
    keep_resume: bool = False  # keep resume/ in the sealed folder (it is neither hashed nor verified)
    resumed: bool = False  # there was a resume/ of an earlier run with the same settings
    _before: dict[str, str] = field(default_factory=dict, repr=False)  # what the earlier run read: locator -> id

    def add_input(
        self,
        relation: str,
        ref: str | Path | Artifact,
        *,
        name: str | None = None,
        licence: str | None = None,
        locator: str | None = None,
    ) -> Input:
        """Hash and record something this is made of; see :func:`input_of`."""
        one = input_of(relation, ref, name=name, licence=licence, locator=locator)
        self._record(one)
        return one

    def _record(self, one: Input) -> None:
        key = f"{one.relation} {one.locator or one.name}"
        if self._before.get(key, one.id) != one.id:
            raise UserError(f"{one.locator} has changed since {self.path} was left: delete {self.path} to start over")
        self.inputs.append(one)
        mark = json.loads((self.path / _MARK).read_text(encoding="utf-8"))
        mark["inputs"][key] = one.id
        _write_in_place(self.path / _MARK, mark)


@contextlib.contextmanager
def create(
    out: str | Path,
    *,
    kind: str,
    name: str | None = None,
    recipe: Any = None,
    config: Mapping[str, Any] | None = None,
    inputs: Sequence[Input] = (),
    seeds: Mapping[str, int] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Iterator[Draft]:
    """Make an artifact at `out`; the folder of that name appears whole, when the block is left cleanly.

    `recipe` is a stage's recipe: it is kept as ``recipe.toml`` and, with the stage's name, as the passport's ``step.config``; what is
    made without one gives its settings as `config`. `overwrite` allows an artifact (never another folder) at
    `out` to be replaced, which happens after the new one is sealed. `resume` goes on in the ``OUT.partial`` of a run
    with the same settings that holds ``resume/``. Left by an exception, ``OUT.partial`` is removed unless it holds
    ``resume/``. UserError: `out` exists, cannot be written, or the disk is full.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {KINDS}")
    out = Path(os.path.normpath(out))
    if not out.name:
        raise UserError(f"--out {out}: an artifact is a folder with a name of its own: give one that is not there yet")
    partial = _partial(out)
    absent = [folder for folder in out.parents if not folder.exists()]
    plain([str(out), name])  # text that the passport can hold? asked before the work
    if recipe is not None:
        config = {"stage": stage_name(type(recipe)), **dataclasses.asdict(recipe)}
    settings = {"kind": kind, "config": plain(config or {})}
    try:
        with disk_errors(out):
            _check_free(out, overwrite)
            resumed, before = _open_partial(partial, settings, resume)
            try:
                lock = _lock(partial, settings)
            except OSError:  # the disk is full already
                if not resumed:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:  # a name that is too long, a file system that takes no folders
        raise UserError(f"{out}: cannot be made ({error.strerror}): choose another place with --out") from error
    draft = Draft(partial, resumed=resumed, _before=before)
    started, energy = _now(), machine.EnergyMeter()
    try:
        with disk_errors(out):
            for one in inputs:
                draft._record(one)
            code = machine.code()
            yield draft
            step = {
                "command": machine.command(),
                "config": settings["config"],
                "seeds": dict(seeds or {}),
                "code": code,
            }
            step |= {"env": machine.environment(), "hardware": machine.hardware(), "energy": energy.stop()}
            step |= {"started": started, "ended": _now()} | draft.step
            if recipe is not None:
                # "./x" was meant from where the stage ran; in a recipe file it would mean beside that file
                text = to_toml(recipe, say=places.told).replace('"./', '"')
                (partial / "recipe.toml").write_text(text, encoding="utf-8")
            _seal(draft, out, kind, name or out.name, licence, step)
    except BaseException as error:
        if _has_files(partial / "resume"):
            if not isinstance(error, GeneratorExit):
                print(f"note: the work so far is kept in {partial}: run the same again to go on", file=sys.stderr)
        elif partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # something else has come into them
                for folder in absent:
                    folder.rmdir()
        raise
    finally:
        energy.ended.set()
        os.close(lock)


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """A full disk and a folder that may not be written are the user's to mend: one line, not a traceback."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        # libraries written in Rust or C++ say it in words
        if code in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            raise UserError(f"{out}: the disk is full: free some space and run again") from error
        if code == errno.EFBIG or "File too large" in str(error):
            raise UserError(
                f"{out}: a file is larger than this system allows (File too large): raise the limit (ulimit -f), or "
                "choose another place with --out"
            ) from error
        where = os.path.abspath(str(getattr(error, "filename", None) or "/"))
        if code in (errno.EACCES, errno.EPERM, errno.EROFS) and where.startswith(os.path.abspath(out.parent)):
            raise UserError(
                f"{out}: cannot be written ({os.strerror(code)}): choose another place with --out"
            ) from error
        raise


def _check_free(out: Path, overwrite: bool) -> None:
    kept = out.with_name(out.name + ".replaced")
    if not out.exists() and (kept / _PASSPORT).exists():
        os.rename(kept, out)  # a run was cut off between the two renames of _seal
        _note(f"{out}: put back from {kept.name}, where a run that was cut off had left it")
    parent = out.parent
    for above in (parent, *parent.parents):
        if above.exists():
            if not above.is_dir():
                raise UserError(f"{out}: {above} is not a folder")
            break
    parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        if not overwrite:
            raise UserError(f"{out} exists: choose another place with --out, or replace it with --overwrite")
        if not (out / _PASSPORT).is_file():
            raise UserError(
                f"{out} exists and is not an artifact (no {_PASSPORT}): it is not replaced; choose another place"
            )


def _open_partial(partial: Path, settings: dict[str, Any], resume: bool) -> tuple[bool, dict[str, str]]:
    """Make OUT.partial, or go on in it. Returns whether there is something to resume, and the inputs it was made of."""
    if not partial.exists():
        partial.mkdir()
        return False, {}
    mark: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        mark = json.loads((partial / _MARK).read_text(encoding="utf-8"))
    ours = (partial / _MARK).exists() or (partial / _PASSPORT).exists() or not any(partial.iterdir())
    if not ours:
        raise UserError(f"{partial} is in the way and is not ours: move it away")
    if (partial / _MARK).exists():
        os.close(_lock(partial, None))  # raises when another run is at work in it
    if resume and _has_files(partial / "resume"):
        if {"kind": mark.get("kind"), "config": mark.get("config")} != settings:
            raise UserError(
                f"{partial} was left by a run with other settings ({_difference(mark, settings)}): go on with those, "
                "or delete it to start over"
            )
        (partial / _PASSPORT).unlink(missing_ok=True)
        return True, dict(mark.get("inputs") or {})
    if any(partial.iterdir()):
        print(f"note: removing {partial}, left by a run that did not finish", file=sys.stderr)
    shutil.rmtree(partial)
    partial.mkdir()
    return False, {}


def _difference(mark: dict[str, Any], settings: dict[str, Any]) -> str:
    if mark.get("kind") != settings["kind"]:
        return f"a {mark.get('kind')}"
    old, new = mark.get("config") or {}, settings["config"]
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} = {old.get(key)!s:.40}" for key in keys[:3]) or "unknown"


def _lock(partial: Path, settings: dict[str, Any] | None) -> int:
    """Hold the draft's mark locked, so that a second run on the same OUT is refused. Returns the file descriptor."""
    handle = os.open(partial / _MARK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # not a POSIX system: the rename at the end still decides
        pass
    except BlockingIOError:
        os.close(handle)
        busy = partial.name.removesuffix(".partial")
        raise UserError(f"another run is making {busy} now ({partial}): wait for it, or stop it") from None
    if settings is not None:
        mark = {**settings, "inputs": {}}
        with contextlib.suppress(OSError, ValueError):
            mark["inputs"] = json.loads((partial / _MARK).read_text(encoding="utf-8"))["inputs"]
        _write_in_place(partial / _MARK, mark)
    return handle


def _write_in_place(path: Path, value: Any) -> None:
    path.write_bytes(canonical_json(value))  # not by rename: the lock is on this inode


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _seal(draft: Draft, out: Path, kind: str, name: str, licence: str | None, step: dict[str, Any]) -> None:
    folder = draft.path
    lineage = {passport["id"]: passport for one in draft.inputs for passport in one.ancestors}
    if lineage:
        (folder / _LINEAGE).write_bytes(b"".join(canonical_json(passport) + b"\n" for passport in lineage.values()))
    files, chunks = [], []
    readable = stat.S_IMODE((folder / _MARK).stat().st_mode)
    (folder / CHUNKS).unlink(missing_ok=True)
    for relative, file in walk(folder):
        if relative in _UNSEALED:
            continue
        if file.is_symlink():
            raise ValueError(f"{file} is a link: an artifact holds its files itself")
        if stat.S_IMODE(file.stat().st_mode) == 0o600:  # as safetensors writes: for others as readable as the rest
            file.chmod(readable)
        one = hash_file(file)
        files.append({"path": relative, "size": one.size, "sha256": one.sha256, "role": role_of(relative)})
        chunks.append((relative, one.size, one.leaves))
        _fsync(file)
    merkle: dict[str, Any] = {"alg": "sha256", "chunk": CHUNK, "root": folder_root(chunks)}
    if any(size > CHUNK for _, size, _ in chunks):  # else every file is one chunk, and a sample saves nothing
        (folder / CHUNKS).write_bytes(b"".join(leaves for _, _, leaves in chunks))
        one = hash_file(folder / CHUNKS)
        files.append({"path": CHUNKS, "size": one.size, "sha256": one.sha256, "role": role_of(CHUNKS)})
        merkle["leaves"] = CHUNKS
        _fsync(folder / CHUNKS)
    passport: dict[str, Any] = {
        "passport": FORMAT,
        "kind": kind,
        "name": name,
        "version": draft.version,
        "created": _now(),
        "files": files,
        "merkle": merkle,
        "inputs": [
            {key: value for key, value in dataclasses.asdict(one).items() if key != "ancestors"} for one in draft.inputs
        ],
        "licence": {"declared": licence},
        "step": step,
        "data": draft.data,
        "model": draft.model,
        "metrics": draft.metrics,
    }
    passport = plain(passport)
    for key in ("inputs", "licence", "step", "data", "model", "metrics"):
        passport[key] = places.told(passport[key])
    passport["id"] = passport_id(passport)
    temporary = folder / (_PASSPORT + ".tmp")
    temporary.write_bytes(canonical_json(passport) + b"\n")
    _fsync(temporary)
    os.rename(temporary, folder / _PASSPORT)
    for root in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        _fsync(root)
    old = None
    if out.is_dir() and any(out.iterdir()):
        old = out.with_name(out.name + ".replaced")
        if old.exists():
            shutil.rmtree(old)
        os.rename(out, old)
    os.rename(folder, out)
    _fsync(out.parent)
    (out / _MARK).unlink(missing_ok=True)
    if not draft.keep_resume:  # only now: until the rename, a crash can be resumed
        shutil.rmtree(out / "resume", ignore_errors=True)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # a file system that has no fsync for folders
            raise
    finally:
        os.close(handle)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # fine enough to tell two sealings apart
