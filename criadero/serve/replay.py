"""Compute an answer again from its receipt, and say whether it is the same, to the byte, and what differs if it is not.

Tokens are a function of the weights, the prompt's ids, the parameters and the seed, whatever else is computed at the time; on one kind of
processor, since the kernels of another add in another order.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from criadero import __version__
from criadero.artifact import resolve
from criadero.checkpoints import template_of
from criadero.engine.llm import LLM, Building, Sample
from criadero.engine.request import Request, sampling_params
from criadero.errors import UserError
from criadero.serve.models import weights_sha256
from criadero.serve.run import ids_sha256
from criadero.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Replayed:
    """What came out. ``differs`` says in words what is not as it was when the answer was given; ``first`` is where the first answer
    that is not the same departs (None: unknown, as only hashes of it were kept)."""

    same: bool
    texts: list[str]
    tokens: list[int]
    differs: list[str] = field(default_factory=list)
    first: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "same": self.same, "differs": self.differs, "first_other_token": self.first, "tokens": self.tokens, "answers": self.texts
        }  # fmt: skip


def replay(
    receipt: dict[str, Any], *, model: str | Path | None = None, adapter: str | Path | None = None, prompt: Sequence[int] | None = None
) -> Replayed:  # fmt: skip
    """Answer the receipt's prompt again. ``model`` and ``adapter``: where they lie now; ``prompt``: its ids, where they were not kept.

    UserError: no prompt, or another one than the receipt's; a model that is not found; a receipt of a vector.
    """
    id = receipt.get("id")
    if receipt.get("pooling"):
        raise UserError(f"{id} is the receipt of a vector (/v1/embeddings): there is no answer to give again")
    ids = list(prompt) if prompt is not None else receipt.get("prompt_ids")
    if ids is None:
        raise UserError(
            f"{id}: its prompt was not kept, only its hash: to have answers that can be replayed, ask with "
            '"store": true, or start criadero serve --keep-prompts'
        )
    if ids_sha256(ids) != receipt["prompt_sha256"]:
        raise UserError(
            f"{id}: this is not the prompt of the receipt (its ids have another hash): give the request as it was sent"
        )
    path = _find(receipt, "model", model)
    differs: list[str] = []
    _note(differs, "the weights", receipt["weights_sha256"], weights_sha256(path))
    kept = str(receipt["build"].get("runner", ""))
    llm = LLM(path, runner="torch" if kept.startswith("torch") else "auto")
    name = None
    if receipt.get("adapter"):
        name, folder = str(receipt["adapter"]), _find(receipt, "adapter", adapter)
        _note(differs, "the adapter", receipt.get("adapter_sha256"), weights_sha256(folder))
        llm.load_adapter(name, folder)
    now = {"criadero": __version__, "runner": llm.runner.name, "machine": platform.machine()}
    for what, label in (
        ("criadero", "the version"),
        ("runner", "the runner and its kernels"),
        ("machine", "the kind of machine"),
    ):
        _note(differs, label, receipt["build"].get(what), now[what])
    if receipt.get("template_sha256"):
        holder = _find(receipt, "adapter", adapter) if name else path
        try:
            _note(differs, "the chat template", receipt["template_sha256"], _hash(template_of(holder).source))
        except UserError:
            differs.append("the chat template: there is none now")
    samples = _samples(llm, ids, receipt, name)
    hashes: list[str] = receipt["answers_sha256"]
    same, first = True, None
    for sample, whole in zip(samples, hashes, strict=True):
        before = (receipt.get("answer_ids") or [None] * len(hashes))[sample.index]
        ended = (receipt.get("finish_reasons") or [None] * len(hashes))[sample.index]
        these = sample.ids
        if ended in ("cancelled", "error", "guard"):  # as far as it had come
            lengths = receipt.get("answer_tokens")  # receipts of before have none
            if lengths is None:
                lengths = [receipt["usage"]["completion"]] if len(hashes) == 1 else [None] * len(hashes)
            these = these[: len(before) if before is not None else lengths[sample.index]]
        if ended == "guard":  # what it kept back is not given now either
            decoder = StreamDecoder(llm.tokenizer)
            sample.ids, sample.text = these, "".join(map(decoder.push, these))
        if ids_sha256(these) != whole:
            same = False
            if first is None and before is not None:
                pairs = zip(these, before, strict=False)
                first = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(these), len(before)))
    return Replayed(same, [sample.text for sample in samples], [len(sample.ids) for sample in samples], differs, first)


def _samples(llm: LLM, ids: Sequence[int], receipt: dict[str, Any], adapter: str | None) -> list[Sample]:
    """The answers, computed alone."""
    values = dict(receipt["params"])
    values["logit_bias"] = {int(key): value for key, value in values.get("logit_bias", {}).items()}
    params = sampling_params(values)
    building = Building(params.n)
    id = llm.engine.add(Request(ids, params, adapter, continues=bool(receipt["continues"])))
    done = False
    while not done:
        for output in llm.engine.step():
            building.add(output)
            done = done or (output.id == id and output.done)
    return building.samples


def _note(differs: list[str], what: str, before: Any, now: Any) -> None:
    if before != now:
        differs.append(f"{what}: {_short(before)} then, {_short(now)} now")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _find(receipt: dict[str, Any], what: str, given: str | Path | None) -> Path:
    """Where the receipt's model or adapter lies: as told, where it lay, or the bundled one of its name."""
    if given is not None:
        return resolve(given)
    path = (receipt.get("paths") or {}).get(what)
    for one in (path, receipt[what]):
        if one:
            try:
                return resolve(one)
            except UserError:
                continue
    raise UserError(
        f"{receipt['id']}: its {what} {receipt[what]!r} is not where it was: say where it is with --{what} DIR"
    )
