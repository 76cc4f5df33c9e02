"""Learning from a larger model's probabilities (Hinton et al. 2015, arXiv 1503.02531). Stage ``logits`` asks the teacher once and
seals what it says; ``tune`` on that artifact follows it.

For each learned token the teacher's ``top_k`` likeliest next tokens are kept, with their log-probabilities at one temperature. What
the others have together is one class of its own, for teacher and student alike: the divergence of the two coarser distributions
is a lower bound of the whole one, equal to it when ``top_k`` is the vocabulary, and least where the student agrees with the
teacher. (Scaling the ``top_k`` up to 1 instead would teach that nothing else is possible.)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

from criadero.artifact import Artifact, create, open_artifact, read_passport, resolve
from criadero.chat import Example, Template
from criadero.errors import UserError
from criadero.model import Llama
from criadero.tokenizer import Tokenizer, load_tokenizer
from criadero.train.batches import IGNORE, Batch, ExampleBatches, pack_examples, rows_to_batch
from criadero.train.examples import find_data, prepare
from criadero.train.hardware import choose_dtype, keep_memory, peak_memory_bytes
from criadero.train.loss import CHUNK, cross_entropy_sum, learned_rows
from criadero.train.progress import say

if TYPE_CHECKING:
    from criadero.train.sft import SftRecipe

SPLITS = ("train", "held_out")
LEAST = 1e-6  # of the class of all other tokens: rounding must not make it empty


@dataclass(frozen=True)
class LogitsRecipe:
    """Whom to ask, about what, and how much of the answer to keep."""

    teacher: str = field(metadata={"help": "the larger model: bundled, a folder, or a .gguf file"})
    data: str = field(metadata={"help": "chats (or documents, with train_on = text), as for tune"})
    top_k: int = field(default=32, metadata={"help": "likeliest tokens kept for each learned one: 6 bytes each"})
    temperature: float = field(
        default=1.0, metadata={"help": "flattens the teacher's probabilities, and the student's with them"}
    )
    licence: str = field(default="unknown", metadata={"help": "licence of your data, recorded in the passport"})
    held_out: str | None = field(default=None, metadata={"help": "chats to measure on; default: as for tune"})
    held_out_share: float = field(default=0.1, metadata={"help": "part kept apart when held_out is not given"})
    train_on: Literal["all", "last", "text"] = field(default="all", metadata={"help": "what is learned, as for tune"})
    max_length: int = field(default=0, metadata={"help": "longest example in tokens; 0: the teacher's context"})
    too_long: Literal["refuse", "drop", "truncate", "split"] = field(
        default="refuse", metadata={"help": "chats longer than that, as for tune"}
    )
    skip_bad: bool = field(default=False, metadata={"help": "count malformed lines instead of refusing them"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "auto measures first"})
    seed: int = field(default=1, metadata={"help": "of the split"})


def logits(recipe: LogitsRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Ask ``recipe.teacher`` what it would say at every learned token of ``recipe.data``, and seal that as a ``logits`` artifact.

    UserError before the work: settings, data and templates that `criadero.train.examples.prepare` refuses.
    """
    from criadero.checkpoints import load_model, tokenizer_of
    from criadero.train import preflight, sft

    keep_memory()
    if recipe.top_k < 1:
        raise UserError(f"top_k must be at least 1, not {recipe.top_k}")
    if not 0.05 <= recipe.temperature <= 100:
        raise UserError(f"temperature must lie between 0.05 and 100, not {recipe.temperature:g}")
    path, data = resolve(recipe.teacher), find_data(recipe.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    like = sft.SftRecipe(
        base=recipe.teacher, data=recipe.data, licence=recipe.licence, held_out=recipe.held_out,
        held_out_share=recipe.held_out_share, train_on=recipe.train_on, max_length=recipe.max_length,
        too_long=recipe.too_long, skip_bad=recipe.skip_bad, seed=recipe.seed,
    )  # fmt: skip
    sft.check_recipe(like)
    sources, licence = sft.sources_of(like, data)
    with create(
        out, kind="logits", recipe=recipe, seeds={"seed": recipe.seed}, licence=None, overwrite=overwrite
    ) as draft:
        draft.add_input("outputs_of", recipe.teacher)
        draft.add_input("contains", recipe.data, licence=licence)
        model = load_model(path)
        tokenizer, template = tokenizer_of(path), sft.template_for(like, path)
        context = sft.context_of(like, model.config)
        prepared = prepare(like, data, tokenizer, template, context)
        preflight.check(prepared.report)
        if recipe.top_k > model.config.vocab_size:
            raise UserError(
                f"top_k is {recipe.top_k}, but the vocabulary of {recipe.teacher} has {model.config.vocab_size}"
            )
        dtype, why = choose_dtype(recipe.dtype, model.config, device)
        model = model.to(device=device, dtype=dtype)
        say(f"asking {recipe.teacher} for the {recipe.top_k} likeliest at each learned token, in {why}")
        kept = dict(zip(SPLITS, (prepared.train, prepared.held_out), strict=True))
        shares = {}
        for split, examples in kept.items():
            tensors = ask(model, examples, recipe.top_k, recipe.temperature, dtype, device)
            save_file(tensors, draft.path / f"{split}.safetensors")
            masses = np.exp(tensors["log_probs"].astype(np.float32)).sum(1)
            shares[split] = float(masses.mean()) if len(masses) else 0.0
        say(f"what is kept has {shares['train']:.1%} of the teacher's probability")
        tokenizer.save(draft.path, chat_template=template.source if template else None)
        about = {
            "temperature": recipe.temperature, "top_k": recipe.top_k, "context": context, "places": list(prepared.places),
            "report": {k: v for k, v in vars(prepared.report).items() if not isinstance(v, dict)},
        }  # fmt: skip
        (draft.path / "logits.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        draft.data.update(prepared.report.table(data, licence, sources))
        draft.metrics += [
            {"suite": "teacher", "metric": "probability_kept", "slice": split, "value": share, "n": len(kept[split])}
            for split, share in shares.items() if kept[split]
        ]  # fmt: skip
        draft.step["peak_memory_bytes"] = peak_memory_bytes()
    return open_artifact(out)


@torch.no_grad()
def ask(
    model: Llama, examples: Sequence[Example], top_k: int, temperature: float, dtype: torch.dtype, device: str
) -> dict[str, np.ndarray]:
    """The examples and what the teacher says of them: ``ids`` int32 and ``mask`` uint8 ``[tokens]``, ``starts`` int64
    ``[examples + 1]``; ``top`` int32 and ``log_probs`` float16 ``[learned tokens, top_k]``, in the order of the examples."""
    lengths = [len(one.ids) for one in examples]
    row = max([256, *lengths])
    learned = [sum(one.loss_mask[1:]) for one in examples]
    places = np.concatenate([[0], np.cumsum(learned)]).astype(np.int64)
    top = np.zeros((int(places[-1]), top_k), np.int32)
    log_probs = np.zeros((int(places[-1]), top_k), np.float16)
    for numbers in pack_examples(lengths, row):
        batch = rows_to_batch([[examples[i] for i in numbers]], row, 0, dtype, device)
        rows = learned_rows(model, batch)  # [learned in this row, D], example after example
        order = np.concatenate([np.arange(places[i], places[i + 1]) for i in numbers])
        for start in range(0, len(rows), CHUNK):
            scores = model.logits(rows[start : start + CHUNK]).float() / temperature  # [n, V]
            best = torch.log_softmax(scores, -1).topk(top_k)
            at = order[start : start + CHUNK]
            top[at], log_probs[at] = best.indices.cpu().numpy(), best.values.cpu().numpy()
    return {
        "ids": np.asarray([token for one in examples for token in one.ids], np.int32),
        "mask": np.asarray([yes for one in examples for yes in one.loss_mask], np.uint8),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "top": top,
        "log_probs": log_probs,
    }


# --- reading it again ---


@dataclass(frozen=True)
class Taught:
    """One split: examples, and for each learned token the teacher's likeliest, ``top`` and ``probs`` ``[M, k]``; those of
    example i are rows ``places[i]`` to ``places[i + 1]``."""

    examples: list[Example]
    top: np.ndarray
    probs: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Lesson:
    """A ``logits`` artifact."""

    train: Taught
    held_out: Taught
    temperature: float
    tokenizer: Tokenizer
    template: Template | None
    about: dict[str, Any]


def is_logits(path: Path) -> bool:
    """Whether ``path`` is an artifact of the stage ``logits``."""
    passport = read_passport(path) if path.is_dir() else None
    return passport is not None and passport["kind"] == "logits"


def open_lesson(path: Path) -> Lesson:
    """Read a ``logits`` artifact. UserError: damage."""
    from criadero.chat import load_template

    try:
        about = json.loads((path / "logits.json").read_text(encoding="utf-8"))
        train, held_out = (_taught(load_file(path / f"{split}.safetensors")) for split in SPLITS)
        temperature = float(about["temperature"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable logits artifact ({error}); make it again") from None
    except Exception as error:  # safetensors has an error class of its own
        raise UserError(f"{path}: damaged: {error}; make it again") from None
    try:
        template = load_template(path)
    except UserError:
        template = None
    return Lesson(train, held_out, temperature, load_tokenizer(path), template, about)


def _taught(tensors: dict[str, np.ndarray]) -> Taught:
    starts, ids, mask = tensors["starts"], tensors["ids"], tensors["mask"].astype(bool)
    spans = list(pairwise(starts.tolist()))
    examples = [Example(ids[a:b].tolist(), mask[a:b].tolist()) for a, b in spans]
    places = np.concatenate([[0], np.cumsum([int(mask[a + 1 : b].sum()) for a, b in spans])]).astype(np.int64)
    if places[-1] != len(tensors["top"]) or tensors["top"].shape != tensors["log_probs"].shape:
        raise ValueError("its parts do not fit together")
    return Taught(examples, tensors["top"], np.exp(tensors["log_probs"].astype(np.float32)), places)


def check_student(lesson: Lesson, recipe: SftRecipe, tokenizer: Tokenizer) -> None:
    """UserError when the student's vocabulary is not the teacher's, or the recipe says things that were settled before."""
    theirs = lesson.tokenizer
    same = theirs.vocab_size == tokenizer.vocab_size and theirs.special == tokenizer.special
    if not same or any(theirs._vocab.get(i) != tokenizer._vocab.get(i) for i in range(theirs.vocab_size)):
        raise UserError(
            f"{recipe.data}: its teacher's vocabulary is not that of {recipe.base}, so its tokens mean other words: distil from a "
            "text that the teacher writes instead (criadero synth answers)"
        )
    settled = ("held_out", "held_out_share", "template", "new_tokens", "max_length", "too_long", "train_on", "skip_bad")
    defaults = {one.name: one.default for one in dataclasses.fields(recipe)}
    for name in settled:
        if getattr(recipe, name) != defaults[name]:
            raise UserError(f"{name} was settled when {recipe.data} was made: leave it out, or make that again with it")


class TaughtBatches:
    """`ExampleBatches` that bring the teacher's probabilities along."""

    def __init__(self, batches: ExampleBatches, taught: Taught) -> None:
        self.batches, self.taught = batches, taught
        self.steps_per_epoch, self.rows_at = batches.steps_per_epoch, batches.rows_at

    def __call__(self, step: int) -> Batch:
        return teach(self.batches(step), [i for row in self.rows_at(step) for i in row], self.taught)


def teach(batch: Batch, order: Sequence[int], taught: Taught) -> Batch:
    """The batch with what the teacher says of its examples, numbered in the order in which they stand there."""
    at = np.concatenate([np.arange(taught.places[i], taught.places[i + 1]) for i in order])
    device = batch.ids.device
    top = torch.from_numpy(taught.top[at].astype(np.int64)).to(device)  # [M, k]
    return dataclasses.replace(batch, teacher=(top, torch.from_numpy(taught.probs[at]).to(device)))


def held_out_batches(taught: Taught, length: int, rows: int, pad: int, dtype: torch.dtype, device: str) -> list[Batch]:
    """Packed batches of a split in a fixed order, with the teacher's probabilities."""
    packed = pack_examples([len(one.ids) for one in taught.examples], length)
    groups = [packed[i : i + rows] for i in range(0, len(packed), rows)]
    return [
        teach(
            rows_to_batch([[taught.examples[i] for i in row] for row in group], length, pad, dtype, device),
            [i for row in group for i in row], taught,
        )
        for group in groups
    ]  # fmt: skip


# --- the objective ---


class _Divergence(torch.autograd.Function):
    """KL(teacher || student) over ``top_k`` tokens and one class for the rest, summed; chunk by chunk, as in `loss`.

    With student probabilities q, teacher's p, K the kept tokens and r the class of the rest, the gradient by logit j is
    q_j - p_j inside K and q_j (1 - p_r / q_r) outside.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, top: Tensor, probs: Tensor, temperature: float) -> Tensor:
        """hidden ``[M, D]``, weight ``[V, D]``, top and probs ``[M, k]`` -> float32 scalar."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, hidden.shape[0], CHUNK):
            rows, kept, p = (t[start : start + CHUNK] for t in (hidden, top, probs))
            p_rest = (1 - p.sum(1)).clamp_min(LEAST)  # [n]
            p = p * ((1 - p_rest) / p.sum(1))[:, None]  # exactly 1 together
            scores = torch.mm(rows, weight.t()).float() / temperature  # [n, V]
            log_z = scores.logsumexp(-1, keepdim=True)  # [n, 1]
            log_q = scores.gather(1, kept) - log_z  # [n, k]
            outside = scores.scatter(1, kept, -torch.inf)
            log_outside = outside.logsumexp(-1).clamp_min(-1e30)  # [n]; finite where every token is kept
            log_rest = (log_outside - log_z[:, 0]).clamp_min(-80.0)  # [n]
            total += (p * (p.clamp_min(1e-30).log() - log_q)).sum() + (p_rest * (p_rest.log() - log_rest)).sum()
            if d_hidden is None and d_weight is None:
                continue
            # q_j (1 - p_r / q_r), written so that a q_r near 0 does not matter
            grad = (outside - log_z).exp_().sub_((outside - log_outside[:, None]).exp_() * p_rest[:, None])  # [n, V]
            grad.scatter_(1, kept, log_q.exp() - p)
            grad = (grad / temperature).to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(grad, weight, out=d_hidden[start : start + CHUNK])
            if d_weight is not None:
                d_weight += torch.mm(grad.t(), rows)
        ctx.save_for_backward(*(t for t in (d_hidden, d_weight) if t is not None))
        ctx.has = (d_hidden is not None, d_weight is not None)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        d_hidden = saved.pop(0) * grads[0].to(ctx.dtypes[0]) if ctx.has[0] else None
        d_weight = (saved.pop(0) * grads[0]).to(ctx.dtypes[1]) if ctx.has[1] else None
        return d_hidden, d_weight, None, None, None


def divergence_sum(hidden: Tensor, weight: Tensor, top: Tensor, probs: Tensor, temperature: float) -> Tensor:
    """The summed divergence in nats of M learned tokens: hidden ``[M, D]``, weight ``[V, D]``, top int64 and probs ``[M, k]``."""
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _Divergence.apply(hidden, weight, top, probs, temperature)


def distil_loss(share: float, temperature: float) -> Callable[[Llama, Batch], tuple[Tensor, int, dict[str, float]]]:
    """The objective ``share * temperature^2 * divergence + (1 - share) * cross-entropy``; the square keeps the two gradients of
    one size whatever the temperature (section 2.1 there)."""

    def loss(model: Llama, batch: Batch) -> tuple[Tensor, int, dict[str, float]]:
        assert batch.teacher
        rows, weight = learned_rows(model, batch), model.lm_head.weight  # [M, D]
        apart = divergence_sum(rows, weight, *batch.teacher, temperature)
        total = apart * (share * temperature**2)
        if share < 1:
            total = total + cross_entropy_sum(rows, weight, batch.targets[batch.targets != IGNORE]) * (1 - share)
        return total, len(rows), {"divergence": float(apart.detach())}

    return loss


@torch.no_grad()
def mean_divergence(model: Llama, batches: Sequence[Batch], temperature: float) -> float:
    """Nats a learned token; nan when there are none."""
    was = model.training
    model.eval()
    objective, total, count = distil_loss(1.0, temperature), 0.0, 0
    for batch in batches:
        _, n, measured = objective(model, batch)
        total, count = total + measured["divergence"], count + n
    model.train(was)
    return total / count if count else float("nan")
