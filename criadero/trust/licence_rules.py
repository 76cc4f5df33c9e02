"""Each term of a licence as a small function: given what carries it and what is intended, is it met, owed or broken?

``terms_of`` says which terms a way of being made of something carries; ``RULES`` holds one function a term; ``declared`` and
``together`` look at several at once. ``licences.evaluate`` calls them. ``docs/guides/what-do-i-owe.md`` says it in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from criadero.trust.licence_graph import Graph, Node, stated_licences
from criadero.trust.licence_names import (
    Reading,
    expression,
    id_of,
    keys_of,
    read_licence,
    recognise,
    relations,
    table,
)

Severity = Literal["conflict", "unknown", "duty", "note"]
SEVERITIES: tuple[Severity, ...] = ("conflict", "unknown", "duty", "note")
DATA_EFFECTS = ("none", "attribution", "careful")
EU = frozenset("AT BE BG CY CZ DE DK EE ES FI FR GR HR HU IE IT LT LU LV MT NL PL PT RO SE SI SK".split())  # noqa: SIM905
CREDITS = ("attribution", "changes", "keep_text")
NOT_MODELS = ("dataset", "tokens", "tokenizer", "index", "audit", "logits")


@dataclass(frozen=True)
class Intent:
    """What is to be done with the artifact.

    `mau`: monthly active users by month ("2023-06"), of all products of the firm. `region`: where it is established, "EU"
    or a two-letter country code. `name`, `declared`: the name and the licence it will be shared under; the passport's when
    None. `end_user`: it was received inside a product for end users. `data_effect`: whether licences of training data bind the
    weights, which is not settled law: "none", "attribution" (credit is owed, the rest is told), "careful" (they bind).
    """

    commercial: bool = False
    distribute: bool = False
    mau: Mapping[str, float] = field(default_factory=dict)
    region: str | None = None
    name: str | None = None
    declared: str | None = None
    end_user: bool = False
    data_effect: str = "attribution"


@dataclass(frozen=True)
class Finding:
    """One thing to know, do or solve. `source` is the input it comes from, `path` the way there from the artifact.

    `rule` says which rule found it and picks the words; `values` fill them in. `done` says of a duty that can be seen in the folder
    whether it is met. `fixable`: ``--fix`` can write it.
    """

    severity: Severity
    rule: str
    licence: str = ""
    clause: str = ""
    source: str = ""
    source_id: str = ""
    path: tuple[str, ...] = ()
    values: tuple[tuple[str, str], ...] = ()
    done: bool | None = None
    fixable: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What makes two findings the same one."""
        return (self.rule, self.licence, self.source_id, dict(self.values).get("text", ""))


@dataclass(frozen=True)
class Reach:
    """One way in which a node's material is in the root. `families`: what the model that learned from it is itself made from."""

    node: Node
    way: str
    families: frozenset[str]
    path: tuple[str, ...]


@dataclass(frozen=True)
class Case:
    graph: Graph
    root: Node
    intent: Intent
    declared: str
    reading: Reading  # of what is declared


@dataclass(frozen=True)
class Bound:
    """A term of a licence that reaches the root. `strength`: full, credit (a duty at most) or note."""

    reach: Reach
    key: str
    term: Mapping[str, Any]
    strength: str
    way: str  # as the licence sees it: answers of a Gemma count as adapting it
    inherited: bool = False  # the node has this licence from what it was itself made from

    def finding(self, severity: Severity, rule: str, **more: Any) -> Finding:
        if self.strength == "note":
            severity = "note"
        if self.strength == "credit" and severity == "conflict":
            severity = "duty"
        values = tuple(sorted((k, str(v)) for k, v in more.pop("values", {}).items()))
        node = self.reach.node
        return Finding(
            severity, rule, id_of(self.key), str(self.term.get("clause", "")), node.name, node.id, self.reach.path,
            (*values, ("way", self.way)), **more,
        )  # fmt: skip


Rule = Callable[[Bound, Case], Iterator[Finding]]


def terms_of(key: str, reach: Reach, intent: Intent) -> Iterator[Bound]:
    """The terms of a licence that a way carries, with their strength."""
    row, way = table()[key], reach.way
    about = row.get("about", "any")
    if about != "any" and way == "learned":
        way = "output"  # data under a model's or a service's licence is what it answered
    if way == "output" and row.get("outputs_derive"):
        way = "adapted"
    if way == "learned" and row.get("results_free") and row.get("terms"):
        yield Bound(reach, key, {"id": "results_free", "clause": ""}, "note", way)
        return
    carries = relations()["carries"].get(way, {})
    for term in row.get("terms", ()):
        id = term["id"]
        if id in carries.get("full", ()):
            strength = "full"
        elif id in carries.get("data", ()):
            light = id in ("attribution", "keep_text")
            effect = intent.data_effect
            strength = "full" if effect == "careful" else "credit" if effect == "attribution" and light else "note"
        elif id in carries.get("note", ()):
            strength = "note"
        else:
            continue
        if id == "name_prefix" and way == "output" and not term.get("outputs"):
            continue  # Llama 3.0 asks it of models made with its materials, not with its answers
        if id == "keep_text" and way == "learned":
            # no text is copied into weights: what is left of the duty is to name source and licence
            term = {"id": "attribution", "clause": term["clause"]}
        yield Bound(reach, key, term, strength, way)


def _present(case: Case, pattern: str) -> list[str]:
    return [text for name, text in case.graph.texts.items() if re.fullmatch(pattern, name, re.I)]


def _plain(text: str) -> str:
    """For comparing lines: one kind of copyright sign and quotation, single spaces."""
    return " ".join(re.sub(r"\(c\)|©", "(c)", text, flags=re.I).split()).lower()


def _when_shared(case: Case, met: bool) -> tuple[Severity, bool | None]:
    """A condition of sharing: a duty until then; a conflict when it is to be shared and is not met."""
    return ("duty" if met or not case.intent.distribute else "conflict"), met


def _agreement(one: Bound, case: Case) -> Iterator[Finding]:
    met = any(recognise(text) == one.key for text in _present(case, r"(licen[cs]es?/.*|licen[cs]e[^/]*|copying[^/]*)"))
    severity, done = _when_shared(case, met)
    yield one.finding(severity, "agreement", done=done, fixable=not met)


def _notice(one: Bound, case: Case) -> Iterator[Finding]:
    line = one.term["text"]
    met = any(_plain(line) in _plain(text) for text in _present(case, r"notice(\.txt|\.md)?"))
    severity, done = _when_shared(case, met)
    yield one.finding(severity, "notice", values={"text": line}, done=done, fixable=not met)


def _display(one: Bound, case: Case) -> Iterator[Finding]:
    words = one.term["text"]
    met = any(_plain(words) in _plain(text) for text in _present(case, r"(readme|notice)[^/]*"))
    severity, done = _when_shared(case, met)
    yield one.finding(severity, "display", values={"text": words}, done=done, fixable=not met)


def begins_with(name: str, prefix: str) -> bool:
    """Whether a model's name begins so; case, spaces, hyphens and underscores do not count ("llama-3-x" for "Llama 3")."""
    return re.sub(r"[\s_-]+", "", name).lower().startswith(re.sub(r"[\s_-]+", "", prefix).lower())


def _name_prefix(one: Bound, case: Case) -> Iterator[Finding]:
    if case.root.kind in NOT_MODELS:
        if one.way == "generated":
            yield one.finding("note", "name-prefix-later", values={"text": one.term["text"]})
        return
    name = case.intent.name or case.root.name
    met = begins_with(name, one.term["text"])
    severity, done = _when_shared(case, met)
    yield one.finding(severity, "name-prefix", values={"text": one.term["text"], "name": name}, done=done)


def _output_ban(one: Bound, case: Case) -> Iterator[Finding]:
    family, way = table()[one.key]["family"], one.way
    if way in ("output", "learned"):
        if family not in one.reach.families:
            yield one.finding("conflict", "output-ban")
    elif way == "distant":
        yield one.finding("note", "second-hand")
    else:
        yield one.finding("duty", "output-ban-later")


def _no_compete(one: Bound, case: Case) -> Iterator[Finding]:
    way = one.way
    if way == "distant":
        yield one.finding("note", "second-hand")
    elif way in ("output", "learned"):
        shared = case.intent.commercial or case.intent.distribute
        yield one.finding("conflict" if shared else "duty", "no-compete")
    else:
        yield one.finding("duty", "no-compete-later")


def month_tested(released: str) -> str:
    """The calendar month before the one in which a version came out: ``"2023-07-18"`` -> ``"2023-06"``."""
    year, month = int(released[:4]), int(released[5:7])
    return f"{year - (month == 1)}-{(month - 2) % 12 + 1:02d}"


def _mau(one: Bound, case: Case) -> Iterator[Finding]:
    if case.intent.end_user:
        return
    month = month_tested(table()[one.key]["released"])
    values = {"month": month, "limit": one.term["limit"] // 1_000_000, "released": table()[one.key]["released"]}
    users = case.intent.mau.get(month)
    if users is not None and users > one.term["limit"]:
        yield one.finding("conflict", "mau", values=values | {"users": f"{users:,.0f}"})
    elif users is None:
        later = ", ".join(sorted(case.intent.mau))
        yield one.finding("note", "mau-other-month" if later else "mau-untested", values=values | {"given": later})


def _region(one: Bound, case: Case) -> Iterator[Finding]:
    region = case.intent.region
    told = one.inherited and one.term["applies"] == "always"
    if case.intent.end_user or one.term["excluded"] != "EU" or told:
        return
    more = _multimodal(one, case)
    if region == "EU" or region in EU:
        if more:
            yield one.finding("conflict", "region", values={"region": region})
        elif more is None and not one.inherited:
            yield one.finding("unknown", "region-unknown", values={"region": region})
    elif region is None and more is not False and not one.inherited:
        yield one.finding("note", "region-untested")


def _multimodal(one: Bound, case: Case) -> bool | None:
    """Whether the model under this licence takes more than text; None when nothing tells."""
    if one.term["applies"] == "always":
        return True
    if one.key == "llama-3.3":
        return False  # the words stand there, but every model of that version is for text only
    name = one.reach.node.name.lower()
    if re.search(r"vision|(?<!\d)(11|90)b\b", name):
        return True
    if re.search(r"(?<![\d.])[13]b\b", name):
        return False
    told = one.reach.node.modalities or (case.root.modalities if one.way in ("adapted", "copy") else ())
    return bool(set(told) - {"text"}) if told else None


def _attribution(one: Bound, case: Case) -> Iterator[Finding]:
    names = {one.reach.node.name.split("/")[0], one.reach.node.credit} - {""}
    texts = "\n".join(_present(case, r"(readme|notice|attribution|credits|sources)[^/]*")).lower()
    done = any(name.lower() in texts for name in names)
    yield one.finding("duty", "attribution", done=done, fixable=not done, values={"credit": one.reach.node.credit})


def _changes(one: Bound, case: Case) -> Iterator[Finding]:
    """Done when the folder's README says what it was made from, as the card that every model gets does."""
    texts = "\n".join(_present(case, r"(readme|notice)[^/]*"))
    said = r"(?:made from|based on|fine-?tuned? (?:of|from)|hech[oa] a partir de|base_model:)\W{0,4}" + re.escape(
        one.reach.node.name
    )
    yield one.finding("duty", "changes", done=re.search(said + r"(?!\w)", texts, re.I) is not None)


def _keep_text(one: Bound, case: Case) -> Iterator[Finding]:
    met = any(recognise(text) == one.key for text in _present(case, r"(licen[cs]es?/.*|licen[cs]e[^/]*|copying[^/]*)"))
    yield one.finding("duty", "keep-text", done=met, fixable=not met)


def _share_alike(one: Bound, case: Case) -> Iterator[Finding]:
    accepts = ", ".join(one.term["accepts"])
    if one.way in ("part", "component"):
        yield one.finding("duty", "share-alike-part")
    elif not case.reading.choices or all(_within(choice, one.term["accepts"]) for choice in case.reading.choices):
        yield one.finding("duty", "share-alike", values={"accepts": accepts}, done=bool(case.reading.choices))
    else:
        # a duty with "none of the data's terms", a conflict where the work itself is adapted
        yield one.finding("conflict", "declared-share-alike", values={"accepts": accepts, "declared": case.declared})


def _within(keys: frozenset[str], accepts: Sequence[str]) -> bool:
    return any(id_of(key) in accepts for key in keys)


def _non_commercial(one: Bound, case: Case) -> Iterator[Finding]:
    yield one.finding("conflict" if case.intent.commercial else "duty", "non-commercial")


def _when_given_on(rule: str) -> Rule:
    """A thing that must not be handed on: a duty until somebody means to."""

    def check(one: Bound, case: Case) -> Iterator[Finding]:
        yield one.finding("conflict" if case.intent.distribute else "duty", rule)

    return check


def _always(severity: Severity, rule: str) -> Rule:
    def check(one: Bound, case: Case) -> Iterator[Finding]:
        yield one.finding(severity, rule)

    return check


RULES: dict[str, Rule] = {
    "agreement": _agreement,
    "notice": _notice,
    "display": _display,
    "name_prefix": _name_prefix,
    "output_ban": _output_ban,
    "no_compete": _no_compete,
    "mau": _mau,
    "region": _region,
    "attribution": _attribution,
    "keep_text": _keep_text,
    "share_alike": _share_alike,
    "non_commercial": _non_commercial,
    "no_derivatives": _when_given_on("no-derivatives"),
    "no_sharing": _when_given_on("no-sharing"),
    "no_permission": _always("conflict", "no-permission"),
    "weak_share_alike": _always("duty", "share-alike-part"),
    "changes": _changes,
    "source_code": _always("duty", "source-code"),
    "restrictions": _always("duty", "restrictions"),
    "use_policy": _always("duty", "use-policy"),
    "results_free": _always("note", "results-free"),
}

# terms that a declared licence must have too, or be that licence: who reads only the label would think himself freer than he is
_STICKY = ("restrictions", "non_commercial", "no_derivatives", "no_sharing")


def declared(bound: Sequence[Bound], case: Case) -> Iterator[Finding]:
    """A label looser than what it stands on: the commonest fault on model hubs. And a LICENSE file of another model."""
    ways = ("copy", "adapted", "part", "learned")
    sticky = [one for one in bound if one.term["id"] in _STICKY and one.strength == "full" and one.way in ways]
    if not case.root.inputs:
        return
    for one in sticky:
        same = (
            one.term["id"] != "restrictions"
        )  # each community licence is its own; non-commercial ones are alike in that
        for choice in case.reading.choices:
            if one.key not in choice and not (same and any(_has(key, one.term["id"]) for key in choice)):
                yield one.finding("conflict", "declared-looser", values={"declared": case.declared})
                break
    models = [one for one in sticky if one.term["id"] == "restrictions" and one.way in ("copy", "adapted")]
    for file, text in stated_licences(case.graph.texts):
        stated = keys_of([text])
        if models and stated and not any(one.key in stated for one in models):
            yield models[0].finding("conflict", "file-of-another", values={"file": file, "says": text, "text": file})


def _has(key: str, term: str) -> bool:
    return any(one["id"] == term for one in table()[key].get("terms", ()))


def together(bound: Sequence[Bound], case: Case) -> Iterator[Finding]:
    """Two licences that cannot both be kept in one work: share-alike against share-alike, or against more restrictions."""
    whole = [one for one in bound if one.way in ("copy", "adapted", "learned")]
    by_key: dict[str, dict[str, Bound]] = {}
    for one in sorted(whole, key=lambda b: (len(b.reach.path), b.reach.path)):
        terms = by_key.setdefault(one.key, {})
        before = terms.get(one.term["id"])
        if before is None or (one.strength == "full" and before.strength != "full"):
            terms[one.term["id"]] = one
    for key, terms in sorted(by_key.items()):
        row = table()[key]
        for other, others in sorted(by_key.items()):
            first, second = (min(t.values(), key=lambda one: one.term["id"] in CREDITS) for t in (terms, others))
            if id_of(other) in row.get("clashes", ()):
                yield _pair("clash", first, second, case)
            if "share_alike" not in terms or key == other:
                continue
            mine = terms["share_alike"]
            accepts = set(mine.term["accepts"])
            if "share_alike" in others:
                if key < other and not accepts & set(others["share_alike"].term["accepts"]):
                    yield _pair("share-alike-clash", mine, others["share_alike"], case)
                continue
            hard = [id for id in ("restrictions", "non_commercial", "no_derivatives", "output_ban") if id in others]
            if hard and id_of(other) not in accepts:
                yield _pair("share-alike-restricted", mine, others[hard[0]], case)


def _pair(rule: str, one: Bound, other: Bound, case: Case) -> Finding:
    full = one.strength == other.strength == "full"
    severity: Severity = "note" if not full else "conflict" if case.intent.distribute else "duty"
    values = {
        "other": id_of(other.key),
        "other_clause": other.term.get("clause", ""),
        "other_source": other.reach.node.name,
    }
    made = replace(one, strength="full").finding(severity, rule, values=values)
    # one finding a pair of licences, whichever of their sources stands nearest
    return replace(made, source_id=id_of(other.key), values=(*made.values, ("text", id_of(other.key))))


def readings(reach: Reach, case: Case) -> Iterator[Finding]:
    """What cannot be read, or was read with a choice or a liberty."""
    node = reach.node
    at: dict[str, Any] = {"source": node.name, "source_id": node.id, "path": reach.path}
    weak: Severity = "note" if reach.way in ("tool", "distant") else "unknown"
    if node.missing:
        yield Finding(weak, "missing-passport", **at)
    if node.read_from:
        values = (("folder", node.read_from), ("says", ", ".join(node.licences)))
        yield Finding("note", "read-from", values=values, **at)
    if not node.licences and not node.inputs:
        yield Finding(weak, "no-licence", **at)
    for text in node.licences:
        yield from _reading_findings(read_licence(text), weak, at)


def _reading_findings(reading: Reading, weak: Severity, at: Mapping[str, Any]) -> Iterator[Finding]:
    if not reading.choices and not reading.unknown:
        yield Finding(weak, "no-licence", values=(("text", reading.text),), **at)
    for word, near, listed in reading.unknown:
        rule = "not-in-table" if listed else "unknown-licence"
        yield Finding(weak, rule, word, values=(("near", near), ("text", word)), **at)
    if len(reading.choices) > 1:
        taken = expression(reading.choices[0])
        yield Finding("note", "choice", taken, values=(("taken", taken), ("text", reading.text)), **at)
    for exception in reading.exceptions:
        yield Finding("note", "exception", values=(("text", exception),), **at)
    if reading.loose and reading.choices:
        read = expression(reading.choices[0])
        yield Finding("note", "read-as", read, values=(("read", read), ("text", reading.text)), **at)


def root_findings(case: Case) -> Iterator[Finding]:
    root = case.root
    at: dict[str, Any] = {"source": root.name, "source_id": root.id, "path": (root.name,)}
    if not case.graph.sealed:
        yield Finding("unknown", "no-passport", **at)
    if root.inputs:
        if case.declared:
            yield from _reading_findings(case.reading, "unknown", at)
        elif case.intent.distribute:
            yield Finding("unknown", "undeclared", **at)
    said = stated_licences(case.graph.texts)
    if case.declared and root.inputs:
        said.append(("passport.json" if not case.intent.declared else "--licence", case.declared))
    readings = [(file, text, read_licence(text)) for file, text in said]
    for n, (file, text, reading) in enumerate(readings):
        for file2, text2, reading2 in readings[n + 1 :]:
            both = reading.choices and reading2.choices
            if both and not _same(reading, reading2) and file != file2:
                values = (
                    ("declared", text2),
                    ("file", file),
                    ("file2", file2),
                    ("says", text),
                    ("text", f"{file} {file2}"),
                )
                yield Finding("conflict", "files-disagree", values=values, **at)


def _same(one: Reading, other: Reading) -> bool:
    """Whether two statements can both be true: they name the same, or one names all of the other and more."""
    left, right = (frozenset[str]().union(*r.choices) for r in (one, other))
    return left <= right or right <= left
