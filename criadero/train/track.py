"""Tracking: a run's figures go to TensorBoard, MLflow or trackio too, where somebody asks for it; ``metrics.jsonl`` has them always.

Each is an extra. Nothing leaves the machine unless the tool's own variables say so (``MLFLOW_TRACKING_URI``,
``TRACKIO_SPACE_ID``). A run that goes on after a kill goes on in the same curves.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
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

    ``settings`` are shown beside the curves. A run that is gone on with after step s replaces what was shown after it.
    """
    check_tracker(which)
    found = checkpoint.latest(draft / "resume")
    done = int(found[0]["step"]) if found else 0
    settings = {name: value for name, value in settings.items() if value not in (None, "", ())}
    if which == "none":
        yield None
    elif which == "tensorboard":
        yield from _tensorboard(out, done, settings)
    elif which == "mlflow":
        yield from _mlflow(out, done, settings)
    else:
        yield from _trackio(out, done, settings)


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


def _tensorboard(out: Path, done: int, settings: dict[str, Any]) -> Iterator[Track]:
    folder = out.parent / "runs" / out.name
    board = importlib.import_module("tensorboardX")
    # what an earlier run showed after the step that this one begins with is taken back
    writer = board.SummaryWriter(str(folder), purge_step=done + 1 if done else None, filename_suffix=f".{done}")
    say(f"tensorboard: {folder}; look at it with: tensorboard --logdir {folder.parent}")
    rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    writer.add_text("settings", f"| | |\n|---|---|\n{rows}", done)

    def track(line: dict[str, Any]) -> None:
        for name, value in figures(line).items():
            writer.add_scalar(name, value, line["step"])
        if line.get("answers"):
            writer.add_text("answers", _answers(line), line["step"])

    try:
        yield track
    finally:
        writer.close()


def _mlflow(out: Path, done: int, settings: dict[str, Any]) -> Iterator[Track]:
    if not os.environ.get("MLFLOW_TRACKING_URI"):  # plain files beside the artifact: no server, no database
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        where = (out.parent / "mlruns").resolve().as_uri()
    else:
        where = os.environ["MLFLOW_TRACKING_URI"]
    client = importlib.import_module("mlflow.tracking").MlflowClient(where)
    experiment = client.get_experiment_by_name("criadero")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("criadero")
    tag = str(out.resolve())
    earlier = client.search_runs([experiment_id], f"tags.`criadero.out` = '{tag}'", max_results=1) if done else []
    if earlier:
        run = earlier[0].info.run_id
        client.update_run(run, "RUNNING")
    else:
        run = client.create_run(experiment_id, run_name=out.name, tags={"criadero.out": tag}).info.run_id
        for name, value in settings.items():
            client.log_param(run, name, str(value)[:500])
    say(f"mlflow: run {run} in {where}")

    def track(line: dict[str, Any]) -> None:
        for name, value in figures(line).items():
            client.log_metric(run, name, value, step=line["step"])
        if line.get("answers"):
            client.log_text(run, _answers(line), f"answers/step-{line['step']:08d}.txt")

    status = "KILLED"
    try:
        yield track
        status = "FINISHED"
    finally:
        client.set_terminated(run, status)


def _trackio(out: Path, done: int, settings: dict[str, Any]) -> Iterator[Track]:
    trackio = importlib.import_module("trackio")
    trackio.init(
        project="criadero", name=out.name, config={name: str(value) for name, value in settings.items()},
        resume="allow" if done else "never", embed=False, auto_log_gpu=False, auto_log_cpu=False,
    )  # fmt: skip

    def track(line: dict[str, Any]) -> None:
        trackio.log(figures(line), step=line["step"])

    try:
        yield track
    finally:
        trackio.finish()
