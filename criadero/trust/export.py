"""A passport in other people's formats: ``criadero passport export DIR --to FORMAT``.

Each format is a pure function of what the folder says (:class:`Facts`) to a text. What the passport does not say is left out, or
named as missing where the format asks for it; nothing is made up, and nothing is called measured that was estimated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, open_artifact
from criadero.errors import UserError
from criadero.recipe import nearest
from criadero.trust.licence_names import id_of, read_licence, table

MODELS = ("base", "chat", "adapter", "model", "quantised")
# terms of terms.toml that no licence of an open work has
_CLOSED = {
    "no_permission", "no_sharing", "non_commercial", "no_derivatives", "use_policy", "restrictions", "output_ban", "no_compete",
    "mau", "region",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """A passport and those of its ancestors, with the questions that several formats ask."""

    passport: Mapping[str, Any]
    ancestors: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return str(self.passport["name"])

    @property
    def kind(self) -> str:
        return str(self.passport["kind"])

    def table(self, key: str) -> Mapping[str, Any]:
        """One of the passport's tables (``model``, ``data``, ``step``, ``licence``), empty when it has none."""
        return self.passport.get(key) or {}

    @property
    def licence(self) -> str | None:
        return self.table("licence").get("declared") or None

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """The by-source rows of its own data, or of the nearest ancestor that has some."""
        for one in (self.passport, *self.ancestors):
            if rows := (one.get("data") or {}).get("by_source"):
                return list(rows)
        return []

    @property
    def all_sources(self) -> list[Mapping[str, Any]]:
        """The by-source rows of every model in the chain: what has been read by any of them."""
        rows = [row for one in self.chain for row in (one.get("data") or {}).get("by_source") or []]
        return rows or self.sources

    @property
    def read(self) -> list[tuple[Mapping[str, Any], str | None]]:
        """Every by-source row, its own first, with the name of the model behind it that read the source (None: itself)."""
        rows: list[tuple[Mapping[str, Any], str | None]] = [
            (row, None) for row in self.table("data").get("by_source") or []
        ]
        for one in self.chain:
            if one is not self.passport:
                rows += [(row, str(one["name"])) for row in (one.get("data") or {}).get("by_source") or []]
        return rows

    @property
    def languages(self) -> list[str]:
        for one in (self.passport, *self.ancestors):
            if found := (one.get("data") or {}).get("by_language"):
                return sorted(found)
        return []

    @property
    def chain(self) -> list[Mapping[str, Any]]:
        """This model and those it was made of, nearest first: their steps of training add up."""
        return [one for one in (self.passport, *self.ancestors) if one.get("kind") in MODELS]

    @property
    def base(self) -> Mapping[str, Any] | None:
        """The input row of the model that this was made of."""
        wanted = ("finetune_of", "quantised_from", "merged_from", "distilled_from", "converted_from")
        return next((row for row in self.passport["inputs"] if row.get("relation") in wanted), None)

    def inputs(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """(the passport made, the input's row) through the whole lineage."""
        for one in (self.passport, *self.ancestors):
            for row in one.get("inputs") or []:
                yield one, row

    def energy(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(name, energy table) of each step in the lineage that says its energy."""
        steps = [(str(one["name"]), (one.get("step") or {}).get("energy")) for one in (self.passport, *self.ancestors)]
        return [(name, energy) for name, energy in steps if energy]


def facts_of(artifact: Artifact) -> Facts:
    """The facts of an opened artifact."""
    return Facts(artifact.passport, tuple(artifact.ancestors()))


def spdx_id(licence: str | None) -> str | None:
    """The SPDX identifier of a licence that is one, however it is written ("CC BY 4.0"); None for several, and for other words."""
    reading = read_licence(licence)
    if len(reading.choices) != 1 or len(reading.choices[0]) != 1 or reading.unknown or reading.exceptions:
        return None
    id = id_of(next(iter(reading.choices[0])))
    return None if id.startswith("LicenseRef-") else id


def is_open(licence: str | None) -> bool:
    """Whether a licence, and each of several that hold together, is known and leaves everybody free to use, change and share."""
    reading = read_licence(licence)
    if not reading.choices or reading.unknown:
        return False
    return _CLOSED.isdisjoint(term["id"] for key in reading.choices[0] for term in table()[key].get("terms", ()))


def urls_of(row: Mapping[str, Any]) -> list[str]:
    """The addresses in a source's row; some name several, with commas."""
    words = str(row.get("url") or "").replace(",", " ").split()
    return [word for word in words if word.startswith(("https://", "http://"))]


def seconds(moment: object) -> str | None:
    """A passport's moment with whole seconds, as SPDX and CycloneDX want it."""
    text = str(moment or "")
    return text[:19] + "Z" if len(text) >= 20 else None


def count(value: object) -> int | None:
    """A whole number of a passport, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


# -- in-toto: SLSA provenance -----------------------------------------------------------------------------------------


def in_toto(facts: Facts) -> str:
    """An in-toto statement with SLSA provenance v1 (https://slsa.dev/spec/v1.0/provenance), unsigned."""
    p, step = facts.passport, facts.table("step")
    code = step.get("code") or {}
    dependencies = []
    for row in p["inputs"]:
        digest = str(row["id"]).removeprefix("sha256:")
        notes = {key: row[key] for key in ("relation", "licence", "locator", "verified") if row.get(key) is not None}
        dependencies.append({"name": str(row.get("name")), "digest": {"sha256": digest}, "annotations": notes})
    if code.get("git"):
        dependencies.append({"name": "criadero", "digest": {"gitCommit": code["git"]}})
    run = {"invocationId": p["id"], "startedOn": step.get("started"), "finishedOn": step.get("ended")}
    return dumps(
        {
            "_type": "https://in-toto.io/Statement/v1",
            "subject": [{"name": row["path"], "digest": {"sha256": row["sha256"]}} for row in p["files"]],
            "predicateType": "https://slsa.dev/provenance/v1",
            "predicate": {
                "buildDefinition": {
                    "buildType": "https://pypi.org/project/criadero/passport/1",
                    "externalParameters": {"command": step.get("command"), "config": step.get("config") or {}},
                    "internalParameters": {
                        key: step[key] for key in ("seeds", "env", "hardware", "energy") if key in step
                    },
                    "resolvedDependencies": dependencies,
                },
                "runDetails": {
                    "builder": {
                        "id": "https://pypi.org/project/criadero/",
                        "version": {"criadero": str(code.get("package"))},
                    },
                    "metadata": {key: value for key, value in run.items() if value},
                },
            },
        }
    )


# -- the formats ------------------------------------------------------------------------------------------------------


def _formats(lang: str) -> dict[str, Callable[[Facts], str]]:
    from criadero.trust import export_bom, export_croissant, export_forms, openness

    return {
        "cyclonedx": export_bom.cyclonedx,
        "spdx3": export_bom.spdx3,
        "croissant": export_croissant.croissant,
        "eu-summary": lambda facts: export_forms.eu_summary(facts, lang=lang),
        "model-doc": export_forms.model_doc,
        "hf-card": export_forms.hf_card,
        "in-toto": in_toto,
        "openness": openness.openness,
    }


def export(ref: str | Path | Artifact, to: str, *, lang: str = "en") -> str:
    """The passport of an artifact as a text in the format `to`. UserError: unknown format, or one that does not fit its kind."""
    formats = _formats(lang)
    if to not in formats:
        raise UserError(f"--to {to!r} is no format: {nearest(to, formats, 'there are')}")
    if lang not in ("en", "es"):
        raise UserError(f"--lang must be en or es, not {lang!r}")
    facts = facts_of(open_artifact(ref))
    if to == "croissant" and facts.kind != "dataset":
        raise UserError(f"{facts.name} is a {facts.kind}: croissant describes a dataset: give the folder of one")
    if to in ("eu-summary", "model-doc", "hf-card") and facts.kind not in MODELS:
        raise UserError(f"{facts.name} is a {facts.kind}: {to} describes a model: give one that was made of it")
    try:
        return formats[to](facts)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # it may have been written to deceive
        raise UserError(
            f"{facts.name}: its passport says something that cannot be told as {to} ({type(error).__name__}: {error}): "
            "see criadero passport verify --deep"
        ) from error
