"""Write constraints.txt: the versions that are installed in the environment this runs in. Run where nothing changed, it changes nothing.

Names are spelled as package indexes spell them and lines are sorted by name, whatever the packages' own metadata say. A package
that is not installed here keeps its line when one that is asks for it on another system or Python; what nothing asks for goes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "constraints.txt"
HEAD = """\
# The versions that the tests ran with. `make` installs these; pip alone takes what pyproject.toml allows.
# After a change of dependencies: install, run the tests, then `make constraints`.
"""
OURS = {"pip", "criadero"}


def normal(name: str) -> str:
    """A name as package indexes spell it: scikit_build_core is scikit-build-core."""
    return re.sub(r"[-_.]+", "-", name).lower()


def elsewhere(requirements: Iterable[str]) -> set[str]:
    """Packages that are asked for under a condition of the system or of Python's version, not of an extra alone."""
    found = set()
    for one in requirements:
        asked, _, marker = one.partition(";")
        if marker and "extra" not in marker:
            found.add(normal(re.split(r"[^\w.-]", asked.strip(), maxsplit=1)[0]))
    return found


def written(old: str, installed: Mapping[str, str], asked: set[str]) -> tuple[str, list[str]]:
    """The new text of the file, and what is other than in the old one. `installed`: versions by name."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", old, re.MULTILINE)
    before = {normal(name): version for name, version in lines}
    # torch==2.13.0+cpu is Linux's name for what is 2.13.0 elsewhere
    now = {normal(name): version.partition("+")[0] for name, version in installed.items()}
    kept = {name: version for name, version in before.items() if name not in now and name in asked}
    after = {name: version for name, version in {**kept, **now}.items() if name not in OURS}
    notes = [f"kept   {name}: not installed here, asked for elsewhere" for name in sorted(kept)]
    for name in sorted({**before, **after}):
        was, is_now = before.get(name), after.get(name)
        if was != is_now:
            notes.append(
                f"{'added  ' if was is None else 'dropped' if is_now is None else 'changed'} {name} {is_now or was}"
            )
    return HEAD + "".join(f"{name}=={after[name]}\n" for name in sorted(after)), notes


def main() -> None:
    packages = list(distributions())
    installed = {one.metadata["Name"]: one.version for one in packages}
    asked = elsewhere(text for one in packages for text in one.requires or ())
    text, notes = written(FILE.read_text(encoding="utf-8"), installed, asked)
    FILE.write_text(text, encoding="utf-8")
    print(*notes or ["nothing has changed"], sep="\n", file=sys.stderr)


if __name__ == "__main__":
    main()
