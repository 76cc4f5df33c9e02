"""How paths are told to others: what is sealed may be published, and must not say whose home folder it was made in.

A path in the current folder is written from there on, one in the home folder with ``~``, and one in somebody else's home folder
(a container, ``sudo``) by its name: what lay there is named by its hash among a passport's inputs. Other paths stay as they
were typed, so that what is told still finds the file here and repeats the run.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_ANYBODY = re.compile(r"(/home/[^/]+|/Users/[^/]+|/root|[A-Za-z]:\\Users\\[^\\]+)(?=[/\\]|$)")


def told(value: Any) -> Any:
    """A plain value (text, list, dict; keys too) with every path in it as others may read it; see the module's text."""
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {told(key): told(item) for key, item in value.items()}
    return [told(item) for item in value] if isinstance(value, list | tuple) else value


def command(words: Sequence[str]) -> str:
    """A command line for a shell, its paths told: what begins with ``~`` is left for the shell to read."""
    parts = []
    for word in words:
        flag, equals, value = word.partition("=")
        if not (word.startswith("--") and equals):
            flag, value = "", word
        said = told(value)
        if flag and said.startswith("~/"):  # a shell reads ~ at the beginning of a word only
            parts += [flag, _quoted(said)]
        else:
            parts.append(_quoted(f"{flag}={said}" if flag else said))
    return " ".join(parts)


def find(told: str | Path) -> Path:
    """The path that was told, ``~`` read as the home folder of whoever asks."""
    text = os.fspath(told)
    return Path(text).expanduser() if text.startswith(("~/", "~\\")) else Path(text)


def from_folder(path: str | Path, folder: str | Path) -> str:
    """`path` as a file in `folder` may name it: relative, so that both may be moved, but never by way of a home folder's name."""
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    home = _home_of(path)
    return _from_home(path, home) if home and not _within(folder, home) else os.path.relpath(path, folder)


def _quoted(word: str) -> str:
    return "~/" + (shlex.quote(word[2:]) if word[2:] else "") if word.startswith("~/") else shlex.quote(word)


def _text(text: str) -> str:
    if os.path.isabs(text) or ".." in text:
        said = _path(text)
        if said != text:
            return said
    for home in _homes():  # in a URL, or in a sentence
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return text


def _path(text: str) -> str:
    path, here = os.path.abspath(text), os.getcwd()
    home = _home_of(path)
    if home and not _within(here, home):
        return _from_home(path, home)
    if os.path.isabs(text) and path != here and _within(path, here) and here != os.path.dirname(here):
        return os.path.relpath(path, here)
    return _from_home(path, home) if home and os.path.isabs(text) else text


def _from_home(path: str, home: str) -> str:
    if home in _homes():
        return "~" + path[len(home) :].replace("\\", "/")
    return os.path.basename(path)


def _home_of(path: str) -> str | None:
    """The home folder that an absolute path lies in, ours or another's."""
    for home in _homes():
        if _within(path, home):
            return home
    anybody = _ANYBODY.match(path)
    return anybody[0] if anybody else None


def _homes() -> list[str]:
    """Our home folder as it is called and as it lies; empty where it is the root, or unknown."""
    try:
        home = Path.home()
    except RuntimeError:
        return []
    return [path for path in dict.fromkeys((str(home), os.path.realpath(home))) if path != os.path.dirname(path)]


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)
