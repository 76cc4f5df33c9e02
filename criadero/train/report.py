"""``report.html``: base against tuned on one page. Curves, answers side by side, counts of the data, settings; Spanish and English.

The page is one file without scripts and asks for nothing from anywhere (its policy forbids it); all that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from criadero.train.answers import Asked

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 300, 52, 20, 16, 40
FILE = "report.html"


@dataclass(frozen=True)
class Comparison:
    """What the page says. ``before`` and ``after`` are held-out losses in nats a token (nan: none was measured)."""

    name: str
    base: str
    method: str
    trained: int  # weights that learned
    total: int
    before: float
    after: float
    supervised: int  # held-out tokens that the losses are means of
    lines: Sequence[dict[str, Any]]  # of metrics.jsonl
    best_step: int  # 0: no step was chosen, the last one counts
    rule: tuple[str, str]  # how it was to end, in English and Spanish
    asked: Sequence[Asked]
    answers_before: Sequence[str]
    answers_after: Sequence[str]
    counts: Mapping[str, Any]  # of the data: see `criadero.train.preflight.Report`
    languages: Mapping[str, int]  # chats by language
    licence: str
    example: Sequence[tuple[str, bool]]  # pieces of a rendered chat, and whether they are learned
    settings: Mapping[str, Any] = field(default_factory=dict)  # what differs from the defaults
    derived: Mapping[str, Any] = field(default_factory=dict)
    task: Sequence[float] = ()  # part of the task's questions that was right, before and after
    questions: int = 0
    tasks: Mapping[str, Sequence[float]] = field(default_factory=dict)  # the same of each, where there are several
    planned: int = 0  # steps, of which a run that ends early makes fewer


def write_report(folder: Path, said: Comparison) -> None:
    """Write ``folder/report.html``."""
    (folder / FILE).write_text(page(said), encoding="utf-8")


def page(said: Comparison) -> str:
    """The whole page."""
    spanish = sum(one.lang == "es" for one in said.asked) * 2 > len(said.asked)
    first = "es" if spanish else "en"
    parts = [_figures(said), _curve(said), _answers(said), _data(said), _settings(said)]
    title = escape(said.name)
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return f"""<!doctype html>
<html lang="{first}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<input type="radio" name="lang" id="en"{"" if spanish else " checked"}><input type="radio" name="lang" id="es"{
        " checked" if spanish else ""
    }>
<nav><label for="en">English</label><label for="es">Español</label></nav>
<main>
<header>
<h1>{title}</h1>
<p class="lead">{
        _both(
            f"{escape(said.base)}, tuned by <b>{escape(said.method)}</b> on your examples: before and after.",
            f"{escape(said.base)}, afinado con <b>{escape(said.method)}</b> en sus ejemplos: antes y después.",
        )
    }</p>
</header>
{"".join(parts)}
<footer><p>{
        _both(
            "The passport in this folder seals this page with the weights: check it with",
            "El pasaporte de esta carpeta sella esta página junto con los pesos; compruébelo con",
        )
    } <code>criadero passport verify</code>.</p></footer>
</main>
</body>
</html>
"""


# -- words and numbers in two languages -------------------------------------------------------------------------------


def _both(en: str, es: str) -> str:
    """HTML in both languages, of which the page shows one."""
    return en if en == es else f'<span class="en" lang="en">{en}</span><span class="es" lang="es">{es}</span>'


def _number(value: Any) -> str:
    """A number as each language writes it."""
    if isinstance(value, bool):
        return _both("yes" if value else "no", "sí" if value else "no")
    if isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.4g}" if value == value else "-"
    else:
        return escape(str(value))
    return _both(text, text.translate(str.maketrans(",.", ".,")))


def _fixed(value: float, places: int, sign: bool = False) -> str:
    text = f"{value:+.{places}f}" if sign else f"{value:.{places}f}"
    return _both(text, text.replace(".", ","))


# -- sections ---------------------------------------------------------------------------------------------------------


def _figures(said: Comparison) -> str:
    last = said.lines[-1] if said.lines else {}
    cards: list[tuple[str, str, str]] = []
    if said.after == said.after:
        fall = said.after - said.before
        share = 1 - math.exp(fall)
        cards += [
            (_both("held-out loss", "pérdida en lo apartado"),
             f"{_fixed(said.before, 3)} <span class='to'>→</span> {_fixed(said.after, 3)}",
             f"{_fixed(fall, 3, sign=True)} {_both('nats a token', 'nats por token')}"),
            (_both("perplexity", "perplejidad"),
             f"{_number(math.exp(min(said.before, 50)))} <span class='to'>→</span> {_number(math.exp(min(said.after, 50)))}",
             f"{_fixed(100 * share, 0)} % {_both('less', 'menos')}" if share > 0 else _both("it did not fall", "no bajó")),
        ]  # fmt: skip
    if said.task:
        cards.append(
            (_both("task, answered right", "tarea, respuestas correctas"),
             f"{_fixed(100 * said.task[0], 0)} % <span class='to'>→</span> {_fixed(100 * said.task[-1], 0)} %",
             f"{_both('of', 'de')} {_number(said.questions)} {_both('questions', 'preguntas')}")
        )  # fmt: skip
        for name, shares in said.tasks.items():
            cards.append(
                (
                    escape(name),
                    f"{_fixed(100 * shares[0], 0)} % <span class='to'>→</span> {_fixed(100 * shares[-1], 0)} %",
                    "",
                )
            )
    made = int(last.get("step", 0))
    about = [f"{_both('kept: step', 'se guarda el')} {_number(said.best_step)}"] if said.best_step else []
    if made < said.planned:
        about.insert(0, f"{_both('ended early, of', 'acabó antes, de')} {_number(said.planned)}")
    cards += [
        (_both("steps", "pasos"), _number(made), "; ".join(about)),
        (_both("weights that learned", "pesos que aprendieron"), _number(said.trained),
         f"{_fixed(100 * said.trained / max(1, said.total), 1)} % {_both('of', 'de')} {_number(said.total)}"),
        (_both("time", "tiempo"), _time(float(last.get("seconds", 0.0))), f"{_number(int(last.get('tokens', 0)))} tokens"),
    ]  # fmt: skip
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in cards)
    return f'<section><dl class="cards">{shown}</dl></section>\n'


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h {seconds % 3600 / 60:02.0f} min"


def _curve(said: Comparison) -> str:
    rule = _both(f"The run ends {escape(said.rule[0])}.", f"Acaba {escape(said.rule[1])}.")
    chosen = _both(
        "The held-out loss chose the step that is kept, so it is a little better than on questions nobody has seen.",
        "La pérdida en lo apartado eligió el paso que se guarda: es algo mejor que en preguntas que nadie ha visto.",
    )
    note = f"<p>{rule} {chosen if said.best_step else ''}</p>"
    return f"<section><h2>{_both('The loss', 'La pérdida')}</h2><figure>{chart(said)}</figure>{note}{_measured(said)}</section>\n"


def _measured(said: Comparison) -> str:
    """What was measured on the way, in numbers: the held-out loss, and the part of the task that was right."""
    rows = [("0", said.before, said.task[0] if said.task else None)]
    for line in said.lines:
        losses = [scores["loss"] for scores in (line.get("held_out") or {}).values()]
        if losses:
            share = (line.get("task") or {}).get("accuracy")
            rows.append((_number(line["step"]), sum(losses) / len(losses), share))
    if len(rows) < 2:
        return ""
    shown = "".join(
        f"<tr><td>{step}</td><td>{_fixed(loss, 3) if math.isfinite(loss) else '-'}</td>"
        + (f"<td>{_fixed(100 * share, 0)} %</td>" if share is not None else "<td></td>" if said.task else "")
        + "</tr>"
        for step, loss, share in rows
    )
    task = f"<td>{_both('task, answered right', 'tarea, respuestas correctas')}</td>" if said.task else ""
    head = f"<tr><td>{_both('step', 'paso')}</td><td>{_both('held-out loss', 'pérdida en lo apartado')}</td>{task}</tr>"
    title = _both("measured on the way", "medido por el camino")
    return f"<details><summary>{title}</summary><table><tbody>{head}{shown}</tbody></table></details>"


def chart(said: Comparison) -> str:
    """The training loss (every step, and smoothed) and the held-out losses, in nats a token, against steps."""
    train = [(line["step"], float(line["loss"])) for line in said.lines if math.isfinite(line["loss"])]
    held: list[tuple[int, float]] = [(0, said.before)] if math.isfinite(said.before) else []
    for line in said.lines:
        losses = [scores["loss"] for scores in (line.get("held_out") or {}).values()]
        if losses and math.isfinite(sum(losses)):
            held.append((line["step"], sum(losses) / len(losses)))
    if not train:
        return ""
    smooth, average, weight, keep = [], 0.0, 0.0, 1 - 1 / max(1, len(train) // 25)
    for step, loss in train:
        average, weight = average * keep + loss, weight * keep + 1
        smooth.append((step, average / weight))
    values = [y for _, y in [*smooth, *held]]
    low, high = 0.0 if min(values) < 1.5 else math.floor(min(values)), max(values) * 1.04
    last = train[-1][0]

    def place(x: float, y: float) -> str:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - min(y, high)) / (high - low)
        return f"{across:.1f},{down:.1f}"

    def path(points: Sequence[tuple[float, float]], name: str) -> str:
        thin = points if len(points) < 500 else [*points[:: len(points) // 400], points[-1]]
        return f'<polyline class="{name}" points="{" ".join(place(x, y) for x, y in thin)}"/>'

    step = _step(high - low, 5)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss / pérdida">']
    for n in range(math.ceil(low / step), math.floor(high / step) + 1):
        left, down = place(0, n * step).split(",")
        parts.append(f'<path class="grid" d="M{left},{down}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(down) + 4:.1f}" class="end">{n * step:g}</text>')
    across = max(1, round(_step(last, 6)))
    for n in range(0, last + 1, across):
        parts.append(f'<text x="{place(n, low).split(",")[0]}" y="{HEIGHT - 22}" class="middle">{n}</text>')
    parts += [path(train, "raw"), path(smooth, "train"), path(held, "held") if len(held) > 1 else ""]
    for x, y in held:
        at = place(x, y).split(",")
        best = x == said.best_step and x > 0
        parts.append(
            f'<circle class="held{" best" if best else ""}" cx="{at[0]}" cy="{at[1]}" r="{5 if best else 3}"/>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    for lang, word in (("en", "steps"), ("es", "pasos")):
        parts.append(f'<text class="middle {lang}" x="{middle:.0f}" y="{HEIGHT - 5}">{word}</text>')
    key = [f'<span class="k train"></span>{_both("training", "entrenamiento")}']
    if held:
        key.append(f'<span class="k held"></span>{_both("held out", "apartado")}')
    if said.best_step:
        key.append(f'<span class="k best"></span>{_both("the one kept", "el que se guardó")}')
    return "".join(parts) + f"</svg><figcaption>{''.join(f'<span>{one}</span>' for one in key)}</figcaption>"


def _step(span: float, wanted: int) -> float:
    """A round distance of marks, of which about ``wanted`` fit into ``span``."""
    rough = max(span, 1e-9) / wanted
    ten = 10.0 ** math.floor(math.log10(rough))
    return next(ten * n for n in (1, 2, 5, 10) if ten * n >= rough)


def _answers(said: Comparison) -> str:
    if not said.asked:
        text = _both(
            "No questions were held out, so there is nothing to compare.",
            "No se apartaron preguntas: no hay qué comparar.",
        )
        return f"<section><h2>{_both('Answers', 'Respuestas')}</h2><p>{text}</p></section>\n"
    rows = []
    along = [line for line in said.lines if line.get("answers")]
    for n, one in enumerate(said.asked):
        lang = f' lang="{one.lang}"' if one.lang in ("en", "es") else ""
        way = ""
        if along and n < len(along[0]["answers"]):
            steps = "".join(
                f"<tr><td>{line['step']}</td><td{lang}>{_text(line['answers'][n])}</td></tr>" for line in along
            )
            way = (
                f"<details><summary>{_both('on the way', 'por el camino')}</summary>"
                f"<table><tbody>{steps}</tbody></table></details>"
            )
        rows.append(
            f'<article><h3{lang}>{_text(one.question)}</h3><div class="sides">'
            f"<div><h4>{_both('before', 'antes')}</h4><p{lang}>{_text(said.answers_before[n])}</p></div>"
            f'<div class="after"><h4>{_both("after", "después")}</h4><p{lang}>{_text(said.answers_after[n])}</p></div>'
            f"<div><h4>{_both('in the data', 'en los datos')}</h4><p{lang}>{_text(one.reference)}</p></div></div>{way}</article>"
        )
    lead = _both(
        "Questions that were held out: nothing was learned from them. The likeliest answer of each model, cut short where it is long.",
        "Preguntas apartadas, de las que no se aprendió nada. La respuesta más probable de cada modelo, cortada si es larga.",
    )
    return f"<section><h2>{_both('Answers, before and after', 'Respuestas, antes y después')}</h2><p>{lead}</p>{''.join(rows)}</section>\n"


def _text(text: str) -> str:
    return escape(text).replace("\n", "<br>") if text.strip() else '<span class="none">∅</span>'


_COUNTS = (
    ("chats", "chats learned from", "chats de los que aprende"),
    ("held_out", "chats held out", "chats apartados"),
    ("tokens", "tokens a pass", "tokens por pasada"),
    ("supervised", "of them supervised", "de ellos, supervisados"),
    ("held_out_supervised", "held-out tokens measured on", "tokens apartados en que se mide"),
    ("longest", "longest chat, in tokens", "chat más largo, en tokens"),
    ("duplicates", "duplicates in the training part", "duplicados en la parte de entrenamiento"),
    ("contaminated", "held-out chats that are also learned", "chats apartados que también se aprenden"),
    ("near_contaminated", "held-out questions almost learned", "preguntas apartadas casi aprendidas"),
    ("too_long", "longer than the context", "más largos que el contexto"),
    ("truncated_tokens", "tokens cut off", "tokens cortados"),
    ("held_out_cut", "held-out chats cut to the context", "chats apartados cortados al contexto"),
    ("dropped", "dropped for their length", "descartados por su longitud"),
    ("unsupervised", "without anything to learn", "sin nada que aprender"),
    ("bad", "bad lines skipped", "líneas malas omitidas"),
)
_ALWAYS = ("chats", "held_out", "tokens", "supervised", "longest", "duplicates", "contaminated")


def _data(said: Comparison) -> str:
    rows = [(_both(en, es), _number(said.counts[key])) for key, en, es in _COUNTS
            if key in said.counts and (said.counts[key] or key in _ALWAYS)]  # fmt: skip
    names = {
        "en": ("English", "inglés"),
        "es": ("Spanish", "español"),
        "other": ("other", "otros"),
        "unknown": ("not known", "no se sabe"),
    }
    if said.languages:
        listed = ", ".join(
            f"{_both(*names.get(lang, (escape(lang), escape(lang))))} {_number(n)}"
            for lang, n in said.languages.items()
        )
        rows.append((_both("languages", "idiomas"), listed))
    rows.append((_both("licence of the data", "licencia de los datos"), escape(said.licence)))
    example = "".join(f"<mark>{escape(text)}</mark>" if learned else escape(text) for text, learned in said.example)
    title = _both(
        "One example as the model sees it; what it learns is marked",
        "Un ejemplo tal como lo ve el modelo; lo que aprende va marcado",
    )
    shown = f"<h3>{title}</h3><pre>{example}</pre>" if example else ""
    return f"<section><h2>{_both('The data', 'Los datos')}</h2>{_table(rows)}{shown}</section>\n"


def _settings(said: Comparison) -> str:
    rows = [(f"<code>{escape(str(name))}</code>", _number(value)) for name, value in said.settings.items()]
    derived = [(f"<code>{escape(str(name))}</code>", _number(value)) for name, value in said.derived.items()]
    chosen = f"<h3>{_both('Given', 'Dados')}</h3>{_table(rows)}" if rows else ""
    title = _both("Derived from the model, the data and this machine", "Deducidos del modelo, los datos y esta máquina")
    found = f"<h3>{title}</h3>{_table(derived)}" if derived else ""
    return f"<section><h2>{_both('Settings', 'Ajustes')}</h2>{chosen}{found}</section>\n"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return (
        "<table><tbody>"
        + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows)
        + "</tbody></table>"
    )
