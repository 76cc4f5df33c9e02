"""The programs in the guides to the server, against a server."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Live, serving

GUIDES = Path(__file__).resolve().parents[1] / "docs" / "guides"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving() as made:
        yield made


@pytest.mark.parametrize("name", ["serve.md", "sirve.md"])
def test_its_programs_run(live: Live, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (GUIDES / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("http://127.0.0.1:8000", live.url), name, "exec"), names)
    assert capsys.readouterr().out.strip()
