"""Stage ``pretrain``: tokens -> a base model, from scratch or from an earlier model (continued pretraining)."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from criadero.artifact import Artifact, create, open_artifact, resolve
from criadero.card import read_words, write_card
from criadero.errors import UserError
from criadero.model import Llama, ModelConfig
from criadero.tokenizer import Tokenizer, load_tokenizer
from criadero.train import fast, gpu
from criadero.train.batches import IGNORE, Batch, TokenBatches, TokenFile, held_out_batches
from criadero.train.checkpoint import resumed_dtype
from criadero.train.hardware import choose_dtype, keep_memory, peak_memory_bytes
from criadero.train.loop import Plan, train
from criadero.train.loss import next_token_loss
from criadero.train.memory import check_memory, needs
from criadero.train.optim import Optimizer
from criadero.train.progress import say
from criadero.train.track import HELP, Tracker, check_tracker, tracker


@dataclass(frozen=True)
class Mix:
    """How often a source's documents are read in one pass: ``times`` while the learning rate is high, ``anneal`` while it
    falls (None: the same). 0 leaves the source out; 2.5 is twice, and a third time for half of the documents."""

    source: str
    times: float = 1.0
    anneal: float | None = None


@dataclass(frozen=True)
class PretrainRecipe:
    """What a pretraining run needs to know. The shape fields are Hugging Face's."""

    data: str = field(metadata={"help": "a tokens artifact (criadero data pack)"})
    base: str | None = field(default=None, metadata={"help": "go on from this model instead of random weights"})
    tokens: int = field(default=10_000_000, metadata={"help": "tokens to train on, repeats counted"})
    hidden_size: int = field(default=320, metadata={"help": "width of the residual stream"})
    intermediate_size: int = field(default=864, metadata={"help": "width of the feed-forward layer"})
    num_hidden_layers: int = field(default=7, metadata={"help": "blocks"})
    num_attention_heads: int = field(default=5, metadata={"help": "query heads"})
    num_key_value_heads: int = field(default=1, metadata={"help": "key-value heads; divides the query heads"})
    context: int = field(default=512, metadata={"help": "tokens in a row: max_position_embeddings"})
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    tie_word_embeddings: bool = field(default=True, metadata={"help": "output layer shares the embedding"})
    batch_tokens: int = field(default=8192, metadata={"help": "tokens an optimizer step"})
    micro_tokens: int = field(default=8192, metadata={"help": "tokens computed at once; bounds the memory"})
    optimizer: Literal["muon", "adamw"] = field(default="muon", metadata={"help": "Muon in the blocks, or AdamW"})
    lr: float = field(default=3e-3, metadata={"help": "peak learning rate"})
    schedule: Literal["wsd", "cosine"] = field(default="wsd", metadata={"help": "warm up, hold, fall; or cosine"})
    warmup: float = field(default=0.02, metadata={"help": "fraction of the steps"})
    decay: float = field(default=0.3, metadata={"help": "fraction of the steps over which wsd falls"})
    weight_decay: float = field(default=0.1, metadata={"help": "on matrices"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    isolate_documents: bool = field(default=True, metadata={"help": "no token sees another document in its row"})
    mix: tuple[Mix, ...] = field(default=(), metadata={"help": "[[mix]] tables: how often each source is read"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "auto measures first"})
    gradient_checkpointing: gpu.Switch = field(default="auto", metadata={"help": gpu.CHECKPOINTING})
    compile: gpu.Switch = field(default="auto", metadata={"help": gpu.COMPILE})
    seed: int = field(default=1, metadata={"help": "weights and data order"})
    eval_every: int = field(default=200, metadata={"help": "steps between held-out losses"})
    eval_tokens: int = field(default=20_000, metadata={"help": "held-out tokens a language and kind"})
    save_minutes: float = field(default=5.0, metadata={"help": "between resume points"})
    track: Tracker = field(default="none", metadata={"help": HELP})
    model_name: str = field(default="", metadata={"help": "name in the passport and the card; default: the folder's"})
    model_licence: str = field(
        default="", metadata={"help": "licence you give the weights; recorded, and shown in the card"}
    )
    card: str | None = field(default=None, metadata={"help": "a Markdown file with your own words for the model card"})


def pretrain(recipe: PretrainRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Train and seal a ``base`` artifact: weights, tokenizer, template, metrics, curves, and the table of its sources.

    Killed at any moment, the same call goes on from the last resume point.
    """
    from criadero.checkpoints import load_model, save_hf

    keep_memory()
    words = read_words(recipe.card)
    tokens_folder = resolve(recipe.data)
    train_file, held_out = TokenFile.open(tokens_folder, "train"), TokenFile.open(tokens_folder, "held_out")
    tokenizer = load_tokenizer(tokens_folder)
    _check(recipe, train_file)
    check_tracker(recipe.track)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.base:
        model = load_model(recipe.base, dtype=torch.float32)
        config = model.config
    else:
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=recipe.hidden_size, intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers, num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads, max_position_embeddings=recipe.context,
            rope_theta=recipe.rope_theta, tie_word_embeddings=recipe.tie_word_embeddings,
            bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id,
        )  # fmt: skip
        model = Llama(config)
        model.initialise(recipe.seed)
    if recipe.base:
        _check_base(recipe, config, tokenizer)

    rows = max(1, min(recipe.micro_tokens, recipe.batch_tokens) // recipe.context)
    micro_batches = max(1, round(recipe.batch_tokens / (rows * recipe.context)))
    steps = math.ceil(recipe.tokens / (rows * micro_batches * recipe.context))
    with create(
        out, kind="base", name=recipe.model_name or None, licence=recipe.model_licence or None,
        recipe=recipe, seeds={"seed": recipe.seed}, overwrite=overwrite,
        resume=resume,
    ) as draft:  # fmt: skip
        draft.add_input("trained_on", tokens_folder)
        if recipe.base:
            draft.add_input("finetune_of", recipe.base)
        dtype, why = choose_dtype(resumed_dtype(draft.path / "resume", recipe.dtype), config, device)
        model = model.to(device=device, dtype=dtype)
        model.train()
        stable = _batches(recipe, train_file, rows, dtype, device, annealing=False)
        falling = _batches(recipe, train_file, rows, dtype, device, annealing=True)
        change = steps - round(recipe.decay * steps) if recipe.schedule == "wsd" else steps
        evaluation = held_out_batches(
            held_out, length=recipe.context, rows=rows, dtype=dtype, max_tokens=recipe.eval_tokens, device=device
        )
        sizes = text_bytes(tokenizer)

        def batch_at(n: int) -> Batch:
            return (stable if n < change * micro_batches else falling)(n)

        per_step = rows * micro_batches * recipe.context
        say(f"model: {config.parameters():,} parameters, context {recipe.context}, vocabulary {tokenizer.vocab_size}")
        say(f"data: {len(train_file.ids):,} tokens in {len(train_file.docs):,} documents")
        say(
            f"run: {steps} steps of {per_step:,} tokens, {steps * per_step / stable.tokens_per_epoch:.2f} passes over the mix"
        )
        plain, saving = (
            needs(
                config, method="full", trained=config.parameters(), micro_tokens=rows * recipe.context, length=recipe.context,
                dtype=dtype, keep_best=False, compiled=fast.obstacle(model) is None, checkpointing=again, device=device,
            ) for again in (False, True)
        )  # fmt: skip
        memory, how = gpu.prepare(model, recipe.gradient_checkpointing, recipe.compile, plain, saving)
        code = ", ".join(filter(None, (fast.describe(model), how)))
        say(f"computing in {why}, with {code}; {torch.get_num_threads()} threads")
        say(f"memory: about {memory.words()}")
        check_memory(memory.total, device)
        optimizer = Optimizer(model.named_parameters(), method=recipe.optimizer, weight_decay=recipe.weight_decay)
        plan = Plan(
            steps=steps, micro_batches=micro_batches, lr=recipe.lr, schedule=recipe.schedule, warmup=recipe.warmup,
            decay=recipe.decay, clip=recipe.clip, seed=recipe.seed, eval_every=recipe.eval_every,
            save_minutes=recipe.save_minutes,
        )  # fmt: skip
        with tracker(recipe.track, out, draft.path, dataclasses.asdict(recipe)) as track:
            done = train(
                model, optimizer, batch_at, next_token_loss, plan, draft.path, about={"dtype": str(dtype)},
                evaluate=lambda: evaluate(model, evaluation, sizes), track=track, label="pretraining",
            )  # fmt: skip
        final = evaluate(model, evaluation, sizes)
        for name, scores in final.items():
            say(f"held out, {name}: loss {scores['loss']:.3f}, {scores['bits_per_byte']:.3f} bits per byte")
            draft.metrics.extend(
                {"suite": "held_out", "metric": metric, "slice": name, "value": scores[metric], "n": scores["tokens"]}
                for metric in ("loss", "bits_per_byte")
            )
        _finish_metrics(draft.path, done, final)
        save_hf(model, config, draft.path, dtype=torch.bfloat16 if dtype == torch.bfloat16 else None)
        copy_tokenizer(tokens_folder, draft.path)
        draft.data.update(_data_table(tokens_folder, recipe))
        draft.model.update(describe(config))
        draft.step.update(
            {
                "tokens": done["tokens"],
                "steps": done["steps"],
                "seconds": round(done["seconds"], 1),
                "dtype": str(dtype).removeprefix("torch."),
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        write_card(
            draft, out, name=recipe.model_name, kind="base", licence=recipe.model_licence, base=recipe.base, words=words
        )
    return open_artifact(out)


def _check(recipe: PretrainRecipe, file: TokenFile) -> None:
    for name in ("tokens", "context", "batch_tokens", "micro_tokens"):
        if getattr(recipe, name) <= 0:
            raise UserError(f"{name} must be positive, not {getattr(recipe, name)}")
    if not 0 < recipe.lr < 1:
        raise UserError(f"lr must lie between 0 and 1, not {recipe.lr:g}: nothing would be learned, or all be lost")
    for name, low, high in (("warmup", 0, 1), ("decay", 0, 1), ("weight_decay", 0, 10), ("clip", 0, math.inf),
                            ("eval_every", 0, math.inf), ("eval_tokens", 0, math.inf), ("save_minutes", 0, math.inf)):  # fmt: skip
        if not low <= getattr(recipe, name) <= high:
            bounds = f"between {low} and {high}" if high < math.inf else "0 or more"
            raise UserError(f"{name} must be {bounds}, not {getattr(recipe, name):g}")
    if recipe.warmup + (recipe.decay if recipe.schedule == "wsd" else 0) > 1:
        raise UserError(
            f"warmup {recipe.warmup:g} and decay {recipe.decay:g} are fractions of one run: together at most 1"
        )
    names = {source["name"] for source in file.sources}
    for mix in recipe.mix:
        if mix.source not in names:
            raise UserError(f"mix names a source {mix.source!r} that the data lacks; it has {', '.join(sorted(names))}")
        if mix.times < 0 or (mix.anneal or 0) < 0:
            raise UserError(f"mix: times and anneal of {mix.source} must not be negative")


def _check_base(recipe: PretrainRecipe, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Going on from a model needs its context and, id for id, its vocabulary."""
    from criadero.checkpoints import tokenizer_of

    if recipe.context > config.max_position_embeddings:
        raise UserError(
            f"context is {recipe.context}, but {recipe.base} was made for {config.max_position_embeddings}; lower context"
        )
    assert recipe.base
    own = tokenizer_of(recipe.base)
    both = min(own.vocab_size, tokenizer.vocab_size)
    odd = next((i for i in range(both) if _bytes(own, i) != _bytes(tokenizer, i)), None)
    if odd is not None or tokenizer.vocab_size > config.vocab_size:
        what = (
            f"token {odd} differs"
            if odd is not None
            else f"{tokenizer.vocab_size} ids for {config.vocab_size} embeddings"
        )
        raise UserError(
            f"{recipe.data}: its tokens are not of the vocabulary of {recipe.base} ({what}); pack the data again with that tokenizer"
        )


def text_bytes(tokenizer: Tokenizer) -> torch.Tensor:
    """Bytes of text that each token stands for, ``[V]``; a special token's name is no text, so it stands for none."""
    special = set(tokenizer.special.values())
    return torch.tensor([0 if i in special else len(_bytes(tokenizer, i)) for i in range(tokenizer.vocab_size)])


def _bytes(tokenizer: Tokenizer, id: int) -> bytes:
    try:
        return tokenizer.token_bytes(id)
    except UserError:  # a number that the vocabulary leaves out
        return b""


def _batches(
    recipe: PretrainRecipe, file: TokenFile, rows: int, dtype: torch.dtype, device: str, *, annealing: bool
) -> TokenBatches:
    mix = {m.source: m.anneal if annealing and m.anneal is not None else m.times for m in recipe.mix}
    weights = [mix.get(source["name"], 1.0) for source in file.sources]
    return TokenBatches(
        file, weights=weights, length=recipe.context, rows=rows, seed=recipe.seed + (7919 if annealing else 0),
        dtype=dtype, device=device, isolate=recipe.isolate_documents,
    )  # fmt: skip


@torch.no_grad()
def evaluate(model: Llama, groups: Mapping[str, Sequence[Batch]], sizes: torch.Tensor) -> dict[str, dict[str, float]]:
    """Held-out loss (nats a token) and bits per byte by group; ``sizes`` ``[V]``: bytes of text of each token.

    Bits per byte is what all predicted tokens cost, special ones too, over the bytes of text among them.
    """
    model.eval()
    out: dict[str, dict[str, float]] = {}
    for name, batches in groups.items():
        total, count, length = 0.0, 0, 0
        for batch in batches:
            loss, n, _ = next_token_loss(model, batch)
            total, count = total + float(loss), count + n
            length += int(sizes[batch.targets[batch.targets != IGNORE].cpu()].sum())
        if count:
            out[name] = {"loss": total / count, "bits_per_byte": total / math.log(2) / max(1, length), "tokens": count}
    model.train()
    return out


def describe(config: ModelConfig) -> dict[str, Any]:
    """The passport's ``model`` table."""
    return {
        "architecture": "llama", "params": config.parameters(), "context": config.max_position_embeddings,
        "vocab": config.vocab_size, "layers": config.num_hidden_layers, "hidden_size": config.hidden_size,
        "modalities": ["text"],
    }  # fmt: skip


def copy_tokenizer(source: Path, target: Path) -> None:
    """Bring the tokenizer's files and the chat template along: the template travels with the weights."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _data_table(tokens_folder: Path, recipe: PretrainRecipe) -> dict[str, Any]:
    """What the tokens artifact says of its sources, with this run's weights beside them."""
    try:
        data = dict(open_artifact(tokens_folder).passport.get("data") or {})
    except UserError:
        return {"documents": "unknown: the tokens folder has no passport"}
    mix = {m.source: m for m in recipe.mix}
    data["by_source"] = [
        row | ({"times": mix[row["name"]].times, "anneal": mix[row["name"]].anneal} if row.get("name") in mix else {})
        for row in data.get("by_source", [])
    ]
    return data


def _finish_metrics(folder: Path, done: dict[str, Any], final: dict[str, Any]) -> None:
    """Put the last evaluation on the last line of metrics.jsonl, and draw the curves."""
    import json

    from criadero.train.curves import read_metrics, write_curves

    lines = read_metrics(folder / "metrics.jsonl")
    if lines:
        lines[-1]["held_out"] = {name: {k: round(v, 6) for k, v in scores.items()} for name, scores in final.items()}
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_curves(folder, title=f"{done['tokens'] / 1e6:.1f}M tokens in {done['steps']} steps")
