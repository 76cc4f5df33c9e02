"""Stage ``quantize``: a model -> the same model in 4 or 8 bits a weight, measured before and after, sealed."""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from criadero.artifact import Artifact, create, open_artifact, read_passport, resolve
from criadero.card import read_words
from criadero.checkpoints import (
    ADAPTER,
    is_quantised,
    is_quantised_gguf,
    load_model,
    template_of,
    tokenizer_of,
    write_quantised,
)  # fmt: skip
from criadero.checkpoints.packed import power_of_two
from criadero.checkpoints.states import expected_shapes, stored_dtype
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor, describe
from criadero.model import ModelConfig
from criadero.quantization.gptq import Scheme, gptq
from criadero.quantization.layers import HEAD, TABLE, count, measure, wide
from criadero.quantization.mixed import choose, sensitivity
from criadero.quantization.report import Figures, card, lines
from criadero.quantization.rounding import round_matrix
from criadero.quantization.text import Text, bundled_data, flat, read_text, tokens_in
from criadero.tokenizer import Tokenizer
from criadero.train.pretrain import describe as describe_model
from criadero.train.pretrain import text_bytes
from criadero.train.progress import say

BITS = {"int4": 4, "int8": 8}
MIXED_EXTRA = 0.5  # bits a weight that mixed precision may add when no budget is given
MIXED_TOKENS = 4096  # of the calibration text, to measure each unit's rise on


@dataclass(frozen=True)
class QuantizeRecipe:
    """What making a model small needs to know."""

    model: str = field(metadata={"help": "a bundled model, a folder of Criadero or Hugging Face, or a .gguf file"})
    to: Literal["int4", "int8"] = field(default="int4", metadata={"help": "bits of the layers' weights"})
    group: int = field(default=32, metadata={"help": "weights of a row that share a scale; 0: the whole row"})
    method: Literal["auto", "rtn", "gptq"] = field(
        default="auto", metadata={"help": "round to nearest, or GPTQ; auto: GPTQ for int4 when there is text"}
    )
    calibration: str | None = field(
        default=None,
        metadata={
            "help": "text to calibrate on and measure with: a dataset, tokens, or a file; default: what the model was trained on"
        },
    )
    keep: tuple[str, ...] = field(default=(), metadata={"help": "patterns of weights that stay as they are: *.0.mlp.*"})
    mixed: bool = field(default=False, metadata={"help": "with int4: keep the layers that suffer most at int8"})
    bits: float = field(
        default=0.0, metadata={"help": "with mixed: bits a layer's weight on average; 0: half a bit more"}
    )
    table: Literal["int8", "packed", "keep"] = field(
        default="int8",
        metadata={
            "help": "embedding and output: int8 that every reader opens, int8 packed small for Criadero only, as they are"
        },
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "tokens of text that GPTQ looks at"})
    eval_tokens: int = field(default=16384, metadata={"help": "other tokens that the loss is measured on"})
    seed: int = field(default=1, metadata={"help": "which text is drawn"})
    model_name: str = field(default="", metadata={"help": "name in the passport and the card; default: the folder's"})
    model_licence: str = field(default="", metadata={"help": "licence you give the weights; default: the model's own"})
    card: str | None = field(default=None, metadata={"help": "a Markdown file with your own words for the model card"})


def quantize(recipe: QuantizeRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Quantise ``recipe.model`` and seal the result at ``out``; what can be wrong is found before the work starts.

    There is nothing to resume: a run that was cut off leaves no artifact and starts over.
    """
    started = time.monotonic()
    source = resolve(recipe.model)
    _check(recipe, source)
    words = read_words(recipe.card)
    passport = read_passport(source) if source.is_dir() else None
    declared = ((passport or {}).get("licence") or {}).get("declared")
    tokenizer = tokenizer_of(source)
    with create(
        out, kind="quantised", name=recipe.model_name or None, licence=recipe.model_licence or declared,
        recipe=recipe, seeds={"seed": recipe.seed}, overwrite=overwrite,
    ) as draft:  # fmt: skip
        draft.add_input("quantised_from", recipe.model)
        if source.is_dir() and (source / ADAPTER).is_file():
            say(f"{recipe.model} is an adapter: it is merged into its base first")
        model = load_model(source)
        config = model.config
        state: dict[str, Tensor | QuantTensor] = {
            name: tensor.detach() for name, tensor in model.state_dict().items() if name != HEAD or not config.tie_word_embeddings
        }  # fmt: skip
        del model
        dtype = stored_dtype({n: w for n, w in state.items() if isinstance(w, Tensor)})
        dtype = torch.bfloat16 if dtype not in (torch.bfloat16, torch.float16) else dtype
        schemes = _schemes(recipe, state, config)
        text, chosen, why = _text(recipe, source, tokenizer, config)
        method = recipe.method if recipe.method != "auto" else ("gptq" if text and recipe.to == "int4" else "rtn")
        say(f"{method} to {recipe.to}: {why}")
        if text:  # GPTQ fits the weights to it; otherwise it is only measured with
            draft.add_input("trained_on" if method == "gptq" else "evaluated_on", text.source)
        before_bytes = sum(weight.nbytes for weight in state.values())
        before = _losses(state, config, text, "measuring the model as it is")
        raised: list[str] = []
        if recipe.mixed and text:
            schemes, raised = _mix(recipe, state, config, text, schemes)
        if method == "gptq":
            assert text
            gptq(state, config, text.calibration, schemes, _ticker("quantising", config.num_hidden_layers))
        else:
            tick = _ticker("rounding", len(schemes))
            for name, (bits, group) in schemes.items():
                state[name] = round_matrix(wide(state[name]), bits, group, what=name)
                tick()
        _tables(recipe, state, config)
        _narrow(state, dtype)
        after = _losses(state, config, text, "measuring the quantised model")
        write_quantised(state, config, draft.path, dtype=dtype, pack_tables=recipe.table == "packed")
        tokenizer.save(draft.path, chat_template=_template_source(source))
        file_bytes = sum(file.stat().st_size for file in draft.path.glob("*.safetensors"))
        figures = Figures(
            groups=_groups(text, tokenizer, before, after), before_bytes=before_bytes, file_bytes=file_bytes,
            memory_bytes=sum(weight.nbytes for weight in state.values()), weights=config.parameters(),
            kinds=_kinds(state), raised=raised, method=method, seconds=time.monotonic() - started,
            text=str(chosen or recipe.calibration) if text else None,
            calibrated=tokens_in(text.calibration) if text and method == "gptq" else 0,
        )  # fmt: skip
        draft.metrics.extend(figures.metrics())
        draft.model.update(describe_model(config))
        draft.step |= {
            "method": method, "seconds": round(figures.seconds, 1), "formats": figures.kinds, "raised": raised,
            "file_bytes": file_bytes, "calibration_tokens": figures.calibrated,
        }  # fmt: skip
        for line in lines(figures):
            say(line)
        base = (passport or {}).get("name") or source.name
        (draft.path / "README.md").write_text(
            card(figures, name=recipe.model_name or out.name, base=str(base), licence=recipe.model_licence or declared,
                 packed=recipe.table == "packed", dtype=str(dtype).removeprefix("torch."), words=words),
            encoding="utf-8",
        )  # fmt: skip
    return open_artifact(out)


def _check(recipe: QuantizeRecipe, source: Path) -> None:
    if recipe.group < 0 or recipe.group == 1:
        raise UserError(
            f"group is {recipe.group}: give 32, 128 or another number that divides the rows, or 0 for whole rows"
        )
    for name in ("calibration_tokens", "eval_tokens"):
        if getattr(recipe, name) <= 0:
            raise UserError(f"{name} must be positive, not {getattr(recipe, name)}")
    if recipe.mixed and recipe.to != "int4":
        raise UserError("mixed keeps some layers of an int4 model at int8: give --to int4, or leave mixed out")
    if recipe.bits and not recipe.mixed:
        raise UserError("bits is the budget of mixed: give --mixed too, or leave bits out")
    if source.is_dir() and is_quantised(source):
        raise UserError(f"{recipe.model} is quantised already: quantise the model that it was made from")
    if source.is_file() and is_quantised_gguf(source):
        raise UserError(
            f"{recipe.model} is quantised already: rounding twice only loses; give an F16, BF16 or F32 file"
        )


def _schemes(recipe: QuantizeRecipe, state: dict[str, Tensor | QuantTensor], config: ModelConfig) -> dict[str, Scheme]:
    """Bits and group of each matrix in the layers that is not kept."""
    bits = BITS[recipe.to]
    names = [name for name, shape in expected_shapes(config) if len(shape) == 2 and name not in (TABLE, HEAD)]
    for pattern in recipe.keep:
        if not any(_fits(pattern, name) for name in (*names, TABLE, HEAD)):
            raise UserError(f"keep: no weight fits {pattern!r}; one is called {names[0]!r}")
    chosen = {}
    for name in names:
        if any(_fits(pattern, name) for pattern in recipe.keep):
            continue
        columns = state[name].shape[1]
        group = recipe.group or columns
        if columns % group or group * bits % 8:
            fits = [size for size in (128, 64, 32, 16) if all(state[n].shape[1] % size == 0 for n in names)]
            advice = f"--group {fits[0]}" if fits else f"--keep {name.rsplit('.', 2)[-2]}"
            raise UserError(
                f"--group {recipe.group} does not divide the rows of {name}, which have {columns}: give {advice}"
            )
        if columns * bits % 32:
            raise UserError(
                f"{name} has rows of {columns}, and {bits}-bit numbers are stored eight or four together: --keep it"
            )
        chosen[name] = (bits, group)
    if not chosen:
        raise UserError("keep: every layer is kept, so there is nothing to quantise")
    if recipe.mixed and (least := sum(_bits(state, chosen))) and recipe.bits and recipe.bits < least:
        raise UserError(
            f"bits: {recipe.bits:g} is less than plain int4 takes ({least:.3g}): give more, or a larger --group"
        )
    return chosen


def _bits(state: dict[str, Tensor | QuantTensor], schemes: dict[str, Scheme]) -> list[float]:
    """What each matrix adds to the average bits a weight."""
    sizes = {name: math.prod(state[name].shape) for name in schemes}
    total = sum(sizes.values())
    return [(bits + 16 / group) * sizes[name] / total for name, (bits, group) in schemes.items()]


def _fits(pattern: str, name: str) -> bool:
    """Whether a pattern means a weight: its whole name with wildcards, or a part between dots such as ``down_proj``."""
    return fnmatch.fnmatchcase(name, pattern) or pattern in name.split(".")


def _text(
    recipe: QuantizeRecipe, source: Path, tokenizer: Tokenizer, config: ModelConfig
) -> tuple[Text | None, str | None, str]:
    """The text, where it lies when it was found in the passport, and a line about it."""
    found = None if recipe.calibration else bundled_data(recipe.model)
    ref = recipe.calibration or found
    if ref is None:
        needs = "GPTQ" if recipe.method == "gptq" else "mixed precision" if recipe.mixed else None
        if needs:
            raise UserError(
                f"{needs} needs text, and what {recipe.model} was trained on is not here: give --calibration"
            )
        return None, None, "no text is here to calibrate on, so the loss is not measured (give --calibration for both)"
    text = read_text(
        ref, tokenizer, _template(source), config, tokens=recipe.calibration_tokens, held_out=recipe.eval_tokens,
        seed=recipe.seed,
    )  # fmt: skip
    held = tokens_in(flat(text.held_out))
    origin = f"{ref}, which the passport names" if found else str(ref)
    return (
        text,
        found,
        f"{tokens_in(text.calibration):,} tokens to calibrate on, {held:,} to measure with, from {origin}",
    )


def _template(source: Path) -> Any:
    try:
        return template_of(source)
    except UserError:
        return None  # a base model; chats as calibration are then refused by name


def _template_source(source: Path) -> str | None:
    template = _template(source)
    return template.source if template else None


def _losses(
    state: dict[str, Tensor | QuantTensor], config: ModelConfig, text: Text | None, what: str
) -> dict[str, float]:
    """The summed loss of each held-out group."""
    if text is None:
        return {}
    found = iter(measure(state, config, flat(text.held_out), _ticker(what, config.num_hidden_layers)))
    return {name: sum(next(found) for _ in batches) for name, batches in text.held_out.items()}


def _mix(
    recipe: QuantizeRecipe, state: dict[str, Tensor | QuantTensor], config: ModelConfig, text: Text,
    schemes: dict[str, Scheme],
) -> tuple[dict[str, Scheme], list[str]]:  # fmt: skip
    some, have = [], 0
    for batch in text.calibration:
        if have < MIXED_TOKENS:
            some.append(batch)
            have += batch.tokens
    rises = sensitivity(state, config, some, schemes, _ticker("measuring each layer's loss", config.num_hidden_layers))
    budget = recipe.bits or sum(_bits(state, schemes)) + MIXED_EXTRA
    made, raised = choose(rises, state, schemes, budget)
    names = [f"{layer}.{unit}" for layer, unit in raised]
    say(f"int8 for {len(raised)} of {len(rises)} parts, those that lose most a bit: {', '.join(names) or 'none fits'}")
    return made, names


def _tables(recipe: QuantizeRecipe, state: dict[str, Tensor | QuantTensor], config: ModelConfig) -> None:
    """Round the embedding and the output matrix, where the recipe says so.

    An output matrix of its own is packed like the layers. An embedding beside it costs no time and stays, unless packed.
    """

    def kept(name: str) -> bool:
        return recipe.table == "keep" or any(_fits(pattern, name) for pattern in recipe.keep)

    columns = config.hidden_size
    group = 32 if columns % 32 == 0 else columns
    if HEAD in state and not kept(HEAD):
        state[HEAD] = round_matrix(wide(state[HEAD]), 8, group, what=HEAD)
    if not kept(TABLE) and (HEAD not in state or recipe.table == "packed"):
        table = wide(state[TABLE])
        packed = recipe.table == "packed"
        state[TABLE] = round_matrix(table, 8, group, what=TABLE) if packed else power_of_two(table.numpy(), group)


def _narrow(state: dict[str, Tensor | QuantTensor], dtype: torch.dtype) -> None:
    """Matrices that stay plain, in the dtype they will be stored in, so that what is measured is what is written."""
    for name, weight in state.items():
        if isinstance(weight, Tensor) and weight.ndim == 2:
            state[name] = weight.to(dtype)


def _groups(
    text: Text | None, tokenizer: Tokenizer, before: dict[str, float], after: dict[str, float]
) -> list[dict[str, Any]]:
    """A row a held-out group: name, tokens, loss before and after in nats a token, bytes of text."""
    if text is None:
        return []
    sizes = text_bytes(tokenizer)
    rows = []
    for name, batches in text.held_out.items():
        n = count(batches)
        length = sum(int(sizes[b.targets[(b.targets >= 0) & (b.targets < len(sizes))]].sum()) for b in batches)
        rows.append({"name": name, "n": n, "before": before[name] / n, "after": after[name] / n, "bytes": length})
    return rows


def _kinds(state: dict[str, Tensor | QuantTensor]) -> dict[str, int]:
    """Weights by number format: ``{"int4 g32": 7526400, ...}``."""
    kinds: dict[str, int] = {}
    for weight in state.values():
        kind = describe(weight)
        kinds[kind] = kinds.get(kind, 0) + math.prod(weight.shape)
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def _ticker(what: str, steps: int) -> Callable[[], None]:
    """Says how far it is, every ten seconds."""
    done, last = 0, time.monotonic()

    def tick() -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            say(f"{what}: {done} of {steps}")

    return tick
