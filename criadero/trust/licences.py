"""What is owed for an artifact, and what in its lineage does not go together: terms carried along the relations.

``check(DIR, intent)`` reads passports and the folder; ``evaluate(graph, intent)`` is the pure part: a walk over the lineage that
gives, for each input, the ways in which its material is in the result (relations.toml), and then asks of each term that
such a way carries (terms.toml) whether it is met by what is intended. No network, no legal advice.

Adding an input never takes a conflict away, with one exception that the licences themselves make: Llama 2 and 3 forbid
their answers to improve other models, "excluding Llama 2 or derivative works thereof", so a model trained on Llama 2's answers is
in order once it is itself made from Llama 2.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact
from criadero.errors import UserError
from criadero.trust.licence_graph import Graph, Node, read_graph, refuse_loops
from criadero.trust.licence_names import id_of, keys_of, read_licence, relations, rules_id, table
from criadero.trust.licence_rules import (
    CREDITS,
    DATA_EFFECTS,
    EU,
    NOT_MODELS,
    RULES,
    SEVERITIES,
    Bound,
    Case,
    Finding,
    Intent,
    Reach,
    declared,
    readings,
    root_findings,
    terms_of,
    together,
)

EXIT = {"ok": 0, "duties": 0, "conflict": 3, "unknown": 4}
_REGIONS = (  # ISO 3166-1, alpha-2, without the EU
    "AD AE AF AG AI AL AM AO AQ AR AS AU AW AX AZ BA BB BD BF BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ CA CC CD CF CG CH "
    "CI CK CL CM CN CO CR CU CV CW CX DJ DM DO DZ EC EG EH ER ET FJ FK FM FO GA GB GD GE GF GG GH GI GL GM GN GP GQ GS GT GU "
    "GW GY HK HM HN HT ID IL IM IN IO IQ IR IS JE JM JO JP KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LY MA MC MD "
    "ME MF MG MH MK ML MM MN MO MP MQ MR MS MU MV MW MX MY MZ NA NC NE NF NG NI NO NP NR NU NZ OM PA PE PF PG PH PK PM PN PR "
    "PS PW PY QA RE RS RU RW SA SB SC SD SG SH SJ SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV "
    "TW TZ UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW"
)


@dataclass(frozen=True)
class Report:
    """All findings, sorted, with what was asked. `computed` are the licences that bind the artifact as a whole."""

    name: str
    intent: Intent
    findings: tuple[Finding, ...]
    declared: str
    computed: tuple[str, ...]
    graph: Graph = field(repr=False)

    @property
    def verdict(self) -> str:
        """``conflict``, ``unknown``, ``duties`` or ``ok``: the worst of the findings."""
        found = {one.severity for one in self.findings}
        return next(
            (v for s, v in zip(SEVERITIES, ("conflict", "unknown", "duties"), strict=False) if s in found), "ok"
        )

    @property
    def exit_code(self) -> int:
        return EXIT[self.verdict]


# -- what was given ---------------------------------------------------------------------------------------------------


def parse_mau(words: Iterable[str]) -> dict[str, float]:
    """``["2023-06=7.1e8"]`` -> ``{"2023-06": 7.1e8}``. UserError when one is not MONTH=NUMBER."""
    found: dict[str, float] = {}
    for word in words:
        month, _, number = word.partition("=")
        try:
            value = float(number.strip().replace(",", ""))
            good = re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", month.strip()) and 0 <= value < 1e11
        except ValueError:
            good = None
        if not good:
            raise UserError(f"--mau {word!r} is not MONTH=NUMBER of users: write it like 2023-06=7.1e8")
        if found.setdefault(month.strip(), value) != value:
            raise UserError(f"--mau names {month.strip()} twice, with different numbers: give one")
    return found


def parse_region(text: str | None) -> str | None:
    """``EU`` or a two-letter country code in capitals. UserError for others."""
    code = {"UK": "GB", "EL": "GR"}.get((text or "").strip().upper(), (text or "").strip().upper())
    if text is None:
        return None
    if len(code) != 2 or code not in {"EU", *EU, *_REGIONS.split()}:
        raise UserError(f"--region {text!r} is not known: give EU, or a country's two letters such as ES, MX or US")
    return code


# -- the walk ---------------------------------------------------------------------------------------------------------


def _through(graph: Graph, start: str, of: Callable[[Node], frozenset[str]]) -> dict[str, frozenset[str]]:
    """For `start` and all that it adapts or copies, at any depth: what `of` says of the node and of those behind it, joined."""
    known: dict[str, frozenset[str]] = {}
    stack = [start]
    while stack:
        node = graph.nodes[stack[-1]]
        below = _adapted(graph, node)
        if waiting := [one for one in below if one not in known]:
            stack += waiting
            continue
        known[node.id] = of(node).union(*(known[one] for one in below))
        stack.pop()
    return known


def _adapted(graph: Graph, node: Node) -> list[str]:
    kinds = relations()["relations"]
    return [id for relation, id in node.inputs if kinds.get(relation) in ("adapted", "copy") and id in graph.nodes]


def _family(node: Node) -> frozenset[str]:
    """The families of models (Llama 2, ...) that a node is of by its licence, where nothing says what it was made from."""
    if node.kind in NOT_MODELS or node.inputs:
        return frozenset()
    return frozenset(table()[key]["family"] for key in keys_of(node.licences) if "family" in table()[key])


def _walk(graph: Graph) -> tuple[list[Reach], list[tuple[Node, str, tuple[str, ...]]]]:
    """Every (node, way, families of the learner) that the root reaches, nearest path first; and relations nobody knows."""
    compose, kinds = relations()["compose"], relations()["relations"]
    families: dict[str, frozenset[str]] = {}
    root = graph.nodes[graph.root]
    queue: deque[tuple[str, str, frozenset[str], tuple[str, ...]]] = deque(
        [(root.id, "self", frozenset(), (root.name,))]
    )
    seen: set[tuple[str, str, frozenset[str]]] = set()
    found, strange = [], []
    told: set[tuple[str, str]] = set()
    while queue:
        id, way, learner, path = queue.popleft()
        node = graph.nodes[id]
        rows = sorted((relation, graph.nodes[one].name, one) for relation, one in node.inputs if one in graph.nodes)
        for relation, name, below in rows:
            kind = kinds.get(relation)
            step = (*path, relation, name)
            if kind is None:
                kind = "adapted"  # the strictest of them
                if (relation, below) not in told:
                    told.add((relation, below))
                    strange.append((graph.nodes[below], relation, step))
            if kind == "output" and graph.nodes[below].kind in ("dataset", "source", "tokens"):
                kind = "learned"  # a dataset answers nothing: the model behind it did
            new = compose.get(way, {}).get(kind)
            if new is None:
                continue
            below_learner = learner
            if new in ("learned", "output") and way not in ("learned", "output"):
                if id not in families:
                    families.update(_through(graph, id, _family))
                below_learner = families[id]
            if (below, new, below_learner) not in seen:
                seen.add((below, new, below_learner))
                found.append(Reach(graph.nodes[below], new, below_learner, step))
                queue.append((below, new, below_learner, step))
    return found, strange


# -- the rules --------------------------------------------------------------------------------------------------------


def evaluate(graph: Graph, intent: Intent | None = None) -> Report:
    """All findings for a lineage and an intent: pure, the same for any order of inputs. See :class:`Finding`."""
    intent = intent or Intent()
    refuse_loops(graph)
    if intent.data_effect not in DATA_EFFECTS:
        raise UserError(f"--data-effect {intent.data_effect!r} is not known: give {', '.join(DATA_EFFECTS)}")
    root = graph.nodes[graph.root]
    reaches, strange = _walk(graph)
    if not root.inputs:  # nothing says what it was made of: it is taken as somebody's work, handed on
        reaches.append(Reach(root, "copy", frozenset(), (root.name,)))
    stated = intent.declared or (root.licences[0] if len(root.licences) == 1 else " / ".join(root.licences))
    case = Case(graph, root, intent, stated, read_licence(stated))
    found: list[Finding] = [
        Finding(
            "unknown", "unknown-relation", source=node.name, source_id=node.id, path=path, values=(("text", relation),)
        )
        for node, relation, path in strange
    ]
    bound: list[Bound] = []
    keys: dict[str, frozenset[str]] = {}
    for reach in reaches:
        found += readings(reach, case)
        for key in sorted(keys_of(reach.node.licences)):
            if reach.node.id not in keys:
                keys.update(_through(graph, reach.node.id, lambda node: keys_of(node.licences)))
            # a licence that a node has from what it was made from is told once, where it comes from; its authors are credited too
            inherited = any(key in keys[one] for one in _adapted(graph, reach.node))
            for one in terms_of(key, reach, intent):
                if not inherited or one.term["id"] in (*CREDITS, "region"):
                    bound.append(replace(one, inherited=inherited))
    for one in bound:
        found += RULES[one.term["id"]](one, case)
    found += declared(bound, case)
    found += together(bound, case)
    found += root_findings(case)
    best: dict[tuple[str, str, str, str], Finding] = {}
    for finding in found:
        before = best.get(finding.key)
        if before is None or _rank(finding) < _rank(before):
            best[finding.key] = finding
    binding = sorted({id_of(one.key) for one in bound if one.strength == "full" and one.way in ("copy", "adapted")})
    return Report(
        intent.name or root.name, intent, tuple(sorted(best.values(), key=_rank)), stated, tuple(binding), graph
    )


def _rank(finding: Finding) -> tuple[Any, ...]:
    return (
        SEVERITIES.index(finding.severity), finding.rule, finding.licence, len(finding.path), finding.path, finding.source_id,
        finding.clause, finding.values,
    )  # fmt: skip


# -- what others call -------------------------------------------------------------------------------------------------


def check(ref: str | Path | Artifact, intent: Intent | None = None) -> Report:
    """Read a folder (or bundled model) and evaluate it. UserError: no such folder, a loop, a passport that cannot be read."""
    return evaluate(read_graph(ref), intent)


def publishable(ref: str | Path | Artifact, intent: Intent | None = None) -> list[Finding]:
    """What stands against handing this on: conflicts and unknowns, with `distribute` taken as intended. Empty: nothing does."""
    report = check(ref, replace(intent or Intent(), distribute=True))
    return [one for one in report.findings if one.severity in ("conflict", "unknown")]


def computed(report: Report) -> dict[str, Any]:
    """What ``criadero show --json`` says under ``licence``, ``computed``: verdict, hash of the rules, setting, findings.

    It is not sealed: the rules grow, and the same passport is read with those of the day.
    """
    rows = [
        {
            "severity": one.severity,
            "rule": one.rule,
            "licence": one.licence,
            "clause": one.clause,
            "path": list(one.path),
        }
        for one in report.findings
    ]
    return {
        "verdict": report.verdict, "rules": rules_id(), "data_effect": report.intent.data_effect,
        "binding": list(report.computed), "findings": rows,
    }  # fmt: skip
