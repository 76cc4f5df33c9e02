"""Bills of materials: CycloneDX 1.7 (with its model card) and SPDX 3.0.1 (AI and dataset profiles), as JSON."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from criadero.trust.export import MODELS, Facts, count, dumps, seconds, spdx_id, urls_of

# -- CycloneDX --------------------------------------------------------------------------------------------------------


def cyclonedx(facts: Facts) -> str:
    """A CycloneDX 1.7 document: the artifact with its files and model card, its ancestors, inputs and sources as components."""
    p = facts.passport
    parts: dict[str, dict[str, Any]] = {}
    depends: dict[str, list[str]] = {}
    for one in facts.ancestors:
        parts[one["id"]] = _component(one)
    for made, row in facts.inputs():
        if row["id"] not in parts and row["id"] != p["id"]:
            parts[row["id"]] = _input_component(row)
        depends.setdefault(made["id"], []).append(row["id"])
    sources = [_source_component(n, row) for n, row in enumerate(facts.sources)]
    main = _component(p) | {"components": [_file(row) for row in p["files"]]}
    if facts.kind in MODELS:
        data = [{"ref": id} for id, part in parts.items() if part["type"] == "data"]
        main["modelCard"] = _model_card(facts, data + [{"ref": part["bom-ref"]} for part in sources])
    named = [p["id"], *parts]
    return dumps(
        {
            "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
            "bomFormat": "CycloneDX",
            "specVersion": "1.7",
            "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, p['id'])}",
            "version": 1,
            "metadata": {
                **({"timestamp": moment} if (moment := seconds(p.get("created"))) else {}),
                "tools": {"components": [{"type": "application", "name": "criadero", "version": _version(facts)}]},
                "component": main,
            },
            "components": [*parts.values(), *sources],
            "dependencies": [{"ref": id, "dependsOn": sorted(set(depends.get(id, [])))} for id in named],
            "formulation": [{"workflows": [_workflow(facts)]}],
        }
    )


def _version(facts: Facts) -> str:
    package = str((facts.table("step").get("code") or {}).get("package") or "unknown")
    return package.partition("==")[2] or package


def _licences(licence: str | None) -> dict[str, Any]:
    if not licence:
        return {}
    id = spdx_id(licence)
    return {"licenses": [{"license": {"id": id} if id else {"name": licence}}]}


def _properties(pairs: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {"name": f"criadero:{name}", "value": str(value)} for name, value in pairs.items() if value not in (None, "")
    ]
    return {"properties": rows} if rows else {}


def _component(one: Mapping[str, Any]) -> dict[str, Any]:
    """A sealed artifact as a component; its hash is its passport's id."""
    kind = str(one.get("kind"))
    data, step = one.get("data") or {}, one.get("step") or {}
    type = "machine-learning-model" if kind in MODELS else "data"
    facts = {
        "kind": kind, "passport": one["id"], "root": (one.get("merkle") or {}).get("root"), "doc_root": data.get("doc_root"),
        "parameters": (one.get("model") or {}).get("params"), "tokens": step.get("tokens"), "command": step.get("command"),
    }  # fmt: skip
    return {
        "type": type,
        "bom-ref": one["id"],
        "name": str(one.get("name")),
        "version": str(one.get("version") or "1"),
        "hashes": [{"alg": "SHA-256", "content": one["id"].removeprefix("sha256:")}],
        **_licences((one.get("licence") or {}).get("declared")),
        **({"data": [{"type": "dataset", "name": str(one.get("name"))}]} if kind == "dataset" else {}),
        **_properties(facts),
    }


def _input_component(row: Mapping[str, Any]) -> dict[str, Any]:
    """An input for which no passport vouches."""
    model = row.get("relation") in ("finetune_of", "merged_from", "quantised_from", "distilled_from", "converted_from")
    return {
        "type": "machine-learning-model" if model else "data",
        "bom-ref": row["id"],
        "name": str(row.get("name")),
        "hashes": [{"alg": "SHA-256", "content": row["id"].removeprefix("sha256:")}],
        **_licences(row.get("licence")),
        **_properties({"relation": row.get("relation"), "locator": row.get("locator"), "passport": "none"}),
    }


def _source_component(number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    name = str(row.get("name") or f"source {number}")
    links = [{"type": "source-distribution", "url": url} for url in urls_of(row)]
    facts = {"documents": row.get("documents_out", row.get("documents")), "tokens": row.get("tokens")}
    return {
        "type": "data",
        "bom-ref": f"source-{number}-{name}",
        "name": name,
        **({"supplier": {"name": str(row["attribution"])}} if row.get("attribution") else {}),
        **_licences(row.get("licence")),
        **({"externalReferences": links} if links else {}),
        "data": [{"type": "dataset", "name": name}],
        **_properties(facts),
    }


def _file(row: Mapping[str, Any]) -> dict[str, Any]:
    hashes = [{"alg": "SHA-256", "content": row["sha256"]}]
    return {"type": "file", "name": row["path"], "hashes": hashes, **_properties({"role": row.get("role")})}


def _model_card(facts: Facts, datasets: list[dict[str, Any]]) -> dict[str, Any]:
    model = facts.table("model")
    tuned = facts.base is not None
    card: dict[str, Any] = {
        "modelParameters": {
            "approach": {"type": "supervised" if tuned else "self-supervised"},
            "task": "text-generation",
            **({"architectureFamily": model["architecture"]} if "architecture" in model else {}),
            "datasets": datasets,
            "inputs": [{"format": one} for one in model.get("modalities") or ["text"]],
            "outputs": [{"format": "text"}],
        }
    }
    metrics = []
    for row in facts.passport["metrics"]:
        where = " ".join(str(row[key]) for key in ("suite", "slice") if row.get(key))
        metric = {"type": str(row.get("metric") or row.get("name")), "value": str(row["value"])}
        metric |= {"slice": where} if where else {}
        if row.get("ci"):
            low, high = map(str, row["ci"])
            metric |= {"confidenceInterval": {"lowerBound": low, "upperBound": high}}  # type: ignore[dict-item]
        metrics.append(metric)
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    used = []
    for name, energy in facts.energy():
        used.append(
            {
                "activity": "fine-tuning" if tuned and name == facts.name else "training",
                "energyProviders": [],
                "activityEnergyCost": {"value": float(energy["kwh"]), "unit": "kWh"},
                **_properties({"step": name, "method": energy.get("method"), "how": energy.get("how")}),
            }
        )
    if used:
        card["considerations"] = {"environmentalConsiderations": {"energyConsumptions": used}}
    return card


def _workflow(facts: Facts) -> dict[str, Any]:
    """How it was made: the step, as CycloneDX's formulation."""
    step = facts.table("step")
    flow: dict[str, Any] = {
        "bom-ref": f"workflow-{facts.passport['id']}",
        "uid": facts.passport["id"],
        "name": f"make {facts.name}",
        "taskTypes": ["build"],
        "steps": [{"commands": [{"executed": str(step.get("command") or "unknown")}]}],
    }
    for key, ours in (("timeStart", "started"), ("timeEnd", "ended")):
        if moment := seconds(step.get(ours)):
            flow[key] = moment
    seeds, code, hardware = (step.get(key) or {} for key in ("seeds", "code", "hardware"))
    return flow | _properties(
        {f"seed:{name}": value for name, value in seeds.items()}
        | {"commit": code.get("git"), "cpu": hardware.get("cpu"), "cores": hardware.get("cores")}
    )


# -- SPDX -------------------------------------------------------------------------------------------------------------

_RELATED = {
    "trained_on": "trainedOn", "evaluated_on": "testedOn", "contains": "contains", "finetune_of": "descendantOf",
    "merged_from": "descendantOf", "quantised_from": "descendantOf", "distilled_from": "descendantOf",
    "converted_from": "descendantOf", "trained_on_outputs_of": "trainedOn", "tokenizer_of": "dependsOn",
}  # fmt: skip


def spdx3(facts: Facts) -> str:
    """An SPDX 3.0.1 document (JSON-LD). It claims a profile only when it has all that the profile asks for."""
    p = facts.passport
    moment = seconds(p.get("created")) or "1970-01-01T00:00:00Z"
    space = f"urn:spdx.dev:criadero:{p['id'].removeprefix('sha256:')}:"
    info = "_:creation"

    def element(type: str, id: str, **fields: Any) -> dict[str, Any]:
        kept = {key: value for key, value in fields.items() if value not in (None, "", [])}
        return {"type": type, "spdxId": space + id, "creationInfo": info, **kept}

    agent = element("SoftwareAgent", "agent", name=f"criadero {_version(facts)}")
    made: list[dict[str, Any]] = []
    ids: dict[str, str] = {}
    for one in (p, *facts.ancestors):
        ids[one["id"]] = name = f"artifact-{one['id'][7:19]}"
        made.append(element(**_package(one), id=name))
    for _, row in facts.inputs():
        if row["id"] not in ids:
            ids[row["id"]] = name = f"input-{row['id'].removeprefix('sha256:')[:12]}"
            made.append(element("software_Package", name, name=str(row.get("name")), verifiedUsing=[_hash(row["id"])],
                                comment="no passport vouches for it"))  # fmt: skip
    for n, row in enumerate(p["files"]):
        made.append(element("software_File", f"file-{n}", name=row["path"], verifiedUsing=[_hash(row["sha256"])]))
    links: list[tuple[str, str, list[str]]] = []
    for one, row in facts.inputs():
        links.append((ids[one["id"]], _RELATED.get(str(row.get("relation")), "other"), [ids[row["id"]]]))
    files = [f"file-{n}" for n in range(len(p["files"]))]
    links += [(ids[p["id"]], "contains", files)] if files else []
    licences: dict[str, str] = {}
    declared = [(one["id"], (one.get("licence") or {}).get("declared")) for one in (p, *facts.ancestors)]
    declared += [(row["id"], row.get("licence")) for _, row in facts.inputs() if not row.get("verified")]
    for id, text in dict(declared).items():
        if not text:
            continue
        if text not in licences:
            licences[text] = name = f"licence-{len(licences)}"
            if known := spdx_id(text):
                made.append(element("simplelicensing_LicenseExpression", name, simplelicensing_licenseExpression=known))
            else:
                made.append(
                    element("simplelicensing_SimpleLicensingText", name, name=text, simplelicensing_licenseText=text)
                )
        links.append((ids[id], "hasDeclaredLicense", [licences[text]]))
    for n, (a, relation, b) in enumerate(dict.fromkeys((a, r, tuple(b)) for a, r, b in links)):
        made.append(element("Relationship", f"relationship-{n}", relationshipType=relation, to=[space + one for one in b],
                            **{"from": space + a}))  # fmt: skip
    document = element(
        "SpdxDocument", "document", name=f"{facts.name} passport", rootElement=[space + ids[p["id"]]],
        element=[one["spdxId"] for one in (agent, *made)], profileConformance=["core", "software", "simpleLicensing"],
        comment="The passport does not say suppliedBy, downloadLocation and releaseTime, which the AI and dataset profiles "
        "ask for: their conformance is not claimed.",
    )  # fmt: skip
    creation = {
        "type": "CreationInfo",
        "@id": info,
        "specVersion": "3.0.1",
        "created": moment,
        "createdBy": [agent["spdxId"]],
    }
    graph = [creation, agent, *made, document]
    return dumps({"@context": "https://spdx.org/rdf/3.0.1/spdx-context.jsonld", "@graph": graph})


def _hash(digest: str) -> dict[str, Any]:
    return {"type": "Hash", "algorithm": "sha256", "hashValue": digest.removeprefix("sha256:")}


def _package(one: Mapping[str, Any]) -> dict[str, Any]:
    """A sealed artifact as an AI, dataset or plain package; the hash is its passport's id."""
    kind, model, step, data = (one.get(key) or {} for key in ("kind", "model", "step", "data"))
    about: dict[str, Any] = {
        "name": str(one.get("name")),
        "software_packageVersion": str(one.get("version") or "1"),
        "builtTime": seconds(one.get("created")),
        "verifiedUsing": [_hash(one["id"])],
    }
    if kind in MODELS:
        energy = step.get("energy")
        about |= {
            "type": "ai_AIPackage",
            "software_primaryPurpose": "model",
            "ai_typeOfModel": [model["architecture"]] if "architecture" in model else [],
            "ai_hyperparameter": [
                _entry(key, model[key]) for key in sorted(model) if not isinstance(model[key], list | dict)
            ],
            "ai_metric": [_entry(_metric(row), row["value"]) for row in one.get("metrics") or []],
            "ai_informationAboutTraining": str(step.get("command") or ""),
        }
        if energy:
            used = {"type": "ai_EnergyConsumptionDescription", "ai_energyQuantity": float(energy["kwh"]),
                    "ai_energyUnit": "kilowattHour"}  # fmt: skip
            about["ai_energyConsumption"] = {"type": "ai_EnergyConsumption", "ai_trainingEnergyConsumption": [used]}
            about["comment"] = f"energy: {energy.get('method')} ({energy.get('how')})"
    elif kind == "dataset":
        about |= {
            "type": "dataset_DatasetPackage",
            "software_primaryPurpose": "data",
            "dataset_datasetType": ["text"],
            "dataset_datasetSize": count(data.get("document_rows")),
            "dataset_dataPreprocessing": sorted(
                {f"removed: {why}" for row in data.get("by_source") or [] for why in row.get("removed") or {}}
            ),
        }
    else:
        about |= {"type": "software_Package", "software_primaryPurpose": "data"}
    return about


def _metric(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[key]) for key in ("suite", "metric", "name", "slice") if row.get(key))


def _entry(key: str, value: Any) -> dict[str, Any]:
    return {"type": "DictionaryEntry", "key": key, "value": str(value)}
