"""The rules on licences against labelled lineages: recall and precision of conflicts and unknowns, and how long a check takes.

    python benchmarks/trust_licences.py [--json]

The lineages stand in tests/licence_graphs.toml with the findings that a reader of the licences expects, written by hand; the
mutants are made from them (an input more, a file less, another name, another month, another spelling, ...) and their labels follow
from what was changed. Labels and rules have the same authors: the figures say that the rules do what was meant, not that a lawyer agrees.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import licence_cases as cases  # noqa: E402

from criadero.trust.licence_names import rules_id, table  # noqa: E402
from criadero.trust.licences import check, evaluate  # noqa: E402

PUBLISHED_F1 = 0.87  # LiAgent, arXiv 2602.10758, on other data: a mark to stand beside, not a comparison


def ratios(all_cases: list[cases.Case]) -> dict[str, Any]:
    """Recall, precision, F1 over findings, and how many lineages came out exactly as labelled."""
    right, missed, wrong, lines = cases.score(all_cases)
    recall = right / (right + missed) if right + missed else 1.0
    precision = right / (right + wrong) if right + wrong else 1.0
    return {
        "lineages": len(all_cases), "clean": sum(not case.expect for case in all_cases), "labels": right + missed, "missed": missed,
        "wrong": wrong, "recall": recall, "precision": precision, "f1": 2 * recall * precision / (recall + precision or 1),
        "exactly_as_labelled": len(all_cases) - len(lines), "not_as_labelled": lines,
    }  # fmt: skip


def measure() -> dict[str, Any]:
    """All figures. Seconds are medians of single calls."""
    labelled, mutants = cases.cases(), list(cases.mutants())
    made = Counter(
        mutate.__name__.strip("_") for case in labelled for mutate in cases.MUTATIONS if mutate(case) is not None
    )
    faults = Counter(label[1] for case in labelled for label in case.expect)
    seconds = []
    for case in labelled * 3:
        began = time.perf_counter()
        evaluate(case.graph, case.intent)
        seconds.append(time.perf_counter() - began)
    folder = []
    for _ in range(10):
        began = time.perf_counter()
        report = check("cria-chat")
        folder.append(time.perf_counter() - began)
    chain = cases.graph_of(
        [
            *(f"m{n}: chat | | finetune_of m{n + 1}, trained_on d" for n in range(1000)),
            "m1000: base | llama2",
            "d: dataset | CC-BY-4.0",
        ]
    )
    began = time.perf_counter()
    evaluate(chain)
    return {
        "rules": rules_id(), "licences": len(table()), "with_text_hash": sum(bool(row.get("texts")) for row in table().values()),
        "labelled": ratios(labelled), "mutants": ratios(mutants), "mutations": dict(made), "faults": dict(faults),
        "seconds_a_lineage": statistics.median(seconds), "seconds_cria_chat": statistics.median(folder),
        "nodes_cria_chat": len(report.graph.nodes), "seconds_1000_deep": time.perf_counter() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    figures = measure()
    if parser.parse_args().json:
        print(json.dumps(figures, indent=2))
        return
    print(
        f"{figures['licences']} licences, {figures['with_text_hash']} with the hash of their text; rules {figures['rules'][:19]}"
    )
    for name in ("labelled", "mutants"):
        row = figures[name]
        print(
            f"{name:<9} {row['lineages']:>4} lineages ({row['clean']} in order), {row['labels']} conflicts and unknowns: "
            f"recall {row['recall']:.3f}, precision {row['precision']:.3f}, F1 {row['f1']:.3f}; "
            f"{row['exactly_as_labelled']} exactly as labelled"
        )
        for line in row["not_as_labelled"]:
            print(f"  {line}")
    print(f"published elsewhere, on other data: F1 {PUBLISHED_F1}")
    print(
        f"kinds of fault: {len(figures['faults'])}; mutations: "
        + ", ".join(f"{k} {v}" for k, v in figures["mutations"].items())
    )
    print(
        f"a lineage {figures['seconds_a_lineage'] * 1e3:.2f} ms; cria-chat ({figures['nodes_cria_chat']} nodes, read from its folder) "
        f"{figures['seconds_cria_chat'] * 1e3:.0f} ms; 1,000 models deep {figures['seconds_1000_deep']:.2f} s"
    )


if __name__ == "__main__":
    main()
