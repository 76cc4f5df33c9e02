"""Documents that people ask for: the EU's public summary of training content, the Model Documentation Form, the Hub's card.

Every field of a form stands in the output. What the passport does not say is marked as missing, and listed at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from criadero.card import card
from criadero.trust.export import Facts, count, seconds, spdx_id, urls_of

# -- the EU's public summary ------------------------------------------------------------------------------------------
# Template of the AI Office under Article 53(1)(d) of Regulation (EU) 2024/1689, C(2025) 8311. Structure and field names
# after the template; the wording is ours.

_EU: dict[str, dict[str, str]] = {
    "en": {
        "title": "Public summary of training content", "law": "Article 53(1)(d) of Regulation (EU) 2024/1689",
        "missing": "MISSING: the passport does not say", "missing_list": "What is missing",
        "missing_note": "These fields have to be completed by the provider before publication:", "none": "nothing",
        "s1": "1. General information", "s11": "1.1 Provider", "s12": "1.2 Model", "s13": "1.3 Training data as a whole",
        "provider": "Provider (name, contact)", "representative": "Authorised representative in the Union",
        "model": "Versioned model name", "id": "Identity (sha256 of the passport)", "dependencies": "Made from these models",
        "market": "Date of placement on the Union market", "sealed": "Made on", "modalities": "Modalities",
        "size": "Size of the text", "bands": "below 1 billion tokens|1 billion to 10 trillion tokens|more than 10 trillion tokens",
        "content": "Types of content", "latest": "Latest date of acquisition of data", "languages": "Languages",
        "chats": "chats", "texts": "documents", "s2": "2. Sources of data", "s21": "2.1 Publicly available datasets",
        "s22": "2.2 Private datasets licensed from third parties", "s23": "2.3 Data crawled and scraped", "s24": "2.4 User data",
        "s25": "2.5 Synthetic data", "s26": "2.6 Other sources", "crawler": "Crawler", "crawler_none":
        "This software has no crawler: every source was a file. Whether a source was crawled by others is not recorded.",
        "source": "source", "licence": "licence", "documents": "documents", "tokens": "tokens", "where": "address",
        "s3": "3. Data processing", "tdm": "Respect of reservations of rights (text and data mining opt-out)",
        "illegal": "Removal of illegal content", "other": "Other processing: documents removed, by reason",
        "removals": "Documents removed on request", "listed": "listed", "removed": "removed", "base_note":
        "Significant modification: this summary covers the data added to the model named above; the sources of that model stand "
        "in its own summary, and those known from the lineage are marked.", "read_by": "read by",
        "by_estimate": "from the passport's counts", "text": "text", "thousands": ",",
    },
    "es": {
        "title": "Resumen público del contenido de entrenamiento",
        "law": "Artículo 53, apartado 1, letra d), del Reglamento (UE) 2024/1689",
        "missing": "FALTA: no consta en el pasaporte", "missing_list": "Lo que falta",
        "missing_note": "El proveedor tiene que completar estos campos antes de publicar:", "none": "nada",
        "s1": "1. Información general", "s11": "1.1 Proveedor", "s12": "1.2 Modelo", "s13": "1.3 Los datos de entrenamiento en conjunto",
        "provider": "Proveedor (nombre, contacto)", "representative": "Representante autorizado en la Unión",
        "model": "Nombre del modelo con su versión", "id": "Identidad (sha256 del pasaporte)",
        "dependencies": "Hecho a partir de estos modelos",
        "market": "Fecha de introducción en el mercado de la Unión", "sealed": "Hecho el", "modalities": "Modalidades",
        "size": "Tamaño del texto",
        "bands": "menos de mil millones de tokens|de mil millones a 10 billones de tokens|más de 10 billones de tokens",
        "content": "Tipos de contenido", "latest": "Fecha más reciente de obtención de datos", "languages": "Lenguas",
        "chats": "conversaciones", "texts": "documentos", "s2": "2. Fuentes de los datos", "s21": "2.1 Conjuntos de datos públicos",
        "s22": "2.2 Conjuntos de datos privados con licencia de terceros", "s23": "2.3 Datos rastreados y extraídos de la red",
        "s24": "2.4 Datos de usuarios", "s25": "2.5 Datos sintéticos", "s26": "2.6 Otras fuentes", "crawler": "Rastreador",
        "crawler_none": "Este programa no tiene rastreador: cada fuente era un archivo. No consta si otros rastrearon alguna fuente.",
        "source": "fuente", "licence": "licencia", "documents": "documentos", "tokens": "tokens", "where": "dirección",
        "s3": "3. Tratamiento de los datos", "tdm": "Respeto de las reservas de derechos (minería de textos y datos)",
        "illegal": "Eliminación de contenido ilícito", "other": "Otros tratamientos: documentos eliminados, por motivo",
        "removals": "Documentos eliminados a petición", "listed": "en la lista", "removed": "eliminados", "base_note":
        "Modificación significativa: este resumen cubre los datos añadidos al modelo nombrado arriba; las fuentes de ese modelo "
        "constan en su propio resumen, y las que se conocen por el linaje van señaladas.", "read_by": "leída por",
        "by_estimate": "según las cuentas del pasaporte", "text": "texto", "thousands": "\u00a0",
    },
}  # fmt: skip
# why documents are left out (`criadero.data`, `criadero.synth`), as the Spanish form says it; in English a reason's name is its wording
_REASONS = {
    "alike": "demasiado parecidos a otros", "alphabetic": "pocas palabras con letras", "archaic": "lengua antigua",
    "bad_row": "fila mal formada", "beginning": "comienzo no admitido", "beyond_text": "piden algo más que texto",
    "blocked_word": "palabra excluida", "broken_encoding": "codificación dañada", "bullets": "casi todo son listas",
    "code": "código", "cut_off": "cortados", "duplicate": "duplicados", "duplicate_lines": "líneas repetidas",
    "duplicate_ngrams": "secuencias de palabras repetidas", "echo": "repiten la pregunta", "ellipses": "líneas sin terminar",
    "empty": "vacíos", "empty_turn": "turno vacío", "enough": "ya había bastantes", "hard": "difíciles de leer", "language": "otra lengua",
    "language_unknown": "lengua no reconocida", "long": "largos", "longer_than_context": "más largos que el contexto",
    "lorem_ipsum": "texto de relleno (lorem ipsum)", "many_turns": "demasiados turnos", "near_duplicate": "casi duplicados",
    "no_chat": "no son una conversación", "no_gain": "no aportan nada nuevo", "not_chosen": "no elegidos",
    "nothing_asked": "sin pregunta", "number": "número que no consta en el texto", "over_max_bytes": "por encima del máximo de bytes",
    "over_max_documents": "por encima del máximo de documentos", "pasted": "texto pegado", "program": "piden un programa",
    "prompt_words": "repiten las instrucciones dadas", "refers_to_text": "aluden al texto", "removal_request": "a petición",
    "repeated_paragraphs": "párrafos repetidos", "roles": "turnos en mal orden", "says_nothing": "no dicen nada", "short": "cortos",
    "sorry": "se excusan", "stop_words": "pocas palabras funcionales", "symbols": "demasiados símbolos",
    "top_ngram": "una misma expresión muy repetida", "unanswered": "sin respuesta", "ungrounded": "sin apoyo en el texto",
    "unparsable": "ilegibles", "unparsable_verdict": "veredicto ilegible", "word_length": "palabras de longitud inusual",
}  # fmt: skip


def reason(why: str, lang: str) -> str:
    """Why documents were left out, in words; a name that another version gave is told as it stands."""
    words = why.replace("_", " ")
    return _REASONS.get(why, words) if lang == "es" else words


def eu_summary(facts: Facts, lang: str = "en") -> str:
    """The public summary as Markdown, in English or Spanish, with what is missing named."""
    t, p, data = _EU[lang], facts.passport, facts.table("data")
    missing: list[str] = []
    lines = [f"# {t['title']}: {facts.name}", "", t["law"], ""]

    def field(label: str, value: str | None) -> None:
        lines.append(_filled(t[label], value, t["missing"], missing, t[label]))

    lines += [f"## {t['s1']}", "", f"### {t['s11']}", ""]
    supplier = p.get("supplier") or {}
    field("provider", ", ".join(str(supplier[key]) for key in ("name", "contact") if supplier.get(key)))
    field("representative", None)
    lines += ["", f"### {t['s12']}", ""]
    field("model", f"{facts.name} {p.get('version')}")
    field("id", p["id"])
    field("dependencies", f"{facts.base['name']} ({facts.base['id']})" if facts.base else t["none"])
    field("market", None)
    field("sealed", str(p.get("created"))[:10])
    if facts.base:
        lines += ["", t["base_note"]]
    lines += ["", f"### {t['s13']}", ""]
    field("modalities", ", ".join(t.get(one, one) for one in facts.table("model").get("modalities") or []))
    rows = facts.read
    tokens = sum(count(row.get("tokens")) or 0 for row, _ in rows)
    bands = t["bands"].split("|")
    band = bands[0 if tokens < 10**9 else 1 if tokens <= 10**13 else 2]
    field("size", f"{band} ({_n(tokens, t)}, {t['by_estimate']})" if tokens else None)
    kinds = {str(row.get("kind")) for row, _ in rows}
    field("content", ", ".join(t[name] for key, name in (("text", "texts"), ("chat", "chats")) if key in kinds))
    collected = data.get("collected") or []
    field("latest", str(collected[-1]) if collected else None)
    field("languages", ", ".join(facts.languages))
    lines += ["", f"## {t['s2']}", ""]
    public = [pair for pair in rows if urls_of(pair[0])]
    other = [pair for pair in rows if not urls_of(pair[0])]
    for key, listed in (("s21", public), ("s22", []), ("s23", []), ("s24", []), ("s25", []), ("s26", other)):
        lines += [f"### {t[key]}", ""]
        if key == "s23":
            lines += [t["crawler_none"], ""]
        elif listed:
            lines += _sources(listed, t)
        elif key in ("s22", "s24", "s25"):
            missing.append(t[key])
            lines += [t["missing"], ""]
        else:
            lines += [t["none"], ""]
    lines += [f"## {t['s3']}", ""]
    opt_out = data.get("opt_out") or {}
    field("tdm", ", ".join(f"{key}: {value}" for key, value in opt_out.items()))
    field("illegal", None)
    if removals := next((r for one in (p, *facts.ancestors) if (r := (one.get("data") or {}).get("removals"))), None):
        lines.append(f"- **{t['removals']}**: {removals['listed']} {t['listed']}, {removals['removed']} {t['removed']}")
    reasons: dict[str, int] = {}
    for row, _ in rows:
        removed = row.get("removed")
        for why, n in removed.items() if isinstance(removed, dict) else ():
            reasons[why] = reasons.get(why, 0) + int(n)
    field("other", ", ".join(f"{reason(why, lang)} {_n(n, t)}" for why, n in sorted(reasons.items())))
    return "\n".join(lines + _missing(missing, t["missing_list"], t["missing_note"])) + "\n"


def _filled(label: str, value: str | None, absent: str, missing: list[str], listed: str) -> str:
    """One field of a form; an empty one is added to what is missing, under the name `listed`."""
    if not value:
        missing.append(listed)
    return f"- **{label}**: {value or absent}"


def _sources(rows: list[Any], t: Mapping[str, str]) -> list[str]:
    lines = [
        f"| {t['source']} | {t['licence']} | {t['documents']} | {t['tokens']} | {t['where']} |",
        "|---|---|---|---|---|",
    ]
    for row, by in rows:
        name = str(row.get("name")) + (f" ({t['read_by']} {by})" if by else "")
        documents = count(row.get("documents_out", row.get("documents")))
        cells = (
            name,
            row.get("licence") or "?",
            _n(documents, t),
            _n(count(row.get("tokens")), t),
            " ".join(urls_of(row)),
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    return [*lines, ""]


def _n(number: int | None, t: Mapping[str, str]) -> str:
    return "?" if number is None else f"{number:,}".replace(",", t["thousands"])


def _missing(names: list[str], title: str, note: str) -> list[str]:
    return ["", f"## {title}", "", note, "", *(f"- {name}" for name in names)] if names else []


# -- the Code of Practice's Model Documentation Form ------------------------------------------------------------------

_ABSENT = "MISSING: the passport does not say"


def model_doc(facts: Facts) -> str:
    """The Model Documentation Form (General-Purpose AI Code of Practice, July 2025, transparency chapter) as Markdown."""
    p, model, step, data = facts.passport, facts.table("model"), facts.table("step"), facts.table("data")
    missing: list[str] = []
    lines = [f"# Model documentation form: {facts.name}", ""]
    supplier = p.get("supplier") or {}
    weights = [row for row in p["files"] if row.get("role") == "weights"]
    params = count(model.get("params"))
    read = sum(count((one.get("step") or {}).get("tokens")) or 0 for one in facts.chain)
    computing = sum(float((one.get("step") or {}).get("seconds") or 0) for one in facts.chain)
    whole = all(row.get("relation") != "finetune_of" or row.get("verified") for _, row in facts.inputs())
    energy = facts.energy()
    use = p.get("use") or {}
    by_model = facts.read or [(row, None) for row in facts.sources]
    sources = [row for row, _ in by_model]
    filters = sorted({str(why) for row in sources for why in (row.get("removed") or {})})
    shape = [
        f"{key.replace('_', ' ')} {model[key]}" for key in sorted(model) if not isinstance(model[key], list | dict)
    ]
    authentic = f"passport {p['id']}" + "".join(f"; {row['path']} sha256 {row['sha256']}" for row in weights)
    sections: list[tuple[str, list[tuple[str, str | None]]]] = [
        ("General information", [
            ("Legal name of the model provider", supplier.get("name")),
            ("Model name and version", f"{facts.name} {p.get('version')}"),
            ("Model authenticity", authentic),
            ("Release date", None),
            ("Union market release date", None),
            ("Model dependencies", f"{facts.base['name']} ({facts.base['id']})" if facts.base else "none: trained from random weights"),
        ]),
        ("Model properties", [
            ("Model architecture", f"{model['architecture']}, decoder-only transformer" if "architecture" in model else None),
            ("Design specifications", ", ".join(shape)),
            ("Input modalities", ", ".join(model.get("modalities") or []) or None),
            ("Maximum input", f"{model['context']} tokens" if "context" in model else None),
            ("Output modalities", "text"),
            ("Maximum output", f"{model['context']} tokens with the input" if "context" in model else None),
            ("Total model size", f"{_two(params)} parameters ({_band(params)})" if params else None),
        ]),
        ("Methods of distribution and licences", [
            ("Distribution channels", None),
            ("Licence", facts.licence),
            ("Licences of the data", "; ".join(sorted({str(row.get("licence")) for row in sources})) or None),
        ]),
        ("Use", [
            ("Acceptable use policy", use.get("policy")),
            ("Intended uses", "; ".join(use.get("intended") or []) or None),
            ("Uses that are excluded", "; ".join(use.get("limits") or []) or None),
            ("Type and nature of AI systems for integration", None),
            ("Technical means for integration", "safetensors weights, tokenizer.json, chat_template.jinja; criadero or transformers"),
            ("Required hardware", None),
            ("Required software", str((step.get("code") or {}).get("package") or "") or None),
        ]),
        ("Training process", [
            ("Design specifications of the training process", json.dumps(step.get("config") or {}, ensure_ascii=False)),
            ("Command", step.get("command")),
            ("Decision rationale", None),
        ]),
        ("Data used for training, testing and validation", [
            ("Type and modality", "text" if sources else None),
            ("Provenance", "; ".join(_provenance(row, by) for row, by in by_model) or None),
            ("How data were obtained and selected", f"files named by the recipe; removed by: {', '.join(filters)}" if filters else None),
            ("Number of data points", _points(data, sources)),
            ("Scope and main characteristics", f"languages: {', '.join(facts.languages)}" if facts.languages else None),
            ("Measures to detect unsuitable sources", None),
            ("Measures to detect identifiable biases", None),
        ]),
        ("Computational resources", [
            ("Training time", f"{_two(round(computing))} s of wall-clock computing" if computing else None),
            ("Amount of computation", f"{6 * params * read:.2g} FLOP" if params and read and whole else None),
            ("Methodology", "estimate: 6 x parameters x tokens trained on, over this model and those it was made of"
             if params and read and whole else None),
            ("Hardware", _hardware(step)),
        ]),
        ("Energy consumption of training", [
            ("Amount", f"{sum(float(one['kwh']) for _, one in energy):.2g} kWh" if energy else None),
            ("Methodology", "; ".join(f"{name}: {one.get('method')}, {one.get('how')}" for name, one in energy) or None),
        ]),
    ]  # fmt: skip
    for title, fields in sections:
        lines += [f"## {title}", ""]
        lines += [_filled(label, value, _ABSENT, missing, f"{title}: {label}") for label, value in fields]
        lines.append("")
    return "\n".join(lines[:-1] + _missing(missing, "What is missing", "To be completed by the provider:")) + "\n"


def _provenance(row: Mapping[str, Any], by: str | None) -> str:
    licence = row.get("licence") or "licence unknown"
    return f"{row.get('name')} ({licence}{f', read by {by}' if by else ''})"


def _two(number: int | None) -> str:
    """To two significant figures, as the form asks."""
    return "?" if number is None else f"{int(float(f'{number:.2g}')):,}"


def _band(params: int | None) -> str:
    for limit, text in ((500e6, "1 to 500 million"), (5e9, "500 million to 5 billion"), (15e9, "5 to 15 billion"),
                        (50e9, "15 to 50 billion"), (100e9, "50 to 100 billion"), (500e9, "100 to 500 billion"),
                        (1e12, "500 billion to 1 trillion")):  # fmt: skip
        if (params or 0) <= limit:
            return text
    return "more than 1 trillion"


def _points(data: Mapping[str, Any], sources: list[Mapping[str, Any]]) -> str | None:
    documents = sum(count(row.get("documents_out", row.get("documents"))) or 0 for row in sources)
    tokens = sum(count(row.get("tokens")) or 0 for row in sources)
    return f"{_two(documents)} documents, {_two(tokens)} tokens" if documents else None


def _hardware(step: Mapping[str, Any]) -> str | None:
    hardware = step.get("hardware") or step.get("env") or {}
    parts = [str(hardware.get("cpu") or ""), f"{hardware['cores']} cores" if "cores" in hardware else ""]
    return ", ".join(part for part in [*parts, *hardware.get("gpus", [])] if part) or None


# -- the Hub's model card ---------------------------------------------------------------------------------------------

_BASE_RELATION = {
    "finetune_of": "finetune", "merged_from": "merge", "quantised_from": "quantized", "converted_from": "quantized",
}  # fmt: skip


def hf_card(facts: Facts) -> str:
    """A ``README.md`` for the Hugging Face Hub: its metadata (with licence, base, datasets and results), then our card."""
    p = facts.passport
    base = facts.base
    body = card(
        name=facts.name, kind=facts.kind, licence=facts.licence, base=str(base["name"]) if base else None,
        model=facts.table("model"), data=dict(facts.table("data")) | {"by_source": facts.sources},
        step=facts.table("step"), metrics=p["metrics"],
    ).split("---\n", 2)[2]  # fmt: skip
    known = spdx_id(facts.licence)
    head = [f"license: {known.lower() if known else 'other'}"]
    if facts.licence and not known:
        head += [f"license_name: {_yaml(facts.licence)}"]
    head += ["language:", *(f"- {code}" for code in facts.languages)] if facts.languages else []
    head += [f"library_name: {'peft' if facts.kind == 'adapter' else 'transformers'}", "pipeline_tag: text-generation"]
    if base:
        relation = "adapter" if facts.kind == "adapter" else _BASE_RELATION.get(str(base.get("relation")), "finetune")
        head += [f"base_model: {_yaml(str(base['name']))}", f"base_model_relation: {relation}"]
    head += ["tags:", "- llama", "- criadero", f"- {_yaml('passport:' + p['id'])}"]
    if p["metrics"]:
        results = [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": str(row.get("slice") or row.get("suite") or "all"), "type": str(row.get("suite") or "own")},
                "metrics": [{"type": str(row.get("metric") or row.get("name")), "value": float(row["value"])}],
            }
            for row in p["metrics"]
        ]  # fmt: skip
        head += ["model-index:", "- " + json.dumps({"name": facts.name, "results": results}, ensure_ascii=False)]
    made = seconds(p.get("created"))
    return "---\n" + "\n".join(head) + "\n---\n" + body + (f"\nSealed {made}.\n" if made else "")


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON strings are YAML
