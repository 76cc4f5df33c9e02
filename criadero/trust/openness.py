"""How open a model is, computed from what lies in its folder: the Model Openness Framework's class, and OSAID 1.0's three parts.

MOF: White et al. 2024, "The Model Openness Framework", arXiv 2403.13784 (Class III Open Model, II Open Tooling, I Open Science; a
class holds all components of the classes below it). OSAID: the Open Source Initiative's Open Source AI Definition 1.0. A component
counts when it is there, or named so that it can be had, under a licence that we know to be open; what is not known does not count.
"""

from __future__ import annotations

from typing import Any

from criadero.trust.export import MODELS, Facts, dumps, is_open, urls_of

_CODE = "criadero, Apache-2.0, of the version and commit that the passport names"
CLASSES: dict[str, tuple[str, ...]] = {
    "III Open Model": (
        "model architecture", "final parameters", "technical report", "evaluation results", "model card", "data card",
    ),
    "II Open Tooling": (
        "training code", "inference code", "evaluation code", "evaluation data", "supporting libraries and tools",
    ),
    "I Open Science": ("research paper", "datasets", "data preprocessing code", "intermediate checkpoints"),
}  # fmt: skip


def components(facts: Facts) -> dict[str, tuple[bool, str]]:
    """Each component of the framework: whether it counts, and why."""
    p = facts.passport
    roles = {str(row.get("role")) for row in p["files"]}
    names = {row["path"].rpartition("/")[2].lower() for row in p["files"]}
    ours = bool((facts.table("step").get("code") or {}).get("package"))
    open_weights = is_open(facts.licence)
    whole = facts.kind in MODELS and "weights" in roles
    sources = facts.all_sources
    closed = sorted({str(row.get("licence")) for row in sources if not is_open(row.get("licence"))})
    unreachable = [str(row.get("name")) for row in sources if not urls_of(row)]
    unknown = [str(row.get("name")) for made, row in facts.inputs()
               if not row.get("verified") and row.get("relation") in ("finetune_of", "merged_from", "converted_from")]  # fmt: skip
    code = (ours, _CODE if ours else "the passport names no code")
    held_out = [row for row in p["metrics"] if row.get("suite") == "held_out"]
    data_card = bool(sources) and not unknown

    def file(*stems: str) -> tuple[bool, str]:
        found = sorted(name for name in names if name.startswith(stems))
        return (True, found[0]) if found else (False, f"no file named {' or '.join(stems)}*")

    return {
        "model architecture": (whole and "config" in roles and ours, f"config.json, and {_CODE}" if ours else code[1]),
        "final parameters": (
            bool(whole and open_weights),
            f"weights under {facts.licence}" if open_weights else f"licence {facts.licence or 'not declared'}: not known to be open",
        ),
        "technical report": file("technical-report", "technical_report", "report", "paper"),
        "evaluation results": (bool(p["metrics"]), f"{len(p['metrics'])} metrics" if p["metrics"] else "no metrics"),
        "model card": ("card" in roles, "README.md" if "card" in roles else "no README.md"),
        "data card": (data_card, f"{len(sources)} sources by licence, documents and tokens" if data_card else
                      f"the data of {unknown[0]} is not known" if unknown else "no table of sources"),
        "training code": code,
        "inference code": code,
        "evaluation code": code,
        "evaluation data": (False, "held-out part of the dataset artifact, not in this folder" if held_out else "not named"),
        "supporting libraries and tools": (
            bool((facts.table("step").get("env") or {}).get("packages")), "versions in step.env; each is open source",
        ),
        "research paper": file("paper"),
        "datasets": (
            bool(sources) and not closed and not unreachable and not unknown,
            "every source has an open licence and an address" if sources and not closed and not unreachable and not unknown
            else _why_not(sources, closed, unreachable, unknown),
        ),
        "data preprocessing code": code,
        "intermediate checkpoints": (False, "none in the folder"),
    }  # fmt: skip


def _why_not(sources: list[Any], closed: list[str], unreachable: list[str], unknown: list[str]) -> str:
    if unknown:
        return f"the data of {unknown[0]} is not known"
    if closed:
        return "licence not known to be open: " + ", ".join(closed[:3])
    return f"no address: {', '.join(unreachable[:3])}" if unreachable else "no table of sources"


def grade(facts: Facts) -> dict[str, Any]:
    """``mof`` (the class, or None), ``next`` (what the next class lacks), ``components``, ``osaid`` (three parts with reasons)."""
    found = components(facts)
    reached, lacking = None, []
    for name, needed in CLASSES.items():
        lacking = [one for one in needed if not found[one][0]]
        if lacking:
            break
        reached = name
    rows = [{"component": name, "counts": ok, "why": why} for name, (ok, why) in found.items()]
    data_ok, data_why = found["data card"]
    if data_ok and (unreachable := [str(row.get("name")) for row in facts.all_sources if not urls_of(row)]):
        data_ok, data_why = False, f"no address: {', '.join(unreachable[:3])}"  # nobody could get that data
    code_ok = all(found[one][0] for one in ("training code", "inference code", "data preprocessing code"))
    return {
        "mof": reached,
        "next": lacking,
        "components": rows,
        "osaid": {
            "data information": {"met": data_ok, "why": data_why},
            "code": {"met": code_ok, "why": found["training code"][1]},
            "parameters": {"met": found["final parameters"][0], "why": found["final parameters"][1]},
        },
    }


def openness(facts: Facts) -> str:
    """The grade as JSON."""
    return dumps({"name": facts.name, "id": facts.passport["id"], **grade(facts)})


def lines(facts: Facts) -> list[str]:
    """The grade in a few lines of text, for `criadero show`."""
    found = grade(facts)
    parts = ", ".join(f"{name} {'yes' if part['met'] else 'no'}" for name, part in found["osaid"].items())
    lacks = f" (the next class lacks: {', '.join(found['next'])})" if found["next"] else ""
    return [f"MOF class {found['mof'] or 'none'}{lacks}", f"OSAID: {parts}"]
