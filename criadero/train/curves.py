"""``curves.svg``: the losses of a run as a picture, drawn from ``metrics.jsonl`` with nothing but text."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 56, 36, 28, 150
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d", "#bab0ac")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a ``metrics.jsonl``."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def draw(lines: list[dict], *, title: str) -> str:
    """An SVG of training loss (smoothed) and held-out losses in nats per token against tokens."""
    series: dict[str, list[tuple[float, float]]] = {"training": []}
    average, weight = 0.0, 0.0
    smooth = max(1, len(lines) // 50)
    for line in lines:
        average, weight = average * (1 - 1 / smooth) + line["loss"], weight * (1 - 1 / smooth) + 1
        series["training"].append((line["tokens"], average / weight))
        for name, value in (line.get("held_out") or {}).items():
            loss = value["loss"] if isinstance(value, dict) else value
            series.setdefault(f"held out: {name}", []).append((line["tokens"], loss))
    points = [p for values in series.values() for p in values]
    if not points:
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"/>\n'
    x_max = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    low, high = math.floor(low * 4) / 4, math.ceil(high * 4) / 4
    high = high if high > low else low + 1

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_max
        return f"{across:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="#444">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/><text x="{LEFT}" y="16" font-size="13">{escape(title)}</text>',
    ]
    for i in range(5):
        y = low + (high - low) * i / 4
        here, there = place(0, y), place(x_max, y)
        parts.append(f'<polyline points="{here} {there}" stroke="#ddd" fill="none"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(here.split(",")[1]) + 4:.1f}" text-anchor="end">{y:.2f}</text>')
        x = x_max * i / 4
        mark = f"{x / 1e6:.1f}M" if x_max >= 1e6 else f"{x / 1e3:.0f}k" if x_max >= 1e4 else f"{x:.0f}"
        parts.append(f'<text x="{place(x, low).split(",")[0]}" y="{HEIGHT - 18}" text-anchor="middle">{mark}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">tokens</text>')
    for i, (name, values) in enumerate(series.items()):
        colour = COLOURS[i % len(COLOURS)]
        thin = values[:: max(1, len(values) // 400)] + values[-1:]
        path = " ".join(place(x, y) for x, y in thin)
        parts.append(f'<polyline points="{path}" stroke="{colour}" stroke-width="1.6" fill="none"/>')
        y = TOP + 14 * i + 8
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{y}" fill="{colour}">{escape(name)} {values[-1][1]:.3f}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_curves(folder: Path, *, title: str) -> None:
    """Draw ``folder/metrics.jsonl`` into ``folder/curves.svg``."""
    lines = read_metrics(folder / "metrics.jsonl")
    (folder / "curves.svg").write_text(draw(lines, title=title), encoding="utf-8")
