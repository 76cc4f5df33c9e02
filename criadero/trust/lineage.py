"""The family tree as a picture: what an artifact was made of, oldest on the left, drawn as SVG with nothing but text.

Layers by the longest way to the artifact, long edges routed through empty places, neighbours ordered to cross little (Sugiyama,
Tagawa and Toda 1981, with the barycentre rule).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, open_artifact, short_id
from criadero.errors import UserError

WIDTH, HEIGHT, GAP, ROW = 252, 84, 76, 18  # of a card, between columns, between rows, in pixels
MOST = 24  # plain inputs of one artifact that are drawn one by one; the others share a card that counts them
LETTERS = 28  # of a name on one line of a card
_COLOURS = {
    "finetune_of": "#9a3412", "merged_from": "#9a3412", "quantised_from": "#9a3412", "converted_from": "#57534e",
    "distilled_from": "#86198f", "trained_on_outputs_of": "#86198f", "trained_on": "#1d4ed8", "contains": "#0f766e",
    "tokenizer_of": "#a16207", "evaluated_on": "#15803d", "code_of": "#57534e", "filtered_by": "#57534e",
    "decontaminated_against": "#57534e",
}  # fmt: skip


@dataclass
class Card:
    """One node: an artifact, an input without passport, or (with `count`) several of those."""

    name: str
    about: str
    licence: str
    vouched: bool
    id: str
    relations: list[str] = field(default_factory=list)
    x: float = 0
    y: float = 0


def family(
    passport: Mapping[str, Any], ancestors: Iterable[Mapping[str, Any]]
) -> tuple[dict[str, Card], list[tuple[str, str, str]]]:
    """The cards by id, and the edges (id of the input, id of what was made of it, relation)."""
    known = {one["id"]: one for one in ancestors} | {passport["id"]: passport}
    cards: dict[str, Card] = {}
    edges: list[tuple[str, str, str]] = []
    todo = [passport["id"]]
    cards[passport["id"]] = _sealed(passport)
    while todo:
        here = todo.pop(0)
        groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in known[here].get("inputs") or []:
            relation = str(row.get("relation"))
            if row["id"] in known:
                if row["id"] not in cards:
                    cards[row["id"]] = _sealed(known[row["id"]])
                    todo.append(row["id"])
                edges.append((row["id"], here, relation))
            else:
                groups[relation].append(row)
        for relation, rows in groups.items():
            whole = rows if len(rows) <= MOST else rows[: MOST - 1]
            for row in whole:
                licence = str(row.get("licence") or "licence not stated")
                if row["id"] not in cards:
                    cards[row["id"]] = Card(
                        str(row.get("name")), f"no passport · {short_id(row['id'])}", licence, False, row["id"]
                    )
                edges.append((row["id"], here, relation))
            if rest := rows[len(whole) :]:
                id = f"more {relation} {here}"
                licences = ", ".join(sorted({str(row.get("licence") or "not stated") for row in rest}))
                cards[id] = Card(f"and {len(rest):,} more", "no passports", licences, False, id)
                edges.append((id, here, relation))
    edges = list(dict.fromkeys(edge for edge in edges if edge[0] != edge[1]))
    for input, _, relation in edges:
        if relation not in cards[input].relations:
            cards[input].relations.append(relation)
    return cards, edges


def _sealed(one: Mapping[str, Any]) -> Card:
    model, data = one.get("model") or {}, one.get("data") or {}
    params = model["params"] if isinstance(model.get("params"), int) else 0
    size = f" · {params / 1e9:,.1f} B" if params >= 1e9 else f" · {params / 1e6:,.1f} M" if params else ""
    if not size and isinstance(data.get("document_rows"), int):
        size = f" · {data['document_rows']:,} documents"
    licence = str((one.get("licence") or {}).get("declared") or "licence not declared")
    return Card(str(one.get("name")), f"{one.get('kind')} · {short_id(one['id'])}{size}", licence, True, one["id"])


# -- placing ----------------------------------------------------------------------------------------------------------


def _depths(root: str, ids: Iterable[str], edges: list[tuple[str, str, str]]) -> dict[str, int]:
    """The longest way from each node to the root. What lies on a loop (of a passport that lies) is put behind the rest."""
    pairs = {(made, input) for input, made, _ in edges}
    waiting = Counter(input for _, input in pairs)
    below: dict[str, list[str]] = defaultdict(list)
    for made, input in pairs:
        below[made].append(input)
    depth, todo = {root: 0}, [root]
    while todo:
        here = todo.pop()
        for input in below[here]:
            depth[input] = max(depth.get(input, 0), depth[here] + 1)
            waiting[input] -= 1
            if not waiting[input]:
                todo.append(input)
    last = max(depth.values()) + 1
    return {id: depth[id] if id == root or not waiting[id] else last for id in ids}


def _place(
    root: str, cards: dict[str, Card], edges: list[tuple[str, str, str]]
) -> tuple[float, float, dict[Any, list[Any]]]:
    """Set each card's x and y; returns the width, the height, and for each edge the points that it passes through."""
    depth = _depths(root, cards, edges)
    deepest = max(depth.values())
    columns: dict[int, list[Any]] = defaultdict(list)
    for id in cards:
        columns[depth[id]].append(id)
    near: dict[Any, set[Any]] = defaultdict(set)
    ways: dict[Any, list[Any]] = {}
    for edge in edges:
        input, made, _ = edge
        chain: list[Any] = [input]
        for level in range(depth[input] - 1, depth[made], -1):
            stop = ("via", edge, level)
            columns[level].append(stop)
            chain.append(stop)
        chain.append(made)
        ways[edge] = chain
        for a, b in itertools.pairwise(chain):
            near[a].add(b)
            near[b].add(a)
    where: dict[Any, float] = {}

    def heights(column: list[Any]) -> list[float]:
        at, found = 0.0, []
        for node in column:
            size = HEIGHT if node in cards else 10
            found.append(at + size / 2)
            at += size + ROW
        return found

    def settle(level: int) -> None:
        middles = heights(columns[level])
        total = middles[-1] + middles[0] if middles else 0
        where.update((node, y - total / 2) for node, y in zip(columns[level], middles, strict=True))

    for level in range(deepest + 1):
        settle(level)
    for sweep in range(12):
        order = range(deepest + 1) if sweep % 2 == 0 else range(deepest, -1, -1)
        for level in order:
            ranks = {n: sum(where[o] for o in near[n]) / len(near[n]) if near[n] else where[n] for n in columns[level]}
            columns[level].sort(key=lambda node: ranks[node])
            settle(level)
    top = min(min(where[n] for n in column) for column in columns.values() if column)
    bottom = max(max(where[n] for n in column) for column in columns.values() if column)
    points: dict[Any, tuple[float, float]] = {}
    for level, column in columns.items():
        x = (deepest - level) * (WIDTH + GAP)
        for node in column:
            points[node] = (x, where[node] - top + HEIGHT / 2)
            if node in cards:
                cards[node].x, cards[node].y = points[node][0], points[node][1] - HEIGHT / 2
    routes = {edge: [points[node] for node in chain] for edge, chain in ways.items()}
    return (deepest + 1) * (WIDTH + GAP) - GAP, bottom - top + HEIGHT, routes


# -- drawing ----------------------------------------------------------------------------------------------------------


def svg(passport: Mapping[str, Any], ancestors: Iterable[Mapping[str, Any]]) -> str:
    """The picture, on a light ground, for any browser or viewer; every card has its full text as a tooltip."""
    cards, edges = family(passport, ancestors)
    width, height, routes = _place(passport["id"], cards, edges)
    margin, legend = 24, 62
    total, tall = max(width, 560) + 2 * margin, height + 2 * margin + legend
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total:.0f}" height="{tall:.0f}" viewBox="0 0 {total:.0f} {tall:.0f}" '
        'font-family="system-ui, -apple-system, Segoe UI, Roboto, DejaVu Sans, sans-serif" role="img">',
        f"<title>{escape(_clean('What ' + str(passport.get('name')) + ' was made of'))}</title>",
        f'<rect width="{total:.0f}" height="{tall:.0f}" fill="#fdfcfa"/>',
        f'<g transform="translate({margin},{margin})">',
    ]
    for (input, _, relation), points in routes.items():
        dash = "" if cards[input].vouched else ' stroke-dasharray="5 4"'
        parts.append(
            f'<path d="{_curve(points)}" fill="none" stroke="{_colour(relation)}" stroke-width="1.8" opacity="0.75"{dash}/>'
        )
    parts += [_card(card, card.id == passport["id"]) for card in cards.values()]
    parts += ["</g>", _legend(edges, margin, height + 2 * margin + 8), "</svg>"]
    return "\n".join(parts) + "\n"


def _colour(relation: str) -> str:
    return _COLOURS.get(relation, "#57534e")


def _curve(points: list[tuple[float, float]]) -> str:
    """From the right side of the first card, through the free places, to the left side of the last."""
    x, y = points[0][0] + WIDTH, points[0][1]
    path = [f"M{x:.1f},{y:.1f}"]
    for n, (left, middle) in enumerate(points[1:], 1):
        bend = (left - x) / 2
        path.append(f"C{x + bend:.1f},{y:.1f} {left - bend:.1f},{middle:.1f} {left:.1f},{middle:.1f}")
        x, y = left, middle
        if n < len(points) - 1:
            x += WIDTH
            path.append(f"L{x:.1f},{y:.1f}")
    return " ".join(path)


def _clean(text: str) -> str:
    """Text that XML can hold: control characters and lone halves of characters become a mark."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _short(text: str, most: int) -> str:
    """The text, or its beginning and end with an ellipsis between: names often differ at their end."""
    text = _clean(text)
    return text if len(text) <= most else text[: most - most // 3 - 1] + "…" + text[-(most // 3) :]


def _two_lines(name: str) -> list[str]:
    """A name on one line, or broken near a space, dash or slash onto two."""
    name = _short(name, 2 * LETTERS - 4)
    if len(name) <= LETTERS:
        return [name]
    cuts = [n + 1 for n in range(len(name) - LETTERS, LETTERS) if name[n] in " -_/."]
    cut = cuts[-1] if cuts else LETTERS
    return [name[:cut].rstrip(), name[cut : cut + LETTERS].lstrip()]


def _card(card: Card, first: bool) -> str:
    colour = _colour(card.relations[0]) if card.relations else "#1c1917"
    fill, line = ("#fff7ed", "#c2410c") if first else ("#ffffff", colour if card.vouched else "#a8a29e")
    dash = "" if card.vouched else ' stroke-dasharray="5 4"'
    label = "this artifact" if first else _short(", ".join(one.replace("_", " ") for one in card.relations), 36)
    names = _two_lines(card.name)
    full = escape(_clean(f"{card.name} · {card.about} · {card.licence} · {card.id}"))
    rows = [(11, "normal", colour if not first else "#c2410c", label)]
    rows += [(13 if len(names) == 1 else 12, "600", "#1c1917", name) for name in names]
    rows += [(11, "normal", "#57534e", _short(card.about, 36)), (11, "normal", "#57534e", _short(card.licence, 36))]
    step = (HEIGHT - 14) / len(rows)
    texts = [
        f'<text x="12" y="{7 + step * (n + 0.72):.1f}" font-size="{size}" font-weight="{weight}" fill="{ink}">{escape(text)}</text>'
        for n, (size, weight, ink, text) in enumerate(rows)
    ]
    box = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="{fill}" stroke="{line}" stroke-width="1.4"{dash}/>'
    return f'<g transform="translate({card.x:.1f},{card.y:.1f})"><title>{full}</title>{box}{"".join(texts)}</g>'


def _legend(edges: list[tuple[str, str, str]], x: float, y: float) -> str:
    relations = list(dict.fromkeys(relation for _, _, relation in edges))
    parts, at = [], x
    for relation in relations[:8]:
        text = relation.replace("_", " ")
        parts.append(f'<rect x="{at:.0f}" y="{y + 4:.0f}" width="16" height="3" fill="{_colour(relation)}"/>')
        parts.append(f'<text x="{at + 22:.0f}" y="{y + 10:.0f}" font-size="11" fill="#44403c">{escape(text)}</text>')
        at += 40 + 6.4 * len(text)
        if at > x + 480:
            at, y = x, y + 17
    note = "dashed: no passport vouches for it; made from left to right" if edges else "made of nothing that it names"
    parts.append(f'<text x="{x:.0f}" y="{y + (30 if at > x else 10):.0f}" font-size="11" fill="#78716c">{note}</text>')
    return "".join(parts)


def write_picture(ref: str | Path | Artifact, out: Path) -> Path:
    """Draw an artifact's family tree into a ``.svg`` or ``.html`` file."""
    artifact = open_artifact(ref)
    if out.suffix.lower() not in (".svg", ".html"):
        raise UserError(f"--svg {out}: give a name that ends in .svg or .html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--svg {out}: there is no folder {out.parent}")
    text = svg(artifact.passport, artifact.ancestors())
    if out.suffix.lower() == ".html":
        title = escape(_clean(f"Lineage of {artifact.name}"))
        style = "body{margin:0;background:#fdfcfa}div{overflow:auto}"
        head = f'<meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        text = f'<!doctype html>\n<html lang="en">{head}\n<div>{text}</div></html>\n'
    out.write_text(text, encoding="utf-8")
    return out
