"""Croissant 1.1 (https://docs.mlcommons.org/croissant/docs/croissant-spec.html): a dataset as JSON-LD that loaders read."""

from __future__ import annotations

from typing import Any

from criadero.trust.export import Facts, dumps, spdx_id, urls_of

CONTEXT: dict[str, Any] = {
    "@language": "en", "@vocab": "https://schema.org/", "arrayShape": "cr:arrayShape", "citeAs": "cr:citeAs",
    "column": "cr:column", "conformsTo": "dct:conformsTo", "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty", "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract", "field": "cr:field", "fileObject": "cr:fileObject", "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes", "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath", "key": "cr:key", "md5": "cr:md5",
    "parentField": "cr:parentField", "path": "cr:path", "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated",
    "replace": "cr:replace", "samplingRate": "cr:samplingRate", "sc": "https://schema.org/", "separator": "cr:separator",
    "source": "cr:source", "subField": "cr:subField", "transform": "cr:transform",
    "criadero": "https://pypi.org/project/criadero/#",
}  # fmt: skip
# What the specification asks for (schema.org level) and a passport may lack.
REQUIRED = ("description", "license", "url", "creator", "datePublished")
_FIELDS = {
    "id": "the document's id in its source", "lang": "language, ISO 639-1", "source": "name of the source",
    "licence": "licence of this document",
}  # fmt: skip


def croissant(facts: Facts) -> str:
    """A dataset's splits, fields and sources. What Croissant asks for and the passport lacks is named in ``criadero:missing``."""
    p, data = facts.passport, facts.table("data")
    shards = [row for row in p["files"] if row.get("role") == "documents" and "-" in row["path"]]
    kinds = {str(row.get("kind")) for row in facts.sources}
    licences = sorted({str(row["licence"]) for row in facts.sources if row.get("licence")})
    about: dict[str, Any] = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "name": facts.name,
        "description": _describe(facts),
        "version": str(p.get("version") or "1"),
        "dateCreated": str(p.get("created"))[:10],
        "identifier": p["id"],
        "inLanguage": facts.languages,
        "license": [f"https://spdx.org/licenses/{id}.html" if (id := spdx_id(one)) else one for one in licences],
        "isBasedOn": [
            {
                "@type": "sc:CreativeWork",
                "name": str(row.get("name")),
                **({"url": urls_of(row)} if urls_of(row) else {}),
                **({"license": str(row["licence"])} if row.get("licence") else {}),
                **({"creditText": str(row["attribution"])} if row.get("attribution") else {}),
            }
            for row in facts.sources
        ],
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": row["path"],
                "name": row["path"],
                "contentUrl": row["path"],
                "contentSize": f"{row.get('size', 0)} B",
                "encodingFormat": "application/jsonlines",
                "sha256": row["sha256"],
            }
            for row in shards
        ],
        "recordSet": [_records(row["path"], kinds) for row in shards],
        "rai:dataPreprocessingProtocol": _removed(facts),
    }
    if data.get("removals"):
        about["rai:dataReleaseMaintenancePlan"] = (
            f"{data['removals']['removed']} documents were removed on request; removals.jsonl lists them by hash"
        )
    about = {key: value for key, value in about.items() if value not in (None, "", [])}
    if missing := [name for name in REQUIRED if name not in about]:
        about["criadero:missing"] = missing
    return dumps(about)


def _describe(facts: Facts) -> str:
    data = facts.table("data")
    documents = data.get("document_rows") or sum(int(row.get("documents_out", 0)) for row in facts.sources)
    languages = ", ".join(facts.languages) or "languages not stated"
    return (
        f"{documents:,} documents ({languages}) of {len(facts.sources)} sources, built by Criadero; the shards are Zstandard-"
        "compressed JSON Lines, and documents.jsonl.zst lists each document with its source, licence and hash."
    )


def _records(path: str, kinds: set[str]) -> dict[str, Any]:
    name = path.partition("-")[0]

    def field(key: str, about: str) -> dict[str, Any]:
        source = {"fileObject": {"@id": path}, "extract": {"jsonPath": f"$.{key}"}}
        return {"@type": "cr:Field", "@id": f"{name}/{key}", "name": key, "description": about, "dataType": "sc:Text",
                "source": source}  # fmt: skip

    fields = [field(key, about) for key, about in _FIELDS.items()]
    if kinds != {"chat"}:
        fields.append(field("text", "the document's text"))
    if "chat" in kinds:
        fields.append(field("messages", "a chat's turns: role and content, as JSON"))
    return {"@type": "cr:RecordSet", "@id": name, "name": name, "description": f"the {name} split", "field": fields}


def _removed(facts: Facts) -> list[str]:
    total: dict[str, int] = {}
    for row in facts.sources:
        for why, n in (row.get("removed") or {}).items():
            total[why] = total.get(why, 0) + int(n)
    return [f"{why}: {n:,} documents removed" for why, n in sorted(total.items())]
