"""Write constraints.txt: the versions that are installed in the environment this runs in."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "constraints.txt"
HEAD = """\
# The versions that the tests ran with. `make` installs these; pip alone takes what pyproject.toml allows.
# After a change of dependencies: install, run the tests, then `make constraints`.
"""


def main() -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "list",
        "--format=freeze",
        "--exclude-editable",
        "--disable-pip-version-check",
    ]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    # torch==2.13.0+cpu is Linux's name for what is 2.13.0 elsewhere
    lines = {re.sub(r"\+\w+$", "", line) for line in listed if re.fullmatch(r"[\w.-]+==[\w.!+-]+", line)}
    kept = sorted((line for line in lines if not line.startswith("pip==")), key=str.casefold)
    FILE.write_text(HEAD + "\n".join(kept) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
