"""From settings to a running process: the socket, uvicorn, and an end in which nobody's answer is cut off without a word."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from criadero.errors import UserError
from criadero.serve.run import Service
from criadero.serve.settings import Settings


def listen(settings: Settings) -> socket.socket:
    """A socket bound to the address. UserError: it is in use, or not this machine's."""
    host, port = settings.host.strip("[]"), settings.port
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host {settings.host}: not an address of this machine ({error.strerror})") from None
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} is in use: stop what uses it, or choose another with --port (0: any free one)"
            ) from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} may not be used by this user: choose one above 1023 with --port") from None
        raise UserError(f"--host {settings.host}: cannot be listened on ({error.strerror})") from None
    made.set_inheritable(True)
    return made


class Server(uvicorn.Server):
    """uvicorn with a drain: on SIGTERM what has begun is finished, in `Settings.drain_seconds` at most; what is left then, and
    everything on Ctrl-C, ends with an error that says so."""

    def __init__(self, app: FastAPI, on_start: Callable[[], None] | None = None) -> None:
        self.service: Service = app.state.service
        self._on_start = on_start
        settings = self.service.settings
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, timeout_keep_alive=30, ws="none",
                timeout_graceful_shutdown=round(settings.drain_seconds) + 5, h11_max_incomplete_event_size=64 * 1024,
            )
        )  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As ever, and then say so."""
        await super().startup(sockets)
        if self._on_start is not None and not self.should_exit:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then as ever."""
        self.service.admission.draining = True
        if signal.SIGINT in self._captured_signals:
            self.service.pool.cancel_all()
        cut = asyncio.get_running_loop().call_later(self.service.settings.drain_seconds, self.service.pool.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            cut.cancel()
            self._captured_signals = [one for one in self._captured_signals if one == signal.SIGINT]  # SIGTERM: exit 0
