"""The family tree as a picture."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from criadero import cli
from criadero.errors import UserError
from criadero.passport import passport_id
from criadero.trust.lineage import HEIGHT, WIDTH, family, svg, write_picture

SVG = "{http://www.w3.org/2000/svg}"


def one(name: str, *inputs: tuple[str, Any], kind: str = "base") -> dict[str, Any]:
    rows = [{"relation": r, "id": q["id"], "name": q["name"], "verified": "passport" in q} for r, q in inputs]
    made: dict[str, Any] = {
        "passport": "criadero/1",
        "kind": kind,
        "name": name,
        "files": [],
        "metrics": [],
        "inputs": rows,
    }
    return made | {"id": passport_id(made)}


def file(n: int) -> dict[str, str]:
    return {"id": f"sha256:{n:064x}", "name": f"a rather long name of a file that is number {n} of many.jsonl"}


def boxes(picture: str) -> dict[str, tuple[float, float]]:
    """Each card's tooltip and its corner."""
    found = {}
    for group in ET.fromstring(picture).iter(f"{SVG}g"):
        title, where = group.find(f"{SVG}title"), group.get("transform", "")
        if title is not None:
            x, y = where.removeprefix("translate(").removesuffix(")").split(",")
            found[str(title.text)] = (float(x), float(y))
    return found


def test_twenty_nodes_do_not_touch_and_time_runs_to_the_right() -> None:
    data = [
        one(f"data-{n} <&> \x07", *(("contains", file(10 * n + k)) for k in range(4)), kind="dataset") for n in range(3)
    ]
    tokens = one("tokens", *(("converted_from", each) for each in data), kind="tokens")
    base = one("base", ("trained_on", tokens))
    chat = one("chat", ("finetune_of", base), ("trained_on", file(99)), ("evaluated_on", data[0]), kind="chat")
    picture = svg(chat, [base, tokens, *data])
    found = boxes(picture)
    assert len(found) == 19
    corners = list(found.values())
    for n, (x, y) in enumerate(corners):
        for other_x, other_y in corners[n + 1 :]:
            assert abs(x - other_x) >= WIDTH or abs(y - other_y) >= HEIGHT
    place = {text.partition(" · ")[0]: x for text, (x, _) in found.items()}
    assert place["data-0 <&> \N{REPLACEMENT CHARACTER}"] < place["tokens"] < place["base"] < place["chat"]
    assert max(place.values()) == place["chat"]
    _, edges = family(chat, [base, tokens, *data])
    assert len(ET.fromstring(picture).findall(f".//{SVG}path")) == len(edges) == 12 + 3 + 1 + 3
    assert picture.count("stroke-dasharray") == 2 * 13  # the plain files and their edges


def test_many_files_share_a_card_that_counts_them() -> None:
    data = one("data", *(("contains", file(n)) for n in range(1000)))
    cards, _ = family(data, [])
    assert len(cards) == 25
    assert "and 977 more" in {card.name for card in cards.values()}


def test_a_loop_of_passports_that_lie_is_drawn_all_the_same() -> None:
    a, b = one("a"), one("b")
    a["inputs"] = [{"relation": "finetune_of", "id": b["id"], "name": "b"}]
    b["inputs"] = [{"relation": "finetune_of", "id": a["id"], "name": "a"}]
    top = one("top", ("finetune_of", a))
    assert len(boxes(svg(top, [a, b]))) == 3


def test_show_draws_into_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["show", "cria", "--lineage", "--svg", str(tmp_path / "tree.html")])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert out.startswith("cria · base")
    assert err.strip() == str(tmp_path / "tree.html")
    assert "<svg" in (tmp_path / "tree.html").read_text()
    with pytest.raises(UserError, match=r"ends in \.svg or \.html"):
        write_picture("cria", tmp_path / "tree.png")
    with pytest.raises(UserError, match="there is no folder"):
        write_picture("cria", tmp_path / "no" / "tree.svg")
