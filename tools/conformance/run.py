"""Run the suites of others against `criadero serve`: ``python tools/conformance/run.py --suite NAME|all [--json] [--source NAME=FOLDER]``.

Each suite gets an environment of its own under .conformance, with pinned versions from PyPI or npm, and a server with the bundled
cria-chat on a free port of this machine. Of every test it says whether it passed, failed, or does not apply, with the reason, and which
parameters of the API the suite has proved; that goes into tools/conformance/results.json, of which docs/reference/conformance.md and the
column of docs/reference/api.md are written (``make docs``).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suites import SUITES, Suite

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / ".conformance"
RESULTS = HERE / "results.json"
# codes of refusals that say: not this parameter, or not here. A test that fails for one of them does not apply.
MADE_UP = r"(?<=/)(?!v1/)[a-z]*_?(id|\d+|gpt-[\w.-]+|[\w:]*:[\w:-]+)(?=/|$)"
REFUSED = {
    "not_in_background",
    "unsupported_parameter",
    "unsupported_tool",
    "unsupported_content",
    "not_found",
    "method_not_allowed",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--suite", action="append", choices=[*(one.name for one in SUITES), "all"], required=True)
    parser.add_argument("--source", action="append", default=[], metavar="NAME=FOLDER", help="a suite's checkout")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--dry", action="store_true", help="leave results.json alone")
    chosen = parser.parse_args()
    sources = dict(one.partition("=")[::2] for one in chosen.source)
    failed = 0
    for suite in SUITES:
        if suite.name not in chosen.suite and "all" not in chosen.suite:
            continue
        try:
            result = run(suite, sources.get(suite.name))
        except Unavailable as error:
            print(f"{suite.name}: not run: {error}", file=sys.stderr)
            continue
        if not chosen.dry:
            kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            kept[suite.name] = result
            kept = {one.name: kept[one.name] for one in SUITES if one.name in kept}
            RESULTS.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=1, ensure_ascii=False) if chosen.json else said(suite, result))
        failed += len(result["failed"])
    return 1 if failed else 0


class Unavailable(Exception):
    """What a suite needs is not here."""


def said(suite: Suite, result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{suite.name} {result['version']}: {result['passed']} passed, {len(result['failed'])} failed, "
        f"{sum(one['tests'] for one in result['not_applicable'])} not applicable"
    ]
    lines += [f"  failed: {one['test']}: {one['reason']}" for one in result["failed"]]
    lines += [f"  not applicable: {one['tests']}: {one['reason']}" for one in result["not_applicable"]]
    lines += [f"  note: {one}" for one in result["notes"]]
    return "\n".join(lines)


def run(suite: Suite, given: str | None) -> dict[str, Any]:
    """Install, serve, run, and read what came of it."""
    if suite.usual and not given and (ROOT / suite.usual).is_dir():
        given = str(ROOT / suite.usual)
    if suite.needs and not given:
        raise Unavailable(f"name {suite.needs} with --source {suite.name}=FOLDER")
    made = environment(suite)
    source = Path(given).resolve() if given else unpacked(suite) if suite.unpack else Path()
    with tempfile.TemporaryDirectory(prefix="criadero-conformance-") as name:
        work = Path(name)
        words: dict[str, Any] = {"python": made / "bin" / "python", "modules": made, "source": source}
        words |= {"here": HERE, "root": ROOT, "work": work}
        filled = [one.format(**words) for one in suite.server]
        with serving(work / "requests", filled) as url:
            words["url"] = url
            env = {
                **os.environ, "CRIADERO_WATCH": str(work / "tests"), "CRIADERO_URL": url, "PYTHONPATH": str(HERE),
                "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CRIADERO_PYTHON": sys.executable,
                "CRIADERO_WORK": str(work), "CRIADERO_LOG": str(work / "requests"),
                **{name: value.format(**words) for name, value in suite.settings},
            }  # fmt: skip
            command = [one.format(**words) for one in suite.command]
            done = subprocess.run(
                command, cwd=suite.folder.format(**words), env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
            )  # fmt: skip
        log = FOLDER / f"{suite.name}.log"
        log.write_text(done.stdout, encoding="utf-8")
        for part in ("tests", "requests"):
            if (work / part).is_file():
                shutil.copy(work / part, FOLDER / f"{suite.name}.{part}.jsonl")
        if not (work / "tests").is_file():
            raise SystemExit(f"error: {suite.name} ran no test: see {log.relative_to(ROOT)}")
        return judged(suite, read_lines(work / "tests"), read_lines(work / "requests"), version_of(suite))


# -- what a suite needs -----------------------------------------------------------------------------------------------


def environment(suite: Suite) -> Path:
    """Its folder, made if need be."""
    folder = FOLDER / f"{suite.package}-{version_of(suite)}"
    python = folder / "bin" / "python"
    marker = folder / "installed"
    wanted = "\n".join(suite.requirements)
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return folder
    print(f"{suite.name}: installing into {folder.relative_to(ROOT)} ...", file=sys.stderr)
    if suite.kind == "node":
        if shutil.which("npm") is None:
            raise Unavailable("npm is needed: install Node.js")
        command = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)]
        command += suite.requirements
    else:
        if not python.is_file():
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        command = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *suite.requirements]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    marker.write_text(wanted, encoding="utf-8")
    return folder


def unpacked(suite: Suite) -> Path:
    """The folder of a package's source archive, which has its tests."""
    name, _, version = suite.unpack.partition("==")
    folder = FOLDER / "sources" / f"{name.replace('-', '_')}-{version}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps", "--no-binary",
                 name, "-d", work, suite.unpack], check=True,
            )  # fmt: skip
            [archive] = Path(work).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(FOLDER / "sources", filter="data")
    return folder


def version_of(suite: Suite) -> str:
    """Of the package that the suite is about."""
    for one in (*suite.requirements, suite.unpack):
        name, _, version = one.rpartition("@") if suite.kind == "node" else one.partition("==")
        if name.partition("[")[0] == suite.package:
            return version
    return ""


@contextlib.contextmanager
def serving(log: Path, words: list[str]) -> Iterator[str]:
    """The address of a server of its own."""
    log.touch()
    command = [sys.executable, str(HERE / "server.py"), "--log", str(log), *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("error: the server did not start")
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


# -- what came of it --------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def judged(suite: Suite, tests: list[dict[str, Any]], requests: list[dict[str, Any]], version: str) -> dict[str, Any]:
    """Passed, failed, not applicable; and what the requests of those tests prove."""
    outcomes: dict[str, dict[str, Any]] = {}
    for one in tests:  # a test that passed and then failed when it was cleared away has failed
        if one["test"] not in outcomes or one["outcome"] == "failed":
            outcomes[one["test"]] = one
    passed, failed, without = 0, [], Counter[str]()
    proved: dict[str, set[str]] = {}
    gone = {"cancelled", "client_gone"}  # nobody reads what is said to a client that left
    errors = [one for one in requests if one["status"] >= 500 and not gone & {part["code"] for part in one["refusals"]}]
    for name, one in outcomes.items():
        asked = [r for r in requests if one["began"] <= r["began"] <= one["ended"]]
        refusals = [{**refusal, "request": r["request"]} for r in asked for refusal in r["refusals"]]
        # a refusal is proved by whoever gets it; what is honoured by a test that is content with the answer
        for r in asked:
            names = {r_["param"] for r_ in r["refusals"] if r_["code"] == "unsupported_parameter" and r_["param"]}
            if one["outcome"] == "passed" and r["status"] < 300:
                names |= set(r["sent"])
            proved.setdefault(r["request"], set()).update(names)
        if one["outcome"] == "passed":
            passed += 1
            continue
        reason = reason_of(suite, one, refusals)
        if reason is None and one["outcome"] == "failed":
            failed.append({"test": name, "reason": short(one["text"])})
        else:
            without[reason or short(one["text"]) or "left out by the suite itself"] += 1
    return {
        "title": suite.title, "package": suite.package, "version": version, "date": datetime.date.today().isoformat(), "passed": passed,
        "failed": sorted(failed, key=lambda one: str(one["test"])),
        "not_applicable": [{"tests": count, "reason": reason} for reason, count in sorted(without.items())],
        "requests": len(requests), "server_errors": len(errors), "notes": sorted({one["note"] for one in tests if one.get("note")}),
        "proved": {request: sorted(names) for request, names in sorted(proved.items()) if names},
    }  # fmt: skip


def reason_of(suite: Suite, test: dict[str, Any], refusals: list[dict[str, Any]]) -> str | None:
    """Why a test that did not pass does not apply; None when it should have passed."""
    last = refusals[-1] if refusals else {"code": None}
    if suite.own and last["code"] == "unknown_parameter":
        return f"sends {suite.own}'s own parameter {last['param']}"
    for pattern, reason in suite.not_applicable:
        if re.search(pattern, f"{test['test']}\n{test['text']}"):
            return reason
    if test["outcome"] == "failed" and last["code"] in REFUSED:
        if last["code"] in ("not_found", "method_not_allowed"):
            return f"not part of this API: {re.sub(MADE_UP, 'ID', last['request'])}"
        return f"refused by design: {short(last['message'] or '')}"
    return None


def short(text: str) -> str:
    """One line."""
    line = " ".join(text.split())
    return line if len(line) <= 200 else line[:199] + "…"


if __name__ == "__main__":
    sys.exit(main())
