"""A report on licences as text for people, in English or Spanish, and as JSON for programs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from criadero.errors import UserError
from criadero.trust.licence_names import key_of, rules_id, short_name, title_of
from criadero.trust.licence_rules import Finding
from criadero.trust.licence_words import (
    DISCLAIMER,
    EFFECTS,
    HEADS,
    PHRASES,
    RELATIONS,
    UNSETTLED,
    VERDICTS,
    WORDS,
)
from criadero.trust.licences import Report

LANGUAGES = ("en", "es")
_WIDTH = 110


def words_of(finding: Finding, lang: str = "en") -> tuple[str, str]:
    """(reason, what to do) of a finding in a language."""
    values: dict[str, str] = dict(finding.values)
    key = key_of(finding.licence)
    near = values.get("near")
    values |= {
        "licence": title_of(key) if key else finding.licence,
        "id": short_name(key) if key else finding.licence,
        "source": _short(finding.source),
        "near_en": f"; did you mean {near}?" if near else "",
        "near_es": f"; ¿querías decir {near}?" if near else "",
    }
    reason, todo = (text.format_map(values) for text in WORDS[finding.rule][lang])
    if finding.severity == "note" and values.get("way") == "learned" and finding.rule != "results-free":
        reason = UNSETTLED[lang] + reason
    return reason, todo


def _short(name: str) -> str:
    """``tech_docs_es/tech_docs_es.jsonl.zst``, a file of a source, is called by its source."""
    return name.split("/")[0] or name


def way_there(finding: Finding, lang: str = "en") -> str:
    """``cria-chat <- finetune of <- cria``: from the artifact to the input that a finding comes from."""
    said = RELATIONS if lang == "es" else {}
    steps = [said.get(step, step.replace("_", " ")) if n % 2 else _short(step) for n, step in enumerate(finding.path)]
    return " <- ".join(steps)


def as_dict(report: Report, lang: str = "en") -> dict[str, Any]:
    """The report for JSON: verdict, exit code, rules, what was asked, and each finding with its words."""
    asked = report.intent
    rows = []
    for one in report.findings:
        reason, todo = words_of(one, lang)
        row = {"severity": one.severity, "rule": one.rule, "licence": one.licence, "clause": one.clause}
        more = {"source": one.source, "path": list(one.path), "reason": reason, "fix": todo}
        rows.append({**row, **more, "done": one.done, "fixable": one.fixable})
    return {
        "name": report.name,
        "verdict": report.verdict,
        "exit": report.exit_code,
        "declared": report.declared or None,
        "binding": list(report.computed),
        "rules": rules_id(),
        "asked": {
            "commercial": asked.commercial,
            "distribute": asked.distribute,
            "mau": dict(asked.mau),
            "region": asked.region,
            "end_user": asked.end_user,
            "data_effect": asked.data_effect,
        },
        "findings": rows,
        "note": DISCLAIMER[lang],
    }


def check_language(lang: str) -> str:
    """UserError for a language that there are no words in."""
    if lang not in LANGUAGES:
        raise UserError(f"--lang {lang!r}: there are words in {' and '.join(LANGUAGES)} only")
    return lang


def describe(report: Report, lang: str = "en") -> str:
    """The report for a terminal: what was asked, then findings by severity, alike ones together, and the verdict."""
    asked, say = report.intent, {key: phrase[lang] for key, phrase in PHRASES.items()}
    declared = report.declared or say["nothing"]
    lines = [f"{report.name}: {VERDICTS[report.verdict][lang]}", f"{say['declared']}: {declared}"]
    about = [say["commercial"] if asked.commercial else say["not commercial"]]
    about.append(say["shared"] if asked.distribute else say["kept"])
    about += [f"{say['region']} {asked.region}"] if asked.region else []
    about += [say["product"]] if asked.end_user else []
    lines.append(f"{say['asked']}: {', '.join(about)}")
    lines.append(f"{say['data']}: {EFFECTS[asked.data_effect][lang]}")
    done = [one for one in report.findings if one.severity == "duty" and one.done]
    for head, found in (
        ("conflict", [one for one in report.findings if one.severity == "conflict"]),
        ("unknown", [one for one in report.findings if one.severity == "unknown"]),
        ("duty", [one for one in report.findings if one.severity == "duty" and not one.done]),
        ("done", done),
        ("note", [one for one in report.findings if one.severity == "note"]),
    ):
        if found:
            lines += ["", HEADS[head][lang]]
            for group in _groups(found):
                lines += _group_lines(group, lang, head)
    lines += ["", *textwrap.wrap(DISCLAIMER[lang], _WIDTH)]
    return "\n".join(lines)


def _groups(found: list[Finding]) -> list[list[Finding]]:
    """Findings that differ only in their source stand together."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for one in found:
        text = tuple(value for name, value in one.values if name != "credit") if _apart(one) else ()
        groups.setdefault((one.rule, one.licence, one.clause, str(one.done), *text), []).append(one)
    return list(groups.values())


def _apart(one: Finding) -> bool:
    return one.rule != "attribution"


def _group_lines(group: list[Finding], lang: str, head: str) -> Iterator[str]:
    first, say = group[0], {key: phrase[lang] for key, phrase in PHRASES.items()}
    reason, todo = words_of(first, lang)
    key = key_of(first.licence)
    licence = title_of(key) if key else first.licence
    clause = f", {say['clause']} {first.clause}" if first.clause else ""
    yield from textwrap.wrap(
        (f"{licence}{clause}: " if licence and key else "") + reason,
        _WIDTH,
        initial_indent="  - ",
        subsequent_indent="    ",
    )
    brief = head in ("done", "note")
    width = max(len(say["from"]), len(say["fix"])) + 2
    names = ", ".join(sorted({_short(one.source) for one in group}))
    whence = names if brief or len(group) > 1 else way_there(first, lang) if len(first.path) > 1 else ""
    if whence and whence not in reason:
        yield from textwrap.wrap(
            whence, _WIDTH, initial_indent="      " + say["from"].ljust(width), subsequent_indent=" " * (6 + width)
        )
    if todo and not all(one.done for one in group):
        how = say["fix text" if first.rule in ("agreement", "keep-text") else "fix it"]
        fix = f" ({how})" if any(one.fixable for one in group) else ""
        yield "      " + say["fix"].ljust(width) + todo + fix
