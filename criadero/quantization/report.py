"""What quantising came to: figures for the passport, lines for the terminal, the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criadero.card import HF_LICENCES


@dataclass(frozen=True)
class Figures:
    """Losses by held-out group (name, n, before, after, bytes), sizes in bytes, and how it was done."""

    groups: list[dict[str, Any]]
    before_bytes: int
    file_bytes: int
    memory_bytes: int  # as computed with: an int8 table counted as int8, however it is stored
    weights: int
    kinds: Mapping[str, int]
    raised: list[str]
    method: str
    seconds: float
    text: str | None
    calibrated: int

    @property
    def bits(self) -> float:
        """Bits a weight, all weights and scales counted, as computed with."""
        return 8 * self.memory_bytes / self.weights

    @property
    def file_bits(self) -> float:
        return 8 * self.file_bytes / self.weights

    def total(self, when: str) -> float:
        """The loss over all groups, nats a token."""
        return sum(row[when] * row["n"] for row in self.groups) / sum(row["n"] for row in self.groups)

    def metrics(self) -> list[dict[str, Any]]:
        """Rows for the passport."""
        rows: list[dict[str, Any]] = []
        for row in self.groups:
            where = {"suite": "held_out", "slice": row["name"], "n": row["n"]}
            rows.append(where | {"metric": "loss", "value": row["after"]})
            rows.append(where | {"metric": "loss_before", "value": row["before"]})
            if row["bytes"]:
                bits = row["after"] * row["n"] / math.log(2) / row["bytes"]
                rows.append(where | {"metric": "bits_per_byte", "value": bits})
        if self.groups:
            n = sum(row["n"] for row in self.groups)
            for when, suffix in (("after", ""), ("before", "_before")):
                where = {"suite": "held_out", "slice": "all", "n": n}
                rows.append(where | {"metric": "loss" + suffix, "value": self.total(when)})
                rows.append(where | {"metric": "perplexity" + suffix, "value": perplexity(self.total(when))})
        sizes = {
            "bits_per_weight": self.bits, "bits_per_weight_stored": self.file_bits, "weight_bytes": self.memory_bytes,
            "weight_bytes_stored": self.file_bytes, "weight_bytes_before": self.before_bytes,
        }  # fmt: skip
        return rows + [{"suite": "size", "metric": name, "value": value} for name, value in sizes.items()]


def lines(figures: Figures) -> list[str]:
    """For the terminal."""
    out = []
    for row in figures.groups:
        out.append(
            f"held out, {row['name']}: loss {row['before']:.4f} -> {row['after']:.4f} ({row['after'] - row['before']:+.4f}), "
            f"{row['n']:,} tokens"
        )
    if figures.groups:
        before, after = figures.total("before"), figures.total("after")
        out.append(
            f"held out, all: loss {before:.4f} -> {after:.4f} ({after - before:+.4f}), "
            f"perplexity {perplexity(before):.5g} -> {perplexity(after):.5g}"
        )
    kinds = ", ".join(
        f"{kind} {n / figures.weights:.0%}" for kind, n in figures.kinds.items() if n / figures.weights >= 0.005
    )
    out.append(
        f"{figures.bits:.2f} bits a weight, scales counted ({kinds}); file {megabytes(figures.before_bytes)} -> "
        f"{megabytes(figures.file_bytes)}; {figures.seconds:.0f} s"
    )
    return out


def perplexity(loss: float) -> float:
    return math.exp(min(700.0, loss))  # a damaged model's must not overflow


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"


def card(
    figures: Figures, *, name: str, base: str, licence: str | None, packed: bool, dtype: str, words: str | None
) -> str:
    """The model card, ``README.md``."""
    known = HF_LICENCES.get((licence or "").lower())
    head = ["---", f"license: {known or 'other'}", *([f"license_name: {licence}"] if licence and not known else [])]
    head += ["library_name: transformers", "pipeline_tag: text-generation", f"base_model: {base}",
             "base_model_relation: quantized", "tags:", "- llama", "- criadero", "- compressed-tensors", "---"]  # fmt: skip
    how = "GPTQ (arXiv 2210.17323)" if figures.method == "gptq" else "rounding to the nearest"
    text = [
        *head, "", f"# {name}", "",
        f"`{base}` made small by {how}: {figures.bits:.2f} bits a weight, scales counted. Raised with "
        "[Criadero](https://pypi.org/project/criadero/).", "", "## Measured", "",
    ]  # fmt: skip
    if figures.groups:
        text += [
            f"On text of `{Path(figures.text or '').name}` that was not calibrated on; loss in nats a token.", "",
            "| text | tokens | loss before | loss after | perplexity before | after |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        n = sum(row["n"] for row in figures.groups)
        total = {"name": "all", "n": n, "before": figures.total("before"), "after": figures.total("after")}
        for row in [*figures.groups, total]:
            text.append(
                f"| {row['name']} | {row['n']:,} | {row['before']:.4f} | {row['after']:.4f} | {perplexity(row['before']):.5g} "
                f"| {perplexity(row['after']):.5g} |"
            )
    else:
        text.append("The loss was not measured: no text was given.")
    text += ["", "| weights as | share |", "|---|---|"]
    text += [f"| {kind} | {n / figures.weights:.1%} |" for kind, n in figures.kinds.items()]
    text += [
        "", f"The file has {megabytes(figures.file_bytes)}, {figures.file_bits:.2f} bits a weight (before: "
        f"{megabytes(figures.before_bytes)}); in memory it takes {megabytes(figures.memory_bytes)}.",
    ]  # fmt: skip
    if figures.raised:
        text += ["", f"Kept at int8, because they lose most: {', '.join(figures.raised)}."]
    if packed:
        opens = "Only Criadero opens it: its embedding table is packed, which transformers and vLLM do not read."
    else:
        opens = (
            "The layout is that of `compressed-tensors`: transformers opens the folder when that package is installed, and vLLM "
            f"reads it too. Compute in {dtype}."
        )
    text += ["", "## Use", "", f"`criadero chat FOLDER`. {opens}"]
    if words:
        text += ["", "## In the makers' words", "", words.strip()]
    text += [
        "", f"Licence of these weights: **{licence or 'not declared'}**. What they were made of, with the hash of every file "
        "and input, is in `passport.json`; `criadero passport verify` checks it.",
    ]  # fmt: skip
    return "\n".join(text) + "\n"
