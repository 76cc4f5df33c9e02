"""Several runs of one request: a list of prompts. They are computed together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from criadero.serve.run import Run
from criadero.serve.worker import Event


class Runs:
    """The runs of one request, in the order of its prompts."""

    def __init__(self) -> None:
        self.all: list[Run] = []

    def add(self, run: Run) -> None:
        """One more."""
        self.all.append(run)

    @property
    def headers(self) -> dict[str, str]:
        """Of the last, which has the latest counts; and whether a guard has stopped any."""
        found = [run.headers for run in self.all]
        guard = (
            {"X-Criadero-Guard": "stopped"} if any(one.get("X-Criadero-Guard") == "stopped" for one in found) else {}
        )
        return found[-1] | guard

    def gone(self) -> None:
        """The client went away."""
        for run in self.all:
            run.gone()

    def close(self) -> None:
        """Give everything back."""
        for run in self.all:
            run.close()

    async def wait(self) -> None:
        """Until all have ended. ApiError: one has failed, or was cancelled."""
        for run in self.all:
            await run.wait()
            run.check()

    async def events(self) -> AsyncIterator[tuple[int, Event | None]]:
        """Events of all as they come, each with its run's number; (0, None) after a silence."""
        seconds = self.all[0].service.settings.ping_seconds
        if len(self.all) == 1:
            async for event in self.all[0].events(seconds):
                yield 0, event
            return
        queue: asyncio.Queue[tuple[int, Event | None] | None] = asyncio.Queue()

        async def pump(at: int, run: Run) -> None:
            try:
                async for event in run.events():
                    await queue.put((at, event))
            finally:
                await queue.put(None)

        tasks = [asyncio.create_task(pump(at, run)) for at, run in enumerate(self.all)]
        left = len(tasks)
        try:
            while left:
                try:
                    async with asyncio.timeout(seconds):
                        item = await queue.get()
                except TimeoutError:
                    yield 0, None
                    continue
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def finish(self) -> dict[str, Any]:
        """The block of the first; with ``each`` for those of all when there are several."""
        blocks = [await run.finish() for run in self.all]
        return blocks[0] if len(blocks) == 1 else {**blocks[0], "each": blocks}
