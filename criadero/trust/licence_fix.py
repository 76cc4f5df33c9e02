"""Write what a report says is missing and can be written: Notice, licence texts, attributions, the words to display.

A sealed folder is never changed: its hashes would not hold, and what was made from it names it by them. A copy is sealed beside it,
with the same inputs and the same account of how it was made, and ``step.resealed`` names the old one: ``passport verify``
accepts both. A signature is not copied: it signs the old passport.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from criadero import places
from criadero.artifact import Artifact, Input, create, open_artifact, verify
from criadero.errors import UserError
from criadero.trust.licence_names import key_of, recognise, table, title_of
from criadero.trust.licence_rules import Finding
from criadero.trust.licences import Report

_BEGIN = "<!-- licences: written by criadero licence check --fix -->"
_MAX_TEXT = 1 << 20
_SEALED = ("lineage.jsonl", "passport.chunks")  # written anew by sealing


def fix(
    ref: str | Path | Artifact, report: Report, out: str | Path, *, texts: Path | None = None
) -> tuple[Artifact, list[str]]:
    """A sealed copy of `ref` at `out` with the missing files; and what was written, one line each.

    The copy bears the name and declares the licence of `report.intent`. Licence texts are looked for by their hash in `texts`,
    in the folders of the inputs (there also by their first words), in this package and in /usr/share/common-licenses.
    UserError: no passport, `out` exists, nothing to write.
    """
    old = open_artifact(ref)
    if problems := verify(old.path):
        raise UserError(
            f"{old.path} does not match its passport ({problems[0]}): make it again before licences are written"
        )
    files = _files(report, old, texts)
    if not files and not report.intent.name and not report.intent.declared:
        raise UserError(f"{old.path}: --fix finds nothing that it could write; what is left is yours to do")
    passport, behind = old.passport, tuple(old.ancestors())
    declared = report.intent.declared or (passport.get("licence") or {}).get("declared")
    step = passport.get("step") or {}
    inputs = [
        Input(
            row["relation"],
            row["id"],
            row["name"],
            row.get("licence"),
            row.get("locator"),
            bool(row.get("verified")),
            behind,
        )
        for row in old.inputs
    ]
    with create(
        out,
        kind=old.kind,
        name=report.intent.name or old.name,
        config=step.get("config") or {},
        inputs=inputs,
        licence=declared,
    ) as draft:
        for row in old.files:
            if row["path"] not in (*_SEALED, *files):
                target = draft.path / row["path"]
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(old.path / row["path"], target)
        for name, text in files.items():
            target = draft.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        _keep_base(old.path, Path(out), draft.path)
        for table_name in ("model", "data"):
            getattr(draft, table_name).update(passport.get(table_name) or {})
        draft.metrics = list(passport.get("metrics") or [])
        draft.version = str(passport.get("version") or "1")
        draft.step = {**step, "resealed": {"from": old.id, "wrote": sorted(files)}}  # how it was made stays told
    return open_artifact(out), sorted(files)


def _keep_base(old: Path, out: Path, folder: Path) -> None:
    """An adapter names its base by a path from its own folder: from the copy's folder it is another one."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if base and not os.path.isabs(base) and (old / base).exists():
        config["base_model_name_or_path"] = places.from_folder(old / base, out)
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def _files(report: Report, old: Artifact, texts: Path | None) -> dict[str, str]:
    """Path -> whole new content of each file that --fix writes."""
    open_duties = [
        one for one in report.findings if one.fixable and not one.done and one.severity in ("duty", "conflict")
    ]
    there = report.graph.texts
    files: dict[str, str] = {}
    notices = sorted({dict(one.values)["text"] for one in open_duties if one.rule == "notice"})
    if notices:
        name = next((name for name in there if name.lower() in ("notice", "notice.txt", "notice.md")), "Notice")
        files[name] = _joined(there.get(name, ""), notices)
    for one in open_duties:
        if one.rule in ("agreement", "keep-text") and (text := _licence_text(one.licence, old, texts)) is not None:
            files[f"LICENSES/{one.licence}.txt"] = text
    credits = sorted({_credit(one) for one in open_duties if one.rule == "attribution"})
    if credits:
        head = "# Attribution\n\nThis was made from works of these authors, under the licences named.\n"
        files["ATTRIBUTION.md"] = _joined(there.get("ATTRIBUTION.md", head), credits)
    shown = sorted({dict(one.values)["text"] for one in open_duties if one.rule == "display"})
    if shown:
        readme = next((name for name in there if name.lower() == "readme.md"), "README.md")
        section = "\n".join([_BEGIN, "", *(f"**{words}**" for words in shown)])
        files[readme] = _joined(there.get(readme, f"# {report.name}\n"), [section])
    return files


def _joined(text: str, lines: list[str]) -> str:
    return "\n\n".join(part for part in [text.rstrip(), "\n".join(lines)] if part) + "\n"


def _credit(one: Finding) -> str:
    key = key_of(one.licence)
    named = dict(one.values).get("credit") or ""
    name = one.source.split("/")[0] or one.source
    return f"- {name}{': ' + named if named else ''} ({title_of(key) if key else one.licence})"


def _licence_text(licence: str, old: Artifact, texts: Path | None) -> str | None:
    """The text of a licence, from a file at hand: with one of its hashes, else from an input's folder with its first words."""
    key = key_of(licence)
    wanted = {row["sha256"] for row in table()[key].get("texts", ())} if key else set()
    second = None
    for file, near in _places(old, texts):
        content = file.read_bytes()
        if hashlib.sha256(content).hexdigest() in wanted:
            return content.decode("utf-8", errors="replace")
        if near and second is None and recognise(text := content.decode("utf-8", errors="replace")) == key:
            second = text
    return second


def _places(old: Artifact, texts: Path | None) -> Iterator[tuple[Path, bool]]:
    """Files that may be licence texts, nearest first, and whether they belong to what was used here."""
    folders: list[tuple[Path, str]] = []
    if texts is not None:
        if not texts.is_dir():
            raise UserError(f"--texts {texts}: there is no such folder; name one with licence texts")
        folders.append((texts, "**/*"))
    rows: list[dict[str, Any]] = [row for one in (old.passport, *old.ancestors()) for row in one.get("inputs") or []]
    folders += [(places.find(row["locator"]), "[Ll][Ii][Cc][Ee]*") for row in rows if row.get("locator")]
    folders += [(places.find(row["locator"]) / "LICENSES", "*") for row in rows if row.get("locator")]
    used = len(folders)
    package = Path(__file__).resolve().parents[2]
    folders += [(package, "LICENSE"), (package, "criadero-*.dist-info/licenses/LICENSE")]
    folders += [(Path("/usr/share/common-licenses"), "*")]
    for n, (folder, pattern) in enumerate(folders):
        if folder.is_dir():
            for file in sorted(folder.glob(pattern)):
                if file.is_file() and file.stat().st_size <= _MAX_TEXT:
                    yield file, n < used


def left_to_do(report: Report) -> list[str]:
    """Licences whose text is still missing after --fix: no copy of it was at hand."""
    missing = {one.licence for one in report.findings if one.rule in ("agreement", "keep-text") and not one.done}
    return sorted(missing)
