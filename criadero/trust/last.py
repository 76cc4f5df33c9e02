"""The last answer of ``criadero chat``, kept for ``criadero trace --last``."""

from __future__ import annotations

import json
import os
from pathlib import Path

from criadero.errors import UserError


def last_file() -> Path:
    """Where ``criadero chat`` leaves its last answer: under ``$XDG_STATE_HOME``, ``~/.local/state`` by default."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "criadero" / "last-answer.json"


def keep_last(model: str, answer: str) -> None:
    """Leave an answer for ``criadero trace --last``, for this user's eyes only; a home that cannot be written is no matter."""
    file = last_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump({"model": model, "answer": answer}, stream, ensure_ascii=False)
    except (OSError, UnicodeError):
        return


def last_answer() -> tuple[str, str]:
    """(model, answer) of the last answer of ``criadero chat``. UserError when there is none."""
    try:
        kept = json.loads(last_file().read_text(encoding="utf-8"))
        return str(kept["model"]), str(kept["answer"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            "there is no last answer: talk to the model first (criadero chat MODEL), or give the text"
        ) from None
