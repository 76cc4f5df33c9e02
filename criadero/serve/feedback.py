"""What people said of answers, as training data: preference pairs, corrections, and the tally of blind comparisons.

Only what was said with consent is given out, and only while the consent stands. A pair says which answer is better to the same
conversation: of a better answer that somebody wrote, of two answers with thumbs up and down, of a vote. Rows are as DPO's readers
have them: ``prompt`` (messages), ``chosen`` and ``rejected`` (one message each), and where both came from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from criadero.artifact import disk_errors
from criadero.errors import UserError
from criadero.serve.store import Store
from criadero.synth.judge import wilson

Row = dict[str, Any]


@dataclass
class Collected:
    """Rows for training. ``left_out`` counts what could not become one, by reason."""

    pairs: list[Row] = field(default_factory=list)
    corrections: list[Row] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1


def collect(store: Store) -> Collected:
    """The pairs and corrections of all who consent, in the order they were said."""
    out = Collected()
    seen: set[str] = set()
    for owner in store.consenting():
        trees: dict[str, dict[str, Row]] = {}

        def tree(chat: str, owner: str = owner, trees: dict[str, dict[str, Row]] = trees) -> dict[str, Row]:
            if chat not in trees:
                trees[chat] = {message["id"]: message for message in store.messages(owner, chat)}
            return trees[chat]

        said = store.consented_feedback(owner)
        rated: dict[str, dict[int, list[Row]]] = {}  # parent -> rating -> answers
        for row in said:
            answer = tree(row["chat"])[row["message"]]
            prompt = prompt_of(tree(row["chat"]), answer)
            if row["better"] is not None:
                better = {"content": row["better"], "by": "person"}
                _pair(out, seen, "better answer", prompt, better, answer)
                _correction(out, seen, prompt, row["better"], answer)
            if row["rating"] is not None:
                rated.setdefault(answer["parent"], {1: [], -1: []})[row["rating"]].append({**answer, "prompt": prompt})
        for ratings in rated.values():
            for good in ratings[1]:
                for bad in ratings[-1]:
                    _pair(out, seen, "thumbs", good["prompt"], good, bad)
        for vote in store.votes(owner, consented=True):
            if vote["winner"] == "tie":
                out.leave_out("the vote was a tie")
                continue
            loser = "left" if vote["winner"] == "right" else "right"
            messages = tree(vote["chat"])
            best, worst = (messages[vote[f"{side}_message"]] for side in (vote["winner"], loser))
            _pair(out, seen, "vote", prompt_of(messages, best), best, worst)
    return out


def prompt_of(messages: Mapping[str, Row], answer: Row) -> list[Row]:
    """The conversation that an answer was given to, with the system message of that time."""
    turns: list[Row] = []
    at = answer["parent"]
    while at is not None:
        turns.append({"role": messages[at]["role"], "content": messages[at]["content"]})
        at = messages[at]["parent"]
    system = (answer["params"] or {}).get("system")
    return [*([{"role": "system", "content": system}] if system else []), *reversed(turns)]


def _from(answer: Row) -> Row:
    return {"by": "person"} if answer.get("by") else {"model": answer["model"], "model_hash": answer["model_hash"]}


def _pair(out: Collected, seen: set[str], why: str, prompt: list[Row], chosen: Row, rejected: Row) -> None:
    good, bad = chosen["content"], rejected["content"]
    if not good.strip() or not bad.strip() or not all(turn["content"].strip() for turn in prompt):
        return out.leave_out("an answer or a turn before it is empty")
    if good == bad:
        return out.leave_out("both answers are the same")
    row = {
        "prompt": prompt,
        "chosen": [{"role": "assistant", "content": good}],
        "rejected": [{"role": "assistant", "content": bad}],
    }
    if _new(out, seen, row):
        out.pairs.append(row | {"why": why, "chosen_from": _from(chosen), "rejected_from": _from(rejected)})
    return None


def _correction(out: Collected, seen: set[str], prompt: list[Row], better: str, answer: Row) -> None:
    if not better.strip() or not all(turn["content"].strip() for turn in prompt):
        return out.leave_out("an answer or a turn before it is empty")
    row = {"messages": [*prompt, {"role": "assistant", "content": better}]}
    if _new(out, seen, row):
        out.corrections.append(row | {"corrects": _from(answer)})
    return None


def _new(out: Collected, seen: set[str], row: Row) -> bool:
    text = json.dumps(row, sort_keys=True)
    if text in seen:
        out.leave_out("it was said before")
        return False
    seen.add(text)
    return True


def write_feedback(
    store: Store, out: str | Path, corrections: str | Path | None = None, *, overwrite: bool = False
) -> tuple[Collected, Path]:  # fmt: skip
    """Write pairs to ``out`` and corrections to a file beside it (``NAME.corrections.jsonl`` by default), one JSON object a line.

    UserError: a file is there already, nothing was said with consent.
    """
    first = Path(out)
    second = Path(corrections) if corrections else first.with_name(f"{first.stem}.corrections.jsonl")
    if first.absolute() == second.absolute():
        raise UserError(f"{first}: pairs and corrections are two files: name another with --corrections")
    for file in (first, second):
        if file.is_dir():
            raise UserError(f"{file} is a folder: name a file")
        if file.exists() and not overwrite:
            raise UserError(f"{file} is there already: name another, or give --overwrite")
        if not file.absolute().parent.is_dir():
            raise UserError(f"{file.parent} is no folder: make it first")
    found = collect(store)
    if not found.pairs and not found.corrections:
        who = (
            "nobody has consented"
            if not store.consenting()
            else "nothing was said with consent that shows a preference"
        )
        raise UserError(
            f"there is no feedback to write in {store.name}: {who} (in the page: Data, use my feedback for training; then thumbs "
            "on two answers to one question, a better answer, or a vote between two models)"
        )
    for file, rows in ((first, found.pairs), (second, found.corrections)):
        _write(file, rows)
    return found, second


def _write(file: Path, rows: Iterable[Row]) -> None:
    """A file that is whole or not there."""
    partial = file.with_name(file.name + ".partial")
    try:
        with disk_errors(file):
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
                for row in rows:
                    text = json.dumps(row, ensure_ascii=False)
                    stream.write(text if text.isascii() else text.encode("utf-8", "replace").decode())
                    stream.write("\n")
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def tally(votes: Sequence[Row]) -> list[Row]:
    """Wins of each pair of models, by name and hash: ``share`` is a's part of the votes that were no ties, ``low`` to ``high`` its
    95 % interval (Wilson 1927). The pairs with the most votes come first."""
    table: dict[tuple[Any, ...], Row] = {}
    for vote in votes:
        players = {
            side: (vote[f"{side}_answer"].get("model") or vote[side], vote[f"{side}_answer"].get("model_hash") or "")
            for side in ("left", "right")
        }
        (a_side, a), (b_side, b) = sorted(players.items(), key=lambda item: item[1])
        names = {"a": a[0], "b": b[0], "a_hash": a[1], "b_hash": b[1]}
        row = table.setdefault((a, b), {**names, "a_wins": 0, "b_wins": 0, "ties": 0})
        row["ties" if vote["winner"] == "tie" else "a_wins" if vote["winner"] == a_side else "b_wins"] += 1
        assert vote["winner"] in ("tie", a_side, b_side)
    for row in table.values():
        decided = row["a_wins"] + row["b_wins"]
        row["share"] = row["a_wins"] / decided if decided else None
        row["low"], row["high"] = wilson(row["a_wins"], decided)
    return sorted(table.values(), key=lambda row: -(row["a_wins"] + row["b_wins"] + row["ties"]))
