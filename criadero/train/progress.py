"""Progress of long work: a live bar on a terminal, plain lines where output is piped."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress


def say(text: str) -> None:
    """A line for the person at the keyboard; results go to standard output, this to standard error."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """Shows loss, tokens/s and time left of the steps of a run. Plain output gets a line every ``every`` seconds."""

    def __init__(self, label: str, steps: int, start: int, *, every: float = 10.0) -> None:
        self.console = Console(stderr=True)
        self.label, self.steps, self.every = label, steps, every
        self.began, self.spoke, self.first = time.monotonic(), time.monotonic(), start
        self.loss: float | None = None
        self.speed: float | None = None
        self.bar: RichProgress | None = None
        if self.console.is_terminal:
            self.bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
                TextColumn("{task.fields[about]}"), TimeRemainingColumn(compact=True), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(label, total=steps, completed=start, about="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()

    def note(self, text: str) -> None:
        """A line of its own beside the progress."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, line: dict[str, Any]) -> None:
        """Take a line of metrics: ``step``, ``loss``, ``tokens_per_second``."""
        self.loss = line["loss"] if self.loss is None else 0.9 * self.loss + 0.1 * line["loss"]
        speed = line["tokens_per_second"]
        self.speed = speed if self.speed is None else 0.9 * self.speed + 0.1 * speed
        about = f"loss {self.loss:.3f}  {self.speed:,.0f} tokens/s"
        if self.bar:
            self.bar.update(self.task, completed=line["step"], about=about)
            return
        now = time.monotonic()
        if now - self.spoke < self.every and line["step"] != self.steps:
            return
        self.spoke = now
        left = (now - self.began) / (line["step"] - self.first) * (self.steps - line["step"])
        minutes, seconds = divmod(round(left), 60)
        print(
            f"{self.label}: step {line['step']}/{self.steps}  {about}  {minutes}:{seconds:02d} left",
            file=sys.stderr,
            flush=True,
        )
