"""The lineage of an artifact as a graph, for the rules on licences: from passports, and from what a folder's own files state."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from criadero import places
from criadero.artifact import Artifact, read_passport, resolve
from criadero.errors import UserError
from criadero.trust.licence_names import id_of, keys_of, read_licence, recognise, table

_TEXT_FILE = re.compile(r"(?i)(licen[cs]es?/.*|(licen[cs]e|copying|notice|readme|attribution|credits|sources)[^/]*)")
_MAX_TEXT = 1 << 20


@dataclass(frozen=True)
class Node:
    """One artifact or plain file of the lineage. `inputs` are (relation, id); `credit` is whom its makers want named."""

    id: str
    name: str
    kind: str = ""
    licences: tuple[str, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    modalities: tuple[str, ...] = ()
    credit: str = ""
    missing: bool = False  # a passport vouches for it, but it is not in lineage.jsonl
    read_from: str = ""  # the folder that its licence was read from, where no passport records it


@dataclass(frozen=True)
class Graph:
    """A lineage: the node asked about, all nodes by id, and the root folder's texts (path -> content) where there is one."""

    root: str
    nodes: Mapping[str, Node]
    texts: Mapping[str, str] = field(default_factory=dict)
    sealed: bool = True


def read_graph(ref: str | Path | Artifact) -> Graph:
    """The lineage of a folder or a bundled model, with the folder's licence texts. Files are not hashed.

    A folder without passport is one node whose licence is what its LICENSE and README say. UserError for a file, for
    a passport or lineage that cannot be read, and for a lineage that loops.
    """
    path = resolve(ref)
    if not path.is_dir():
        raise UserError(f"{path} is a file: licences are checked along a folder's passport; give the folder")
    passport = read_passport(path)
    texts = _texts(path)
    if passport is None:
        says = [text for _, text in stated_licences(texts)]
        node = Node("folder", path.resolve().name, "imported", tuple(sorted(set(says))), (), _modalities(path))
        return Graph(node.id, {node.id: node}, texts, sealed=False)
    ancestors = Artifact(path, passport).ancestors()
    graph = passport_graph(passport, ancestors)
    found = {node.id: node for node in _beside(graph, [passport, *ancestors])}
    return replace(graph, nodes={**graph.nodes, **found}, texts=texts)


def _beside(graph: Graph, passports: Sequence[Mapping[str, Any]]) -> Iterator[Node]:
    """Plain folders (a downloaded model) whose licence no passport records, if they still lie where they were used from."""
    for row in [row for one in passports for row in one.get("inputs") or []]:
        node = graph.nodes.get(row["id"])
        if node is None or node.licences or node.inputs or not row.get("locator"):
            continue
        folder = places.find(str(row["locator"]))
        if folder.is_dir() and (said := sorted({text for _, text in stated_licences(_texts(folder))})):
            yield replace(node, licences=tuple(said), modalities=_modalities(folder), read_from=str(folder))


def passport_graph(passport: Mapping[str, Any], ancestors: Sequence[Mapping[str, Any]] = ()) -> Graph:
    """The lineage that a passport and the passports behind it tell. UserError when it loops."""
    known = {str(one["id"]): one for one in (*ancestors, passport)}
    rows_of = {id: _source_rows(one) for id, one in known.items()}
    leaves: dict[str, list[Mapping[str, Any]]] = {}
    stated: dict[str, str] = {}  # what whoever used an artifact said of it
    for one in known.values():
        for row in one.get("inputs") or []:
            if row["id"] not in known:
                leaves.setdefault(row["id"], []).append(row)
            elif row.get("licence"):
                stated[row["id"]] = min(str(row["licence"]), stated.get(row["id"], str(row["licence"])))
    nodes: dict[str, Node] = {}
    credits = {row.name: row.credit for id in sorted(known) for row in rows_of[id] if row.credit}
    for id, rows in leaves.items():
        licences = sorted({str(row["licence"]) for row in rows if row.get("licence")})
        name = min(str(row.get("name") or id[:19]) for row in rows)
        missing = any(row.get("verified") for row in rows)
        nodes[id] = Node(id, name, "", tuple(licences), missing=missing, credit=credits.get(name.split("/")[0], ""))
    for id, one in known.items():
        inputs = {(str(row.get("relation", "")), str(row["id"])) for row in one.get("inputs") or []}
        kept = []
        for row in rows_of[id]:
            files = [
                nodes[below] for _, below in inputs if below in nodes and nodes[below].name.startswith(row.name + "/")
            ]
            # the table knows the licences of the rows that were kept, the input that of the file: the exacter one is taken
            told = [below.id for below in files if _covers(row.licences, below.licences)]
            inputs = {(relation, below) for relation, below in inputs if below not in told}
            if len(told) == len(files) or not any(_covers(below.licences, row.licences) for below in files):
                kept.append(row)
        nodes.update((row.id, row) for row in kept)
        inputs |= {("contains", row.id) for row in kept}
        declared = (one.get("licence") or {}).get("declared") or (None if inputs else stated.get(id))
        nodes[id] = Node(
            id, str(one.get("name") or ""), str(one.get("kind") or ""), (str(declared),) if declared else (),
            tuple(sorted(inputs)), tuple(map(str, (one.get("model") or {}).get("modalities") or ())),
        )  # fmt: skip
    graph = Graph(str(passport["id"]), nodes)
    refuse_loops(graph)
    return graph


def _covers(more: Sequence[str], less: Sequence[str]) -> bool:
    """Whether the first statements name every licence of the second; "CC BY" is covered by "CC BY 4.0"."""
    if any(read_licence(text).unknown for text in (*more, *less)):
        return tuple(more) == tuple(less)
    left, right = keys_of(more), keys_of(less)
    return keys_of([*more, *less]) == left and bool(right)


def _source_rows(passport: Mapping[str, Any]) -> list[Node]:
    """The rows of a dataset's table by source. Elsewhere the table is a copy of the dataset's."""
    if passport.get("kind") != "dataset":
        return []
    rows = (passport.get("data") or {}).get("by_source") or []
    return [
        Node(f"{passport['id']}#{row['name']}", str(row["name"]), "source", (str(row["licence"]),),
             credit=str(row.get("attribution") or ""))
        for row in rows if isinstance(row, dict) and row.get("name") and row.get("licence")
    ]  # fmt: skip


def refuse_loops(graph: Graph) -> None:
    """UserError that names the loop, if what the root was made of leads back to itself anywhere. No recursion: depth is free."""
    state: dict[str, int] = {}
    stack: list[tuple[str, Iterator[str]]] = []

    def enter(id: str) -> None:
        state[id] = 1
        stack.append((id, iter([next_id for _, next_id in graph.nodes[id].inputs])))

    enter(graph.root)
    while stack:
        id, rest = stack[-1]
        for below in rest:
            if state.get(below) == 1:
                names = [graph.nodes[one].name for one, _ in stack]
                start = [one for one, _ in stack].index(below)
                raise UserError(
                    "the lineage goes in a circle ("
                    + " <- ".join([*names[start:], names[start]])
                    + "): a thing cannot be made of "
                    "itself; the passports were changed by hand, make the artifact again"
                )
            if below in graph.nodes and below not in state:
                enter(below)
                break
        else:
            state[id] = 2
            stack.pop()


def _texts(folder: Path) -> dict[str, str]:
    """Licences, notices and cards of a folder: path -> content, at most 1 MiB each; what is larger is no licence."""
    found = {}
    for file in sorted([*folder.iterdir(), *folder.glob("[Ll][Ii][Cc][Ee][NnSsCc]*/*")]):
        name = file.relative_to(folder).as_posix()
        if _TEXT_FILE.fullmatch(name) and file.is_file() and file.stat().st_size <= _MAX_TEXT:
            found[name] = file.read_text(encoding="utf-8", errors="replace")
    return found


def _modalities(folder: Path) -> tuple[str, ...]:
    """What a Hugging Face folder's config.json tells: text only, or more."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    if not isinstance(config, dict):
        return ()
    return ("text", "image") if "vision_config" in config else ("text",)


def stated_licences(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(file, licence) that a folder's own LICENSE and README state, read as far as they can be."""
    found = []
    for name, text in sorted(texts.items()):
        if re.fullmatch(r"(?i)(licen[cs]e|copying)[^/]*", name):
            key = recognise(text)
            found.append((name, id_of(key) if key else "a text that is not known"))
        elif re.fullmatch(r"(?i)readme[^/]*", name):
            found += [(name, said) for said in _readme_licences(text)]
    return found


def _readme_licences(text: str) -> list[str]:
    """What a README says of its own licence: the front matter's ``license``, else its section or line on the licence."""
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.S)
    if head:
        fields = dict(re.findall(r"(?m)^(license(?:_name)?):\s*[\"']?([^\"'\n#]+)", head[1]))
        said = fields.get("license_name") if fields.get("license", "").strip() == "other" else fields.get("license")
        if said:
            return [said.strip()]
    section = re.search(r"(?mi)^#+\s*(?:licen[cs]e|licencia)s?\b[^\n]*\n(.*?)(?=^#|\Z)", text, re.S)
    line = re.search(r"(?mi)^\W*(?:licen[cs]e|licencia)\W*:\W*([^\n]+)", text)
    words = section[1] if section else line[1] if line else ""
    key = _first_name(words)
    return [id_of(key)] if key else []


def _first_name(words: str) -> str | None:
    """The licence that a few sentences name first, the longest name where several begin at one place."""
    pattern, keys = _names()
    found = pattern.search(" ".join(re.sub(r"[\s_\-*\[\]()`]+", " ", words.lower()).split()))
    return keys[found[0]] if found else None


# names that are ordinary words, or of models, in a sentence
_ORDINARY = {"own", "mine", "ours", "propio", "propia", "pd", "boost", "copyrighted", "gated", "proprietary", "propietario", "llama",
             "openai", "deepseek", "gemma", "psf", "mpl", "gpl", "bsd", "afl", "wtfpl", "expat"}  # fmt: skip


@functools.cache
def _names() -> tuple[re.Pattern[str], dict[str, str]]:
    keys: dict[str, str] = {}
    for key, row in table().items():
        for name in (row["id"], row["title"], *row["aliases"]):
            plain = " ".join(re.sub(r"[\s_\-()]+", " ", name.lower()).split())
            if plain not in _ORDINARY:
                keys.setdefault(plain, key)
    longest = sorted(keys, key=len, reverse=True)
    return re.compile(r"(?<![\w.])(?:" + "|".join(map(re.escape, longest)) + r")(?!\w|\.\d)"), keys
