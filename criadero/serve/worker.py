"""One engine in a thread of its own. Requests come from any thread; what it computes goes to each request's `Channel`.

The engine's queue is the queue: a request is checked and put in line at once (so a bad one is refused before anything is sent), and
this thread says where in line it stands until it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from criadero.engine.llm import LLM
from criadero.engine.request import Output, Request

log = logging.getLogger("criadero.serve")
FAILURES = 20  # steps that fail one after another before the thread waits a second between two


@dataclass(frozen=True, slots=True)
class Waiting:
    """Where in line a request stands: 1 is the next to start. ``expected`` seconds are a guess from the latest answers."""

    position: int
    expected: float


@dataclass(frozen=True, slots=True)
class Started:
    """The request has left the line."""

    at: float  # time.monotonic()


Event = Output | Waiting | Started


class Channel:
    """Events of one request, from the worker's thread to an event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._items: deque[Event] = deque()
        self._ready = asyncio.Event()

    def put(self, items: Iterable[Event]) -> None:
        """In the loop's thread only."""
        self._items.extend(items)
        self._ready.set()

    async def get(self, timeout: float) -> Event | None:
        """The next event; None when none came in ``timeout`` seconds."""
        while not self._items:
            self._ready.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._ready.wait()
            except TimeoutError:
                return None
        return self._items.popleft()


@dataclass(slots=True)
class _Place:
    channel: Channel
    added: float
    started: float | None = None
    position: int = 0


class Worker:
    """Steps ``llm``'s engine until it is stopped. Nobody else may step it."""

    def __init__(self, llm: LLM, name: str = "engine") -> None:
        self.llm = llm
        self.service_seconds = 0.0  # of an answer, from start to end: a moving average
        self._places: dict[int, _Place] = {}
        self._early: dict[int, list[Event]] = {}  # events of requests that `submit` has not entered yet
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name=f"criadero-{name}"[:15], daemon=True)
        self._thread.start()

    # --- from any thread ---

    def submit(self, request: Request, channel: Channel) -> int:
        """Check ``request`` and put it in line; its id. UserError says what is wrong with it. May compile a grammar: not in a loop."""
        id = self.llm.engine.add(request)
        place = _Place(channel, time.monotonic())
        with self._lock:
            self._places[id] = place
            early = self._early.pop(id, [])
            if early:
                self._send({id: early})
        self._wake.set()
        return id

    def cancel(self, id: int) -> None:
        """End a request; its last outputs come as ever. Its slot is free at once, or after the step that is being computed."""
        self.llm.engine.cancel(id)
        self._wake.set()

    def cancel_all(self) -> None:
        """End all that are under way."""
        with self._lock:
            ids = list(self._places)
        for id in ids:
            self.cancel(id)

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return len(self._places)

    @property
    def waiting(self) -> int:
        """Requests that have not started."""
        with self._lock:
            return sum(1 for place in self._places.values() if place.started is None)

    def expected_wait(self, position: int) -> float:
        """Seconds until the request at ``position`` of the line starts, judged by the latest answers."""
        return position * (self.service_seconds or 1.0) / self.llm.engine.scheduler.sequences

    def stop(self, seconds: float = 10.0) -> None:
        """Cancel what is under way, and end the thread."""
        self.cancel_all()
        self._stopping = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(seconds)

    # --- the thread ---

    def _loop(self) -> None:
        engine = self.llm.engine
        failures = 0
        while True:
            if not engine.busy:
                if self._stopping:
                    return
                self._wake.wait()
                self._wake.clear()
                continue
            began = time.monotonic()
            try:
                outputs = engine.step()
                failures = 0
            except Exception:  # the engine has ended those in the step with an error; others go on
                log.exception("a step failed")
                outputs, failures = [], failures + 1
                if failures >= FAILURES:
                    time.sleep(1.0)
            self._hand_out(outputs, began)

    def _hand_out(self, outputs: list[Output], began: float) -> None:
        events: dict[int, list[Event]] = {}
        scheduler = self.llm.engine.scheduler
        waiting: dict[int, int] = {}  # id -> position
        for sequence in list(scheduler.waiting):
            if sequence.cached < 0:  # not one that was preempted
                waiting.setdefault(sequence.id, len(waiting) + 1)
        started = {sequence.id for sequence in list(scheduler.running)} | {output.id for output in outputs}
        now = time.monotonic()
        with self._lock:
            for id, place in self._places.items():
                if place.started is None:
                    position = waiting.get(id, 0)
                    if id in started:
                        place.started = max(began, place.added)
                        events.setdefault(id, []).append(Started(place.started))
                    elif position and position != place.position:
                        place.position = position
                        events.setdefault(id, []).append(Waiting(position, self.expected_wait(position)))
            for output in outputs:
                events.setdefault(output.id, []).append(output)
                one = self._places.get(output.id)
                if output.done and one is not None and one.started is not None and output.finish_reason != "cancelled":
                    self.service_seconds += 0.2 * (now - one.started - self.service_seconds)
            self._send(events)

    def _send(self, events: dict[int, list[Event]]) -> None:
        """With the lock held: one call into each loop for all that a step gave."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Channel, list[Event]]]] = {}
        for id, items in events.items():
            place = self._places.get(id)
            if place is None:
                self._early.setdefault(id, []).extend(items)
                continue
            by_loop.setdefault(place.channel.loop, []).append((place.channel, items))
            if any(isinstance(item, Output) and item.done for item in items):
                del self._places[id]
        for loop, deliveries in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[tuple[Channel, list[Event]]]) -> None:
    for channel, items in deliveries:
        channel.put(items)
