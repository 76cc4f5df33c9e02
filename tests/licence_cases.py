"""The labelled lineages of licence_graphs.toml, and mutants of them whose labels follow from the mutation.

Used by tests/test_licences.py and benchmarks/trust_licences.py. The mutations state what they add by reasoning of their own, a line each,
not by calling the rules.
"""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from criadero.trust.licence_graph import Graph, Node
from criadero.trust.licence_rules import Intent
from criadero.trust.licences import Report, evaluate, parse_mau

Label = tuple[str, str, str]  # severity, rule, name of the source

# copied from section 1.b.iii of each licence, not from the table
NOTICES = {
    "llama-2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
    "llama-3": "Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    "llama-3.1": "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    "llama-3.2": "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    "llama-3.3": "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    "llama-4": "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved.",
}
AGREEMENTS = {
    "llama-2": "LLAMA 2 COMMUNITY LICENSE AGREEMENT",
    "llama-3": "META LLAMA 3 COMMUNITY LICENSE AGREEMENT",
    "llama-3.1": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT",
    "llama-3.2": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
    "llama-3.3": "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT",
    "llama-4": "LLAMA 4 COMMUNITY LICENSE AGREEMENT",
    "openrail-m": "BigScience Open RAIL-M License",
}


@dataclass(frozen=True)
class Case:
    name: str
    graph: Graph
    intent: Intent
    expect: frozenset[Label]
    also: frozenset[Label] = frozenset()


def node_of(line: str) -> Node:
    """``"name: kind | licence | relation name, ..."``; ids are names."""
    name, _, rest = line.partition(":")
    kind, licence, inputs = (part.strip() for part in [*rest.split("|"), "", ""][:3])
    pairs = tuple((words.split()[0], " ".join(words.split()[1:])) for words in inputs.split(",") if words.strip())
    return Node(name, name, kind, (licence,) if licence else (), pairs, missing=kind == "missing")


def graph_of(lines: list[str], has: list[str] | tuple[str, ...] = ()) -> Graph:
    nodes = [node_of(line) for line in lines]
    texts: dict[str, str] = {}
    for one in has:
        what, _, rest = one.partition(" ")
        if what == "agreement":
            texts[f"LICENSES/{rest}.txt"] = AGREEMENTS[rest]
        elif what == "notice":
            texts["Notice"] = NOTICES[rest] + "\n"
        elif what == "display":
            texts["README.md"] = f"# It\n\n{rest}\n"
        else:
            file, _, text = one.partition(": ")
            texts[file] = text
    return Graph(nodes[0].id, {node.id: node for node in nodes}, texts)


def intent_of(words: list[str]) -> Intent:
    values = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("mau="))
    effect = next((word for word in words if word in ("careful", "none")), "attribution")
    return Intent(
        commercial="commercial" in words, distribute="distribute" in words, end_user="end_user" in words, data_effect=effect,
        region=values.get("region"), name=values.get("name"),
        mau=parse_mau(word.removeprefix("mau=") for word in words if word.startswith("mau=")),
    )  # fmt: skip


def labels(lines: list[str]) -> frozenset[Label]:
    return frozenset((s, r, " ".join(rest)) for s, r, *rest in (line.split() for line in lines))


def cases() -> list[Case]:
    """The labelled lineages."""
    rows = tomllib.loads((Path(__file__).parent / "licence_graphs.toml").read_text(encoding="utf-8"))["graph"]
    return [
        Case(
            row["name"], graph_of(row["nodes"], row.get("has", ())), intent_of(row.get("asked", [])),
            labels(row.get("expect", [])), labels(row.get("also", [])),
        )
        for row in rows
    ]  # fmt: skip


def found(report: Report) -> frozenset[Label]:
    return frozenset((one.severity, one.rule, one.source) for one in report.findings)


def blocking(report: Report) -> frozenset[Label]:
    """Conflicts and unknowns: what the labels name in full."""
    return frozenset(label for label in found(report) if label[0] in ("conflict", "unknown"))


# -- mutants ----------------------------------------------------------------------------------------------------------


def with_input(case: Case, name: str, relation: str, *nodes: Node) -> Case:
    """The artifact made of one thing more, which is the first of `nodes`."""
    root = case.graph.nodes[case.graph.root]
    changed = replace(root, inputs=(*root.inputs, (relation, nodes[0].id)))
    graph = replace(case.graph, nodes={**case.graph.nodes, **{one.id: one for one in nodes}, root.id: changed})
    return replace(case, name=f"{case.name} + {name}", graph=graph)


def _is_model(case: Case) -> bool:
    root = case.graph.nodes[case.graph.root]
    return root.kind in ("chat", "base", "adapter", "model") and bool(root.inputs)


def _reaches_root_as_model(case: Case, key: str) -> list[str]:
    """Names of models under a licence from which the root is made, through models only."""
    names, stack = [], [case.graph.root]
    while stack:
        node = case.graph.nodes[stack.pop()]
        if key in node.licences and node.id != case.graph.root:
            names.append(node.name)
        stack += [
            b
            for r, b in node.inputs
            if r in ("finetune_of", "merged_from", "quantised_from", "converted_from", "copied_from")
        ]
    return names


def _measured_more(case: Case) -> Case | None:
    return with_input(
        case, "measured with forbidden data", "evaluated_on", Node("mm", "mm", "dataset", ("all rights reserved",))
    )


def _free_data(case: Case) -> Case | None:
    return with_input(case, "free data", "trained_on", Node("ff", "ff", "dataset", ("CC0-1.0",)))


def _mit_base(case: Case) -> Case | None:
    return with_input(case, "an MIT tokenizer", "tokenizer_of", Node("mt", "mt", "tokenizer", ("MIT",)))


def _banned_answers(case: Case) -> Case | None:
    """Two families at once: at least one of them is not what the model is made from."""
    if not _is_model(case) or _reaches_root_as_model(case, "llama3") or case.intent.mau:
        return None
    made = with_input(case, "answers of Llama 3", "trained_on", Node("qa", "qa", "dataset", ("MIT",), (("outputs_of", "l3x"),)),
                      Node("l3x", "l3x", "chat", ("llama3",)))  # fmt: skip
    return replace(made, expect=made.expect | {("conflict", "output-ban", "l3x")})


def _nc_base(case: Case) -> Case | None:
    """Merging a non-commercial model into something commercial and freely labelled."""
    if not _is_model(case) or any(
        "CC-BY" in text or "GPL" in text for node in case.graph.nodes.values() for text in node.licences
    ):
        return None
    made = with_input(case, "an NC model", "merged_from", Node("nc", "nc", "chat", ("CC-BY-NC-4.0",)))
    root = case.graph.nodes[case.graph.root]
    more = {("conflict", "non-commercial", "nc")} if case.intent.commercial else set()
    more |= (
        {("conflict", "declared-looser", "nc")}
        if root.licences and root.licences[0] not in ("CC-BY-NC-4.0", "llama1")
        else set()
    )
    return replace(made, expect=made.expect | more)


def _unknown_data(case: Case) -> Case | None:
    made = with_input(case, "data of unknown licence", "trained_on", Node("uu", "uu", "", ()))
    return replace(made, expect=made.expect | {("unknown", "no-licence", "uu")})


def _reserved_part(case: Case) -> Case | None:
    made = with_input(case, "a reserved part", "contains", Node("rr", "rr", "source", ("all rights reserved",)))
    return replace(made, expect=made.expect | {("conflict", "no-permission", "rr")})


def _no_notice(case: Case) -> Case | None:
    sources = {
        key: _reaches_root_as_model(case, key)
        for key in ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
    }
    if "Notice" not in case.graph.texts or not case.intent.distribute:
        return None
    texts = {name: text for name, text in case.graph.texts.items() if name != "Notice"}
    more = {("conflict", "notice", name) for names in sources.values() for name in names}
    return replace(
        case, name=case.name + " - Notice", graph=replace(case.graph, texts=texts), expect=case.expect | more
    )


def _other_name(case: Case) -> Case | None:
    asking = [
        name
        for key in ("llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
        for name in _reaches_root_as_model(case, key)
    ]
    if not asking or not case.intent.distribute:
        return None
    more = {("conflict", "name-prefix", name) for name in asking}
    more |= {
        ("conflict", "name-prefix", node.name)
        for relation, id in case.graph.nodes[case.graph.root].inputs
        if relation in ("trained_on_outputs_of", "distilled_from")
        and (node := case.graph.nodes[id]).licences == ("llama3.1",)
    }
    return replace(
        case, name=case.name + " renamed", intent=replace(case.intent, name="tienda"), expect=case.expect | more
    )


def _freer_label(case: Case) -> Case | None:
    root = case.graph.nodes[case.graph.root]
    plain = all(
        not any(w in text for w in ("SA", "GPL", "NC", "ND")) for n in case.graph.nodes.values() for text in n.licences
    )
    sources = [
        name
        for key in ("llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4")
        for name in _reaches_root_as_model(case, key)
    ]
    if not sources or not plain or not root.licences:
        return None
    changed = {**case.graph.nodes, root.id: replace(root, licences=("MIT",))}
    more = {("conflict", "declared-looser", name) for name in sources}
    expect = {label for label in case.expect if label[1] != "files-disagree"} | more
    if any(label[1] == "files-disagree" for label in case.expect):
        expect.add(("conflict", "files-disagree", root.name))
    return replace(
        case, name=case.name + " called MIT", graph=replace(case.graph, nodes=changed), expect=frozenset(expect)
    )


def _many_users(case: Case) -> Case | None:
    months = {
        "llama2": "2023-06",
        "llama3": "2024-03",
        "llama3.1": "2024-06",
        "llama3.2": "2024-08",
        "llama3.3": "2024-11",
        "llama4": "2025-03",
    }
    sources = {key: _reaches_root_as_model(case, key) for key in months}
    if case.intent.end_user or case.intent.mau or not any(sources.values()):
        return None
    direct = [
        r
        for n in case.graph.nodes.values()
        for r, _ in n.inputs
        if r in ("outputs_of", "generated_by", "trained_on_outputs_of", "distilled_from", "tokenizer_of")
    ]
    if direct:
        return None
    made = replace(
        case,
        name=case.name + ", by many",
        intent=replace(case.intent, mau={months[k]: 7.2e8 for k, v in sources.items() if v}),
    )
    return replace(
        made, expect=made.expect | {("conflict", "mau", name) for names in sources.values() for name in names}
    )


def _many_users_later(case: Case) -> Case | None:
    if case.intent.mau:
        return None
    return replace(case, name=case.name + ", by many later", intent=replace(case.intent, mau={"2026-01": 2e9}))


def _a_copy(case: Case) -> Case | None:
    """Handed on once more in another layout: all that bound the original binds the copy."""
    root = case.graph.nodes[case.graph.root]
    if not root.inputs or any(label[2] == root.name for label in case.expect) or case.intent.data_effect == "careful":
        return None
    copy = replace(root, id="copy", inputs=(("converted_from", root.id),))
    graph = replace(case.graph, root="copy", nodes={**case.graph.nodes, "copy": copy})
    return replace(case, name=case.name + ", converted", graph=graph)


def _other_spelling(case: Case) -> Case | None:
    names = {"llama2": "Llama 2 Community License", "llama3.1": "LicenseRef-scancode-llama-3.1-license-2024", "MIT": "mit license",
             "CC-BY-SA-4.0": "cc by sa 4.0", "Apache-2.0": "Apache License, Version 2.0", "llama3": "meta llama 3"}  # fmt: skip
    nodes = {
        id: replace(n, licences=tuple(names.get(text, text) for text in n.licences))
        for id, n in case.graph.nodes.items()
    }
    return replace(case, name=case.name + ", spelled otherwise", graph=replace(case.graph, nodes=nodes))


MUTATIONS: tuple[Callable[[Case], Case | None], ...] = (
    _measured_more, _free_data, _mit_base, _banned_answers, _nc_base, _unknown_data, _reserved_part, _no_notice, _other_name,
    _freer_label, _many_users, _many_users_later, _a_copy, _other_spelling,
)  # fmt: skip


def mutants() -> Iterator[Case]:
    """Every mutation that applies to every labelled lineage."""
    for case in cases():
        for mutate in MUTATIONS:
            if (made := mutate(case)) is not None:
                yield made


def shuffled(graph: Graph, seed: int) -> Graph:
    """The same lineage with nodes and inputs in another order."""
    draw = random.Random(seed)
    nodes = list(graph.nodes.values())
    draw.shuffle(nodes)
    return replace(graph, nodes={n.id: replace(n, inputs=tuple(draw.sample(n.inputs, len(n.inputs)))) for n in nodes})


def score(all_cases: list[Case]) -> tuple[int, int, int, list[str]]:
    """(right, missed, wrong) findings among conflicts and unknowns, and a line for each case that is not as labelled."""
    right = missed = wrong = 0
    lines = []
    for case in all_cases:
        got = blocking(evaluate(case.graph, case.intent))
        right += len(got & case.expect)
        missed += len(case.expect - got)
        wrong += len(got - case.expect)
        if got != case.expect:
            lines.append(f"{case.name}: missed {sorted(case.expect - got)}, wrong {sorted(got - case.expect)}")
    return right, missed, wrong, lines
