"""Tracking: a run's figures go to TensorBoard, MLflow or trackio too, where somebody asks for it; ``metrics.jsonl`` has them always.

Each is an extra. Nothing leaves the machine unless the tool's own variables say so (``MLFLOW_TRACKING_URI``,
``TRACKIO_SPACE_ID``). A run that goes on after a kill goes on in the same curves, each step once: what a tool had not yet written is
sent to it again out of ``metrics.jsonl``, and what it had is not written twice.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from criadero.errors import UserError
from criadero.train import checkpoint
from criadero.train.progress import say

Tracker = Literal["none", "tensorboard", "mlflow", "trackio"]
Track = Callable[[dict[str, Any]], None]
_PACKAGE = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "trackio": "trackio"}
HELP = "show the run in tensorboard (runs/ beside the artifact), mlflow (mlruns/ there, or its own variable) or trackio"


def check_tracker(which: str) -> None:
    """UserError when the package that ``which`` needs is not installed. It is looked for, not imported."""
    if which != "none" and importlib.util.find_spec(_PACKAGE[which]) is None:
        raise UserError(
            f"track {which}: the package {_PACKAGE[which]} is not installed: pip install 'criadero[{which}]'; without it, "
            "metrics.jsonl in the artifact has the same figures"
        )


@contextmanager
def tracker(which: str, out: Path, draft: Path, settings: dict[str, Any]) -> Iterator[Track | None]:
    """What takes the lines of ``metrics.jsonl`` of the run that makes ``out`` in ``draft``, or None when nobody asked.

    ``settings`` are shown beside the curves. A run that is gone on with is in the same curves.
    """
    check_tracker(which)
    earlier = _earlier(draft)
    settings = {name: value for name, value in settings.items() if value not in (None, "", ())}
    if which == "none":
        yield None
    elif which == "tensorboard":
        yield from _tensorboard(out, earlier, settings)
    elif which == "mlflow":
        yield from _mlflow(out, earlier, settings)
    else:
        yield from _trackio(out, earlier, settings)


def _earlier(draft: Path) -> list[dict[str, Any]]:
    """The lines of the run that is gone on with, up to its resume point."""
    found, metrics = checkpoint.latest(draft / "resume"), draft / "metrics.jsonl"
    if found is None or not metrics.exists():
        return []
    with open(metrics, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    return [line for line in lines if line["step"] <= found[0]["step"]]


def figures(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by name; a table in it gives names with a slash: ``held_out/all/loss``."""
    out: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, dict):
            out |= {f"{name}/{inner}": number for inner, number in figures(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            out[name] = float(value)
    return out


def _answers(line: dict[str, Any]) -> str:
    return "\n\n".join(f"{n}. {text}" for n, text in enumerate(line.get("answers") or (), 1))


def _tensorboard(out: Path, earlier: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[Track]:
    folder = out.parent / "runs" / out.name
    board = importlib.import_module("tensorboardX")
    # a killed run's last two minutes need not be in its file, so a run that goes on writes everything again
    writer = board.SummaryWriter(str(folder), purge_step=0, filename_suffix=f".{len(earlier)}")
    say(f"tensorboard: {folder}; look at it with: tensorboard --logdir {quote(str(folder.parent))}")
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    writer.add_text("settings", f"| | |\n|---|---|\n{rows}", 0)

    def track(line: dict[str, Any]) -> None:
        for name, value in figures(line).items():
            writer.add_scalar(name, value, line["step"])
        if line.get("answers"):
            writer.add_text("answers", _answers(line), line["step"])

    try:
        for line in earlier:
            track(line)
        yield track
    finally:
        writer.close()


def _once(track: Track, earlier: list[dict[str, Any]], shown: int) -> Track:
    """``track`` without the lines up to the step ``shown``, which are there; those before that a kill lost are sent now."""

    def once(line: dict[str, Any]) -> None:
        if line["step"] > shown:
            track(line)

    for line in earlier:
        once(line)
    return once


def _mlflow(out: Path, earlier: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[Track]:
    where, look = os.environ.get("MLFLOW_TRACKING_URI", ""), ""
    if not where:  # plain files beside the artifact: no server, no database
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        folder = (out.parent / "mlruns").resolve()
        where = folder.as_uri()
        look = f"; look at it with: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {quote(str(folder))}"
    client = importlib.import_module("mlflow.tracking").MlflowClient(where)
    experiment = client.get_experiment_by_name("criadero")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("criadero")
    tag = str(out.resolve())
    before = client.search_runs([experiment_id], f"tags.`criadero.out` = '{tag}'", max_results=1) if earlier else []
    shown = 0
    if before:
        run = before[0].info.run_id
        shown = max((one.step for one in client.get_metric_history(run, "loss")), default=0)
        client.update_run(run, "RUNNING")
    else:
        run = client.create_run(experiment_id, run_name=out.name, tags={"criadero.out": tag}).info.run_id
        for name, value in settings.items():
            client.log_param(run, name, str(value)[:500])
    say(f"mlflow: run {run} in {where}{look}")

    def track(line: dict[str, Any]) -> None:
        if line.get("answers"):
            client.log_text(run, _answers(line), f"answers/step-{line['step']:08d}.txt")
        for name, value in sorted(figures(line).items(), key=lambda pair: pair[0] == "loss"):  # last: the line is whole
            client.log_metric(run, name, value, step=line["step"])

    status = "KILLED"
    try:
        yield _once(track, earlier, shown)
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _trackio(out: Path, earlier: list[dict[str, Any]], settings: dict[str, Any]) -> Iterator[Track]:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project="criadero", name=out.name, config={name: str(value) for name, value in settings.items()},
        resume="allow" if earlier else "never", embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip
    shown = trackio.SQLiteStorage.get_max_step_for_run("criadero", out.name) if earlier else None

    def track(line: dict[str, Any]) -> None:
        answers = {"answers": trackio.Markdown(_answers(line))} if line.get("answers") else {}
        trackio.log(figures(line) | answers, step=line["step"])

    try:
        yield _once(track, earlier, shown or 0)
    finally:
        trackio.finish()
