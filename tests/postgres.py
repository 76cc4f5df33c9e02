"""A real PostgreSQL for tests, started and stopped by them, where the programs are installed."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def programs() -> tuple[str, str] | None:
    """(initdb, postgres), from the path or where Debian puts them."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    found = [shutil.which(name, path=os.pathsep.join(places)) for name in ("initdb", "postgres")]
    return (found[0], found[1]) if found[0] and found[1] else None


@contextlib.contextmanager
def server() -> Iterator[str]:
    """An empty cluster that listens on a socket in a folder of its own; the URL of its database. It never runs as root."""
    made = programs()
    assert made, "initdb and postgres are not installed"
    folder = tempfile.mkdtemp(prefix="criadero-postgres-")
    who: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        other = next((name for name in ("postgres", "nobody") if _user(name)), None)
        assert other, "there is no user to run PostgreSQL as"
        assert os.stat(os.devnull).st_mode & stat.S_IWOTH, (
            "initdb writes to /dev/null, and only root may here: chmod a+rw /dev/null"
        )
        user = pwd.getpwnam(other)
        os.chown(folder, user.pw_uid, user.pw_gid)
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **who}
    data = f"{folder}/data"
    made_it = subprocess.run(
        [made[0], "-D", data, "-A", "trust", "-U", "criadero", "-E", "UTF8", "--no-sync", "--no-instructions"], **quiet
    )
    assert made_it.returncode == 0, made_it.stdout
    running = subprocess.Popen([made[1], "-D", data, "-k", folder, "-h", "", "-F"], **quiet)
    try:
        until = time.monotonic() + 30
        while not Path(folder, ".s.PGSQL.5432").exists():
            assert running.poll() is None, running.communicate()[0]
            assert time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.05)
        yield f"postgresql://criadero@/postgres?host={folder}"
    finally:
        running.send_signal(signal.SIGQUIT)  # at once: the folder goes as well
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.communicate(timeout=20)
        shutil.rmtree(folder, ignore_errors=True)


def _user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False
