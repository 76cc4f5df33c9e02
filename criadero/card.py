"""The model card: ``README.md`` of a model folder, computed from what its passport will say, in Hugging Face's format.

Nothing in it is claimed that a run did not measure or record; what is not known is called unknown. A recipe may name a text
(``card``) that its makers wrote; it stands under "In the makers' words".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from criadero.artifact import Draft

# Identifiers that Hugging Face's card metadata knows, by how licences are written here; others become "other".
HF_LICENCES = {
    "apache-2.0": "apache-2.0", "mit": "mit", "cc-by-4.0": "cc-by-4.0", "cc-by-sa-4.0": "cc-by-sa-4.0",
    "cc-by-sa-3.0": "cc-by-sa-3.0", "cc0-1.0": "cc0-1.0", "bsd-3-clause": "bsd-3-clause", "llama2": "llama2",
    "cc-by-nc-4.0": "cc-by-nc-4.0",
}  # fmt: skip


def expectations(params: int, tokens: int) -> list[str]:
    """What a model of this size, trained on this much, can be expected to do, in plain words."""
    if params < 100_000_000:
        return [
            "Can: write short grammatical sentences like those it has read; learn a narrow task, such as the fixed answers of a "
            "shop's assistant, from a few hundred examples.",
            "Cannot: know facts, count, reason, translate, keep a long conversation together. It will state untrue things fluently.",
            *([f"It has read {tokens:,} tokens. For comparison, Llama 2 read 2,000,000,000,000."] if tokens else []),
        ]
    return [
        "Its abilities were not measured beyond the figures below; like any language model it can state untrue things fluently."
    ]


def card(
    *, name: str, kind: str, licence: str | None, base: str | None, model: Mapping[str, Any], data: Mapping[str, Any],
    step: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], words: str | None = None,
) -> str:  # fmt: skip
    """The card's text. ``base`` is the name of the model this was made from; the tables are the passport's."""
    rows = list(data.get("by_source", []))
    languages = sorted(data.get("by_language") or {})
    known = HF_LICENCES.get((licence or "").lower())
    head = ["---", f"license: {known or 'other'}"]
    if licence and not known:
        head.append(f"license_name: {licence}")
    head += ["language:", *(f"- {code}" for code in languages)] if languages else []
    head += [
        "library_name: transformers" if kind != "adapter" else "library_name: peft",
        "pipeline_tag: text-generation",
    ]
    head += [f"base_model: {base}"] if base else []
    head += ["tags:", "- llama", "- criadero", "---"]
    shape = f"A Llama of {model.get('params', 0):,} parameters, context {model.get('context')} tokens, vocabulary {model.get('vocab')}."
    made = f"Made from `{base}`." if base else "Trained from random weights."
    if kind == "adapter":
        shape = f"A low-rank adapter ({model.get('trained_params', 0):,} weights) for `{base}`."
        made = "It needs that base model to run."
    lines = [
        *head,
        "",
        f"# {name}",
        "",
        f"{shape} {made} Raised with [Criadero](https://pypi.org/project/criadero/).",
        "",
    ]
    lines += [
        "## What to expect",
        "",
        *(
            f"- {text}"
            for text in expectations(int(model.get("params", 0)), int(step.get("tokens_in_all", step.get("tokens", 0))))
        ),
    ]
    if words:
        lines += ["", "## In the makers' words", "", words.strip()]
    if metrics:
        lines += ["", "## Measured", "", "| what | on | value | n |", "|---|---|---|---|"]
        for row in metrics:
            value = float(row["value"])
            where = f"{row.get('suite', '')} {row.get('slice', '')}".strip().replace("_", " ")
            lines.append(
                f"| {str(row.get('metric') or row.get('name')).replace('_', ' ')} | {where} | {value:.4g} | {row.get('n', '')} |"
            )
    lines += ["", "## Made of", ""]
    if rows:
        lines += ["| source | licence | documents | tokens | read | by |", "|---|---|---|---|---|---|"]
        for row in rows:
            weight = f"×{row['times']}" if "times" in row else ""
            link = (
                f"[{row.get('name')}]({row['url']})"
                if str(row.get("url", "")).startswith("http")
                else str(row.get("name"))
            )
            documents, tokens = row.get("documents_out", row.get("documents", "")), row.get("tokens", "")
            lines.append(
                f"| {link} | {row.get('licence', 'unknown')} | {_number(documents)} | {_number(tokens)} | {weight} "
                f"| {row.get('attribution', '')} |"
            )
    else:
        lines.append("Unknown: the data came without a passport.")
    lines += ["", f"Licence of these weights: **{licence or 'not declared'}**. Whether the licences of training texts bind a model is "
              "not settled law; the table names them so that you can judge. The whole record, with the hash of every file and "
              "input, is in `passport.json`; `criadero passport verify` checks it."]  # fmt: skip
    seconds = float(step.get("seconds", 0))
    trained = [
        f"{int(step.get('tokens', 0)):,} tokens",
        f"{seconds / 60:.0f} minutes of computing" if seconds >= 120 else f"{seconds:.0f} seconds of computing",
    ]
    if step.get("dtype"):
        trained.append(str(step["dtype"]))
    lines += ["", "## How", "", f"Trained on {', '.join(trained)}; the recipe, seeds, code version and machine are in `passport.json`, "
              "every step in `metrics.jsonl`, the losses in `curves.svg`."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_card(
    draft: Draft, out: Path, *, name: str, kind: str, licence: str, base: str | None, words: str | None
) -> None:
    """Write ``README.md`` of an artifact in the making, from the tables that its passport will hold.

    A model made from another has read what that one has read: its sources and tokens count too.
    """
    ancestors = [p for one in draft.inputs if one.relation == "finetune_of" for p in one.ancestors]
    models = [p for p in ancestors if p.get("kind") in ("base", "chat", "adapter")]
    below = [row | {"name": f"{row.get('name')} (read by {p['name']})"} for p in models for row in _sources(p)]
    read = sum(int((p.get("step") or {}).get("tokens", 0)) for p in models) + int(draft.step.get("tokens", 0))
    step = draft.step | {"tokens_in_all": read if models or not base else 0}  # 0: nobody knows what the base has read
    text = card(
        name=name or out.name, kind=kind, licence=licence or None,
        base=(models[0]["name"] if models else Path(base).name) if base else None, model=draft.model,
        data=draft.data | {"by_source": [*draft.data.get("by_source", []), *below]}
        | {"by_language": draft.data.get("by_language") or (models[0]["data"].get("by_language") if models else None)},
        step=step, metrics=draft.metrics, words=words,
    )  # fmt: skip
    (draft.path / "README.md").write_text(text, encoding="utf-8")


def _sources(passport: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((passport.get("data") or {}).get("by_source") or [])


def read_words(path: str | None) -> str | None:
    """The makers' text, when the recipe names one."""
    from criadero.errors import UserError

    if not path:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"card: {path} cannot be read: {reason}") from None
