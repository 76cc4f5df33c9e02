"""Exports of the passport, each against its schema or its library."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import criadero
from criadero.artifact import create, open_artifact
from criadero.errors import UserError
from criadero.trust import export_forms, openness
from criadero.trust.export import Facts, export, facts_of, is_open, spdx_id

FORMATS = ("cyclonedx", "spdx3", "croissant", "eu-summary", "model-doc", "hf-card", "in-toto", "openness")
TELL_WHY = ("quality_reason", "removal", "ungrounded", "unfit", "bad_answer")  # functions that give a reason


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a base trained on it, and an adapter of that, with everything that a passport can say."""
    root = tmp_path_factory.mktemp("family")
    (root / "raw.jsonl").write_text('{"text": "a"}\n')
    rows = [
        {"name": "stories", "licence": "CC-BY-4.0", "url": "https://example.org/a, https://example.org/b", "kind": "text",
         "attribution": "The authors", "documents_out": 3, "tokens": 90, "removed": {"short": 2}},
        {"name": "own | chats", "licence": "house rules", "url": "", "kind": "chat", "documents_out": 1, "tokens": 9, "removed": {}},
    ]  # fmt: skip
    with create(root / "data", kind="dataset", config={}) as draft:
        draft.add_input("contains", root / "raw.jsonl", licence="CC-BY-4.0")
        (draft.path / "train-00000.jsonl.zst").write_bytes(b"x")
        draft.data.update(by_source=rows, by_language={"en": {}, "es": {}}, document_rows=4)
        draft.data["removals"] = {"ledger": "removals.jsonl", "listed": 2, "removed": 1}
    with create(root / "base", kind="base", config={"lr": 0.1}, licence="Apache-2.0", seeds={"seed": 1}) as draft:
        draft.add_input("trained_on", root / "data")
        for name in ("model.safetensors", "config.json", "README.md"):
            (draft.path / name).write_text("{}")
        draft.data.update(by_source=rows)
        draft.model.update(architecture="llama", params=10_000_000, context=512, vocab=100, modalities=["text"])
        draft.step.update(tokens=1000, seconds=5)
        draft.metrics.append({"suite": "held_out", "metric": "loss", "slice": "en text", "value": 1.25, "n": 7})
        draft.metrics.append({"name": "speed", "value": 2, "ci": [1.5, 2.5]})
    with create(root / "tuned", kind="adapter", config={}, licence="house rules") as draft:
        draft.add_input("finetune_of", root / "base")
        draft.add_input("trained_on", root / "raw.jsonl")
        (draft.path / "adapter_model.safetensors").write_text("w")
        draft.model.update(params=10_000_000, trained_params=1000)
    return root


def read(family: Path, name: str, to: str) -> Any:
    return json.loads(export(family / name, to))


@pytest.mark.parametrize("version", ["1.7", "1.6"])
@pytest.mark.parametrize("name", ["data", "base", "tuned", "cria-chat"])
def test_cyclonedx_holds_to_its_schema(family: Path, name: str, version: str) -> None:
    schema = pytest.importorskip("cyclonedx.schema", reason="cyclonedx-python-lib is not installed")
    validation = pytest.importorskip("cyclonedx.validation.json")
    text = export(name if name == "cria-chat" else family / name, "cyclonedx")
    text = text.replace('"specVersion": "1.7"', f'"specVersion": "{version}"').replace("bom-1.7", f"bom-{version}")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.from_version(version))
    assert validator.validate_str(text) is None


def test_cyclonedx_says_what_the_passport_says(family: Path) -> None:
    bom = read(family, "base", "cyclonedx")
    main = bom["metadata"]["component"]
    parts = {part["bom-ref"]: part for part in bom["components"]}
    data, base = open_artifact(family / "data"), open_artifact(family / "base")
    assert bom["dependencies"][0] == {"ref": base.id, "dependsOn": [data.id]}
    assert (parts[data.id]["type"], main["type"]) == ("data", "machine-learning-model")
    assert main["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    card = main["modelCard"]
    assert {"ref": data.id} in card["modelParameters"]["datasets"]
    assert card["quantitativeAnalysis"]["performanceMetrics"][1]["confidenceInterval"] == {
        "lowerBound": "1.5",
        "upperBound": "2.5",
    }
    energy = card["considerations"]["environmentalConsiderations"]["energyConsumptions"][0]
    assert energy["activityEnergyCost"]["value"] == float(base.passport["step"]["energy"]["kwh"])
    assert any("estimate" in row["value"] or "rapl" in row["value"] for row in energy["properties"])
    source = next(part for part in bom["components"] if part["name"] == "stories")
    assert [link["url"] for link in source["externalReferences"]] == ["https://example.org/a", "https://example.org/b"]
    assert export(family / "base", "cyclonedx") == export(family / "base", "cyclonedx")


@pytest.mark.parametrize("name", ["data", "base", "tuned", "cria-chat"])
def test_spdx_is_read_by_its_library(family: Path, name: str) -> None:
    model = pytest.importorskip("spdx_python_model", reason="spdx-python-model is not installed").v3_0_1
    import io

    objects = model.SHACLObjectSet()
    text = export(name if name == "cria-chat" else family / name, "spdx3")
    model.JSONLDDeserializer().read(io.BytesIO(text.encode()), objects)  # types, names and cardinalities are checked
    assert not list(objects.missing_ids)
    model.JSONLDSerializer().write(objects, io.BytesIO())  # and what is required is there
    with pytest.raises(Exception, match="ai_nonsense"):
        model.JSONLDDeserializer().read(
            io.BytesIO(text.replace('"name"', '"ai_nonsense"', 1).encode()), model.SHACLObjectSet()
        )
    packages = list(objects.foreach_type("software_Package"))
    assert packages
    document = next(iter(objects.foreach_type("SpdxDocument")))
    assert "not claimed" in document.comment
    relations = {str(one.relationshipType).rpartition("/")[2] for one in objects.foreach_type("Relationship")}
    assert {"base": "trainedOn", "tuned": "descendantOf", "data": "contains", "cria-chat": "descendantOf"}[
        name
    ] in relations


def test_croissant_holds_to_the_rules(family: Path) -> None:
    """The rules of the 1.1 specification on required properties, and that every reference leads somewhere."""
    one = read(family, "data", "croissant")
    assert one["@type"] == "sc:Dataset"
    assert one["conformsTo"] == "http://mlcommons.org/croissant/1.1"
    required = {"@context", "@type", "name", "conformsTo", "description", "license", "url", "creator", "datePublished"}
    assert required - one.keys() == set(one["criadero:missing"]) == {"url", "creator", "datePublished"}
    prefixes = {key for key, value in one["@context"].items() if isinstance(value, str) and value.endswith(("/", "#"))}
    ids = {row["@id"] for row in one["distribution"]}
    for row in one["distribution"]:
        assert {"@type", "@id", "name", "contentUrl", "encodingFormat", "sha256"} <= row.keys()
        assert re.fullmatch(r"[0-9a-f]{64}", row["sha256"])
    for records in one["recordSet"]:
        assert records["@type"] == "cr:RecordSet"
        names = [field["@id"] for field in records["field"]]
        assert len(names) == len(set(names))
        for field in records["field"]:
            assert field["@type"] == "cr:Field"
            assert field["dataType"].partition(":")[0] in prefixes
            assert field["source"]["fileObject"]["@id"] in ids
            assert field["@id"].startswith(records["@id"] + "/")
    assert one["license"] == ["https://spdx.org/licenses/CC-BY-4.0.html", "house rules"]
    with pytest.raises(UserError, match="croissant describes a dataset"):
        export(family / "base", "croissant")


def test_the_provenance_statement_is_one(family: Path) -> None:
    statement = read(family, "tuned", "in-toto")
    one = open_artifact(family / "tuned")
    assert {row["name"]: row["digest"]["sha256"] for row in statement["subject"]} == {
        r["path"]: r["sha256"] for r in one.files
    }
    resolved = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert resolved[0]["digest"] == {"sha256": open_artifact(family / "base").id[7:]}
    library = pytest.importorskip("in_toto_attestation.v1.statement", reason="in-toto-attestation is not installed")
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    wrapped = library.Statement.copy_from_pb(json_format.ParseDict(statement, statement_pb2.Statement()))
    wrapped.validate()


@pytest.mark.parametrize(("lang", "marks"), [("en", ("MISSING", "What is missing")), ("es", ("FALTA", "Lo que falta"))])
def test_the_public_summary_names_what_is_missing(family: Path, lang: str, marks: tuple[str, str]) -> None:
    text = export(family / "tuned", "eu-summary", lang=lang)
    gaps = [line.partition("**: ")[0][4:] for line in text.splitlines() if line.startswith("- **") and marks[0] in line]
    listed = text.partition(f"## {marks[1]}")[2]
    assert len(gaps) >= 5
    assert all(f"- {gap}" in listed for gap in gaps)
    assert [f"{n}." in text for n in (1, 2, 3)] == [True] * 3
    for n in range(1, 7):
        assert f"### 2.{n} " in text
    assert "own / chats" in text
    assert "https://example.org/a https://example.org/b" in text
    assert {"en": "short 2", "es": "cortos 2"}[lang] in text
    both = [len(export(family / "tuned", "eu-summary", lang=one).splitlines()) for one in ("en", "es")]
    assert both[0] == both[1]


def reasons_given() -> set[str]:
    """Every reason for which `criadero.data` and `criadero.synth` leave a document out, from their sources."""
    found: set[str] = set()

    def values(one: ast.expr | None) -> None:
        if isinstance(one, ast.Constant) and isinstance(one.value, str):
            found.add(one.value)
        elif isinstance(one, ast.IfExp):
            values(one.body)
            values(one.orelse)

    package = Path(criadero.__file__).parent
    for file in [*(package / "data").glob("*.py"), *(package / "synth").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("drop"):
                values(node.args[-1] if node.args else None)
            elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "reason":
                values(node.value)
            elif isinstance(node, ast.FunctionDef) and node.name in TELL_WHY:
                for inner in ast.walk(node):
                    values(inner.value if isinstance(inner, ast.Return) else None)
    return found - {""}


def test_every_reason_has_its_spanish_words() -> None:
    given = reasons_given()
    assert len(given) > 45
    assert given == export_forms._REASONS.keys()
    words = [export_forms.reason(why, "es") for why in given]
    assert len(set(words)) == len(words)
    assert export_forms.reason("near_duplicate", "en") == "near duplicate"
    assert export_forms.reason("made_up", "es") == "made up"  # another version's


def test_the_model_documentation_form(family: Path) -> None:
    text = export(family / "base", "model-doc")
    base = open_artifact(family / "base")
    assert base.id in text
    assert base.files[0]["sha256"] in text or base.files[-1]["sha256"] in text
    assert "10,000,000 parameters (1 to 500 million)" in text
    assert "6e+10 FLOP" in text  # 6 x 1e7 x 1e3
    assert "estimate: 6 x parameters x tokens" in text
    assert text.count("MISSING") == len(text.partition("To be completed by the provider:")[2].strip().splitlines())
    with pytest.raises(UserError, match="model-doc describes a model"):
        export(family / "data", "model-doc")


@pytest.mark.parametrize("name", ["base", "tuned", "cria-chat"])
def test_the_hub_reads_the_card(family: Path, name: str) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    one = hub.ModelCard(export(name if name == "cria-chat" else family / name, "hf-card"))
    if name == "tuned":
        assert (one.data.license, one.data.to_dict()["license_name"]) == ("other", "house rules")
        assert (one.data.base_model, one.data.to_dict()["base_model_relation"]) == ("base", "adapter")
        assert one.data.library_name == "peft"
    if name == "base":
        assert (one.data.license, one.data.language) == ("apache-2.0", ["en", "es"])
        assert [(r.metric_type, r.metric_value) for r in one.data.eval_results] == [("loss", 1.25), ("speed", 2.0)]
    assert one.text.lstrip().startswith("# ")


def test_openness_is_computed(family: Path) -> None:
    found = read(family, "base", "openness")
    assert found["mof"] is None
    assert found["next"] == ["technical report"]
    assert {name: part["met"] for name, part in found["osaid"].items()} == {
        "data information": False, "code": True, "parameters": True,
    }  # fmt: skip
    assert found["osaid"]["data information"]["why"] == "no address: own | chats"
    facts = facts_of(open_artifact(family / "base"))
    more = dict(facts.passport) | {
        "files": [*facts.passport["files"], {"path": "paper.pdf", "sha256": "", "role": "other"}]
    }
    third = openness.grade(Facts(more, facts.ancestors))
    assert (third["mof"], third["next"]) == ("III Open Model", ["evaluation data"])
    closed = openness.grade(facts_of(open_artifact(family / "tuned")))
    assert closed["osaid"]["parameters"] == {"met": False, "why": "licence house rules: not known to be open"}
    assert "MOF class none" in openness.lines(facts)[0]


def test_old_passports_and_unknown_formats(family: Path) -> None:
    for to in FORMATS:
        if to != "croissant":
            assert export("cria", to)
    with pytest.raises(UserError, match="did you mean 'cyclonedx'"):
        export("cria", "cyclondx")
    with pytest.raises(UserError, match="en or es"):
        export("cria", "eu-summary", lang="fr")


def test_a_passport_that_lies_is_told_in_one_line(family: Path, tmp_path: Path) -> None:
    """Any value of a passport replaced by one of another kind: a text comes out, or a UserError of one line."""
    import random
    import shutil

    from criadero.passport import passport_id
    from criadero.recipe import canonical_json
    from criadero.summary import describe

    folder = shutil.copytree(family / "base", tmp_path / "base")
    whole = json.loads((folder / "passport.json").read_text())
    draw = random.Random(0)
    odd = [None, 7, "odd", [], {}, [[]], {"a": 1}, True, -1, "NaN", ["x"]]

    def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [way, *(place for key, one in inner for place in places(one, (*way, key)))]

    everywhere = [place for place in places(whole) if place]
    for _ in range(150):
        changed = json.loads(json.dumps(whole))
        *way, last = draw.choice(everywhere)
        table = changed
        for key in way:
            table = table[key]
        table[last] = draw.choice(odd)
        changed["id"] = passport_id(changed) if last != "id" else changed["id"]
        (folder / "passport.json").write_bytes(canonical_json(changed) + b"\n")
        for tell in (*(partial(export, folder, to) for to in FORMATS), partial(describe, folder)):
            with contextlib.suppress(UserError):
                assert tell()


@pytest.mark.parametrize(
    ("licence", "id", "free"),
    [
        ("CC BY 4.0", "CC-BY-4.0", True),
        ("cc-by-sa-3.0", "CC-BY-SA-3.0", True),
        ("Apache-2.0 / PSF-2.0", None, True),
        ("CC-BY-NC-4.0 OR MIT", None, True),
        ("CC BY-NC 4.0", "CC-BY-NC-4.0", False),
        ("llama2", None, False),
        ("Verdant-1.0", None, False),
        ("unknown", None, False),
        (None, None, False),
    ],
)
def test_licences_are_read_by_the_one_table_of_terms(licence: str | None, id: str | None, free: bool) -> None:
    assert (spdx_id(licence), is_open(licence)) == (id, free)


def test_the_model_form_names_what_the_base_read() -> None:
    text = export("cria-chat", "model-doc")
    assert "05-chats (Apache-2.0)" in text
    assert "eltec_spa (CC-BY-4.0, read by cria)" in text
