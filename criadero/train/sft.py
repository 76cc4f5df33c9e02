"""Stage ``sft``: chats -> a tuned model. Low-rank adapters by default, or every weight with ``method = "full"``.

The chats are rendered with the template that travels with the base model; the loss is on every assistant turn and its end
token. With ``lora`` the result is an ``adapter`` artifact in PEFT's format, unless ``merged`` asks for whole weights.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from criadero import lora, places
from criadero.artifact import BUNDLED, Artifact, create, open_artifact, resolve
from criadero.card import read_words, write_card
from criadero.chat import Example, Template, builtin_template
from criadero.config import stretched
from criadero.data.chats import ChatFile, Shape
from criadero.errors import UserError
from criadero.model import Llama, ModelConfig
from criadero.tokenizer import Tokenizer
from criadero.train import fast, gpu
from criadero.train.answers import answers, choose
from criadero.train.batches import Batch, ExampleBatches, pack_examples, rows_to_batch
from criadero.train.checkpoint import resumed_dtype, resumed_matmul
from criadero.train.curves import read_metrics
from criadero.train.distil import (
    Lesson,
    TaughtBatches,
    check_student,
    distil_loss,
    held_out_batches,
    is_logits,
    mean_divergence,
    open_lesson,
)
from criadero.train.examples import Prepared, find_data, prepare
from criadero.train.hardware import choose_dtype, keep_memory, peak_memory_bytes
from criadero.train.loop import Plan, train
from criadero.train.loss import next_token_loss
from criadero.train.memory import check_disk, check_memory, needs, stored_bytes
from criadero.train.memory import fit as fit_memory
from criadero.train.optim import Optimizer
from criadero.train.preflight import Report, check, fitted, measure_speed, pieces, show
from criadero.train.pretrain import describe
from criadero.train.progress import say
from criadero.train.report import Comparison, write_report
from criadero.train.task import names, read_task, score, work
from criadero.train.track import HELP, Tracker, check_tracker, tracker

ROW = 256  # tokens in a packed row, or as many as the longest chat: attention is quadratic in it
# Peak learning rate times the hidden size: 4e-3 for LoRA at 320 was the best of a few (docs/log.md), 3e-4 at 4096 is customary;
# 2e-5 for full tuning at 4096 is Llama 2's (section 3.1).
LR = {"lora": 1.28, "qlora": 1.28, "dora": 1.28, "full": 0.082}
INT8_METHODS = ("lora", "qlora")
INT8_AUTO = True  # where it is fast: held-out losses change far less than between seeds (docs/log.md)
MEASURES = 10  # held-out losses in a run
GENERATED = 10  # tokens that are trained on in the time of one that is generated
MEASURING = 0.1  # of the time of training, at most, where that leaves two of them
QUESTIONS = 6  # compared in the report
SHORT = 40  # tokens of an answer on the way
MAX_ALPHA = 1e4  # hundreds of times what is customary; far above it the products overflow


@dataclass(frozen=True)
class SftRecipe:
    """What customising needs to know; every field has a default but the base and the data."""

    base: str = field(metadata={"help": "a bundled model, a folder of Criadero or Hugging Face, or a .gguf file"})
    data: str = field(
        metadata={"help": "chats: .jsonl .json .parquet .csv, in any of four shapes; or a dataset artifact"}
    )
    licence: str = field(default="unknown", metadata={"help": "licence of your data, recorded in the passport"})
    held_out: str | None = field(
        default=None,
        metadata={"help": "chats to measure on; default: the dataset's held-out split, or a part of the data"},
    )
    held_out_share: float = field(default=0.1, metadata={"help": "part kept apart when held_out is not given"})
    distil: float = field(
        default=0.5,
        metadata={
            "help": "when the data are a teacher's logits: part of the loss that follows it, the rest follows the text"
        },
    )
    method: Literal["lora", "qlora", "dora", "full"] = field(
        default="lora",
        metadata={"help": "low-rank adapters; on a base kept in 4 or 8 bits; with lengths apart (DoRA); every weight"},
    )
    lora_rank: int = field(default=16, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=32.0, metadata={"help": "adapter scale times rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters"})
    lora_targets: tuple[str, ...] = field(default=lora.ALL_LINEAR, metadata={"help": "linear layers that get one"})
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(rank)"})
    lora_plus: float = field(
        default=1.0, metadata={"help": "learning rate of the adapters' B over that of A (LoRA+; its paper: 16)"}
    )
    base_matmul: Literal["auto", "exact", "int8"] = field(
        default="auto",
        metadata={
            "help": "how learning multiplies with the base's weights under adapters: exact, or in 8-bit whole numbers, products two to "
            "three times as fast; auto: int8 where the processor has instructions for it. Held-out losses are always exact"
        },
    )
    merged: bool = field(default=False, metadata={"help": "fold the adapter in and seal whole weights"})
    template: str | None = field(default=None, metadata={"help": "give a base without one this built-in chat template"})
    epochs: float = field(default=0.0, metadata={"help": "passes over the chats; 0: from 3 to 30, for about 200 steps"})
    context: int = field(
        default=0,
        metadata={
            "help": "context of the result in tokens, longer than the base's: positions are interpolated (RoPE, linear), which goes with "
            "method full, or merged; 0: the base's"
        },
    )
    max_length: int = field(default=0, metadata={"help": "longest example in tokens; 0: the model's context"})
    new_tokens: tuple[str, ...] = field(
        default=(), metadata={"help": "special tokens to add, which the template writes; they begin as the mean of all"}
    )
    too_long: Literal["refuse", "drop", "truncate", "split"] = field(
        default="refuse",
        metadata={
            "help": "chats longer than max_length: refuse the run, drop them, cut them, split them between rounds"
        },
    )
    train_on: Literal["all", "last", "text"] = field(
        default="all",
        metadata={
            "help": "learn every assistant turn, or the last; text: the data are plain documents, learn all of them"
        },
    )
    batch_tokens: int = field(
        default=0, metadata={"help": "tokens an optimizer step; 0: a twentieth of the data, from 512 to 4096"}
    )
    micro_tokens: int = field(default=4096, metadata={"help": "tokens computed at once; bounds the memory"})
    optimizer: Literal["adamw", "muon"] = field(default="adamw", metadata={"help": "AdamW, or Muon in the blocks"})
    lr: float = field(default=0.0, metadata={"help": "peak learning rate; 0: 1.28 (full: 0.082) / hidden_size"})
    schedule: Literal["cosine", "wsd", "constant"] = field(default="cosine", metadata={"help": "its course"})
    warmup: float = field(default=0.05, metadata={"help": "fraction of the steps"})
    weight_decay: float = field(default=0.0, metadata={"help": "on matrices"})
    clip: float = field(default=1.0, metadata={"help": "largest gradient norm"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "auto measures first"})
    gradient_checkpointing: gpu.Switch = field(default="auto", metadata={"help": gpu.CHECKPOINTING})
    compile: gpu.Switch = field(default="auto", metadata={"help": gpu.COMPILE})
    fit: float = field(
        default=0.0,
        metadata={
            "help": "GB of memory to stay in: picks method, max_length and micro_tokens, and says why; 0: as given"
        },
    )
    eval_every: int = field(
        default=0, metadata={"help": "steps between held-out losses; 0: ten in a run, fewer where they would take long"}
    )
    patience: int = field(
        default=3,
        metadata={"help": "end after so many held-out losses in a row that are not the lowest; 0: never early"},
    )
    eval_task: str | None = field(
        default=None,
        metadata={
            "help": "a .jsonl file of questions with one right answer, or with choices, perhaps of several tasks, asked at each "
            "held-out loss: the part that is right"
        },
    )
    samples: int = field(default=2, metadata={"help": "held-out questions answered at each of them"})
    track: Tracker = field(default="none", metadata={"help": HELP})
    seed: int = field(default=1, metadata={"help": "adapters, split and order"})
    skip_bad: bool = field(default=False, metadata={"help": "count malformed lines instead of refusing them"})
    save_minutes: float = field(default=5.0, metadata={"help": "between resume points"})
    model_name: str = field(default="", metadata={"help": "name in the passport and the card; default: the folder's"})
    model_licence: str = field(
        default="", metadata={"help": "licence you give the weights; recorded, and shown in the card"}
    )
    card: str | None = field(default=None, metadata={"help": "a Markdown file with your own words for the model card"})


def sft(recipe: SftRecipe, out: Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Customise ``recipe.base`` with ``recipe.data`` and seal the result at ``out``.

    Everything that can be wrong with the input is found before training starts. Killed at any moment, the same call goes on
    from the last resume point.
    """
    from criadero.checkpoints import holds_quantised, load_config, load_frozen, load_model, tokenizer_of, weights_sample

    keep_memory()
    base_path, data_path = resolve(recipe.base), find_data(recipe.data)
    check_recipe(recipe)
    words = read_words(recipe.card)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapts = recipe.method != "full"
    kind = "adapter" if adapts and not recipe.merged else "chat" if template_for(recipe, base_path) else "base"
    _check_base(base_path, kind)
    _check_method(recipe, base_path)
    sources, licence = sources_of(recipe, data_path)
    with create(
        out, kind=kind, name=recipe.model_name or None, licence=recipe.model_licence or None,
        recipe=recipe, seeds={"seed": recipe.seed},
        overwrite=overwrite, resume=resume,
    ) as draft:  # fmt: skip
        tokenizer, template, config = tokenizer_of(base_path), template_for(recipe, base_path), load_config(base_path)
        known = tokenizer.vocab_size
        if recipe.context:
            config = _longer(recipe, config)
        lesson = open_lesson(data_path) if is_logits(data_path) else None
        if lesson:
            check_student(lesson, recipe, tokenizer)
            template = lesson.template
        if recipe.new_tokens:
            tokenizer = tokenizer.with_special(recipe.new_tokens)
            config = dataclasses.replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
        if adapts:
            lora.check_rank(recipe.lora_rank, recipe.lora_targets, config)
        context = context_of(recipe, config)
        prepared = (
            _prepared_before(lesson, recipe.base, context)
            if lesson
            else prepare(recipe, data_path, tokenizer, template, context)
        )
        task = read_task(Path(recipe.eval_task), tokenizer, template, context) if recipe.eval_task else []
        objective = distil_loss(recipe.distil, lesson.temperature) if lesson else next_token_loss
        check(prepared.report)
        new_ids = _new_ids(recipe, tokenizer, prepared.train)
        _check_ids(prepared, config, recipe.base)
        draft.add_input("finetune_of", recipe.base)
        draft.add_input("trained_on", recipe.data, licence=licence)
        if recipe.held_out:
            draft.add_input("evaluated_on", recipe.held_out)
        if recipe.eval_task:
            draft.add_input("evaluated_on", recipe.eval_task)
        dtype, why = choose_dtype(resumed_dtype(draft.path / "resume", recipe.dtype), config, device)
        packed = stored_bytes(base_path) if holds_quantised(base_path) else None
        if recipe.fit:
            longest = max(len(example.ids) for example in [*prepared.train, *prepared.held_out])
            found = fit_memory(
                config, budget=recipe.fit * 1e9, method=recipe.method, rank=recipe.lora_rank, targets=recipe.lora_targets,
                longest=longest, row=row_length(prepared, context), micro_tokens=min(recipe.micro_tokens, _step_tokens(recipe, prepared)),
                dtype=dtype, packed=None if recipe.merged else packed, base=recipe.base,
                may_cut=(recipe.too_long != "refuse" or recipe.train_on == "text") and not lesson,
                compiled=device == "cpu" and fast.compiled(), checkpointing=recipe.gradient_checkpointing, device=device,
            )  # fmt: skip
            recipe = dataclasses.replace(recipe, method=found.method, micro_tokens=found.rows * found.length)  # type: ignore[arg-type]
            if found.checkpointing:
                recipe = dataclasses.replace(recipe, gradient_checkpointing="on")
            adapts = recipe.method != "full"
            if found.length < longest:
                context = found.length
                prepared = prepare(recipe, data_path, tokenizer, template, context)
                check(prepared.report)
            length = row_length(prepared, context)
            rows = _rows(recipe, prepared, length)
            say(fitted(found, prepared.report, budget=recipe.fit, longest=longest, rows=rows, length=length))
        if recipe.method == "qlora":
            model = load_frozen(base_path, dtype=dtype, device=device)
        else:
            model = load_model(base_path).to(device=device, dtype=dtype)
        if recipe.context:
            model.config = dataclasses.replace(config, vocab_size=model.config.vocab_size)
        if new_ids:
            lora.add_rows(model, config.vocab_size, known, new_ids)
        if adapts:
            parameters = lora.attach(
                model, rank=recipe.lora_rank, alpha=recipe.lora_alpha, targets=recipe.lora_targets,
                dropout=recipe.lora_dropout, rslora=recipe.rslora, dora=recipe.method == "dora", seed=recipe.seed,
            )  # fmt: skip
            parameters += lora.train_rows(model, new_ids) if new_ids else []
            begun = resumed_matmul(draft.path / "resume", recipe.base_matmul)
            in_int8 = _multiplies_in_int8(recipe, fast.obstacle(model), begun)
            if in_int8:
                fast.multiply_in_int8(model)
        else:
            parameters = list(model.named_parameters())
        pad = tokenizer.pad_id if tokenizer.pad_id is not None else 0
        length = row_length(prepared, context)
        lr = recipe.lr or LR[recipe.method] / config.hidden_size
        batch_tokens = _step_tokens(recipe, prepared)
        rows = _rows(recipe, prepared, length)
        batches = ExampleBatches(
            prepared.train, row_length=length, rows=rows, pad=pad, seed=recipe.seed, dtype=dtype, device=device
        )
        if lesson:
            batches = TaughtBatches(batches, lesson.train)  # type: ignore[assignment]
        micro = max(1, min(round(batch_tokens / (rows * length)), batches.steps_per_epoch))
        epochs = recipe.epochs or min(max(math.ceil(200 * micro / batches.steps_per_epoch), 3), 30)
        steps = max(1, math.ceil(epochs * batches.steps_per_epoch / micro))
        evaluation = example_batches(prepared.held_out, length, rows, pad, dtype, device)
        read, written = work(task, tokenizer)
        each = (sum(len(example.ids) for example in prepared.held_out) + read) / 3 + GENERATED * written
        every = recipe.eval_every or measure_every(steps, epochs * prepared.report.tokens, each)
        rule = ending(every if evaluation else 0, recipe.patience)
        asked = (
            choose(prepared.kept_apart, tokenizer, template, context, max(QUESTIONS, recipe.samples))
            if template
            else []
        )
        ends = _ends(config, prepared.train, tokenizer)
        trained = sum(p.numel() for _, p in parameters)
        plain, saving = (
            needs(
                config, method=recipe.method, trained=trained, micro_tokens=rows * length, length=length, dtype=dtype,
                weight_bytes=packed if recipe.method == "qlora" else None, keep_best=bool(evaluation),
                compiled=fast.obstacle(model) is None, checkpointing=again, device=device,
            ) for again in (False, True)
        )  # fmt: skip
        memory, how = gpu.prepare(model, recipe.gradient_checkpointing, recipe.compile, plain, saving)
        check_memory(memory.total, device)
        check_disk(dtype.itemsize * (trained if kind == "adapter" else config.parameters()), out)
        speed = measure_speed(model, batches(0), objective)
        show(
            prepared.report, tokenizer, prepared.train[0], base=recipe.base, method=recipe.method, trained=trained,
            total=config.parameters(), steps=steps, tokens=int(epochs * prepared.report.tokens),
            epochs=epochs, batch_tokens=batch_tokens, memory=memory, speed=speed, why=why,
            code=", ".join(filter(None, (fast.describe(model), how))), lr=lr, rule=rule[0],
            measuring=each * (2 + math.ceil(steps / every)) if evaluation or task else 0.0,
        )  # fmt: skip
        before = held_out_loss(model, evaluation)
        if evaluation and not math.isfinite(before["loss"]):
            raise UserError(
                f"{recipe.base}: the held-out loss is not finite before anything is learned, so its weights hold NaN or infinite "
                "numbers: get the base again, or take another"
            )
        taught = held_out_batches(lesson.held_out, length, rows, pad, dtype, device) if lesson else []
        apart = [mean_divergence(model, taught, lesson.temperature)] if lesson else []
        answers_before = answers(model, asked, tokenizer, _listed(ends))

        def right() -> dict[str, Any]:
            return score(model, task, tokenizer, _listed(ends), dtype)

        tasks = [right()] if task else []
        if evaluation:
            say(f"held-out loss before: {before['loss']:.4f} on {before['supervised']:,} supervised tokens")
        optimizer = Optimizer(
            parameters, method=recipe.optimizer, weight_decay=recipe.weight_decay, betas=(0.9, 0.999),
            scales={name: recipe.lora_plus for name, _ in parameters if name.endswith(".lora_B")},
        )  # fmt: skip
        plan = Plan(
            steps=steps, micro_batches=micro, lr=lr, schedule=recipe.schedule, warmup=recipe.warmup, clip=recipe.clip,
            seed=recipe.seed, save_minutes=recipe.save_minutes, eval_every=every, keep_best=bool(evaluation),
            patience=recipe.patience,
        )  # fmt: skip
        derived: dict[str, Any] = {
            "lr": lr,
            "epochs": epochs,
            "batch_tokens": batch_tokens,
            "eval_every": every,
            "row_length": length,
        }
        if adapts:
            derived["base_matmul"] = "int8" if in_int8 else "exact"
        if recipe.fit:
            derived |= {"method": recipe.method, "max_length": context, "micro_tokens": recipe.micro_tokens}
        sampled = asked[: recipe.samples]
        model.train()
        shown = dataclasses.asdict(recipe) | derived | {"dtype": str(dtype).removeprefix("torch.")}
        with tracker(recipe.track, out, draft.path, shown) as track:
            done = train(
                model, optimizer, batches, objective, plan, draft.path, about={"dtype": str(dtype)}, label="tuning",
                evaluate=(lambda: {"chats": held_out_loss(model, evaluation)}) if evaluation else None,
                sample=(lambda: answers(model, sampled, tokenizer, _listed(ends), SHORT)) if sampled else None, track=track,
                task=right if task else None,
                name_batch=lambda n: _named(prepared.places, batches.rows_at(n)),
            )  # fmt: skip
        after = held_out_loss(model, evaluation)
        if evaluation and not math.isfinite(after["loss"]):
            raise UserError(
                f"the held-out loss is not finite after tuning, so nothing is sealed: start over (--no-resume) with a lower lr than {lr:g}"
            )
        if lesson and taught:
            apart.append(mean_divergence(model, taught, lesson.temperature))
            say(f"divergence from the teacher, held out: {apart[0]:.4f} before, {apart[1]:.4f} after")
            draft.metrics += [
                {
                    "suite": "held_out",
                    "metric": "divergence",
                    "slice": name,
                    "value": value,
                    "n": int(before["supervised"]),
                }
                for name, value in zip(("before", "after"), apart, strict=True)
            ]
        if task:
            tasks.append(right())
            shares = {"": [one["accuracy"] for one in tasks]}
            shares |= {name: [one[name]["accuracy"] for one in tasks] for name in names(task)}
            for name, (was, now) in shares.items():
                count = sum(item.task == name or not name for item in task)
                say(f"task{' ' if name else ''}{name}: {was:.0%} of {count} questions right before, {now:.0%} after")
                draft.metrics += [
                    {
                        "suite": f"task {name}".strip(),
                        "metric": "accuracy",
                        "slice": when,
                        "value": value,
                        "n": count,
                    }
                    for when, value in (("before", was), ("after", now))
                ]
        answers_after = answers(model, asked, tokenizer, _listed(ends))
        if evaluation:
            kept = f"; step {done['best_step']} is kept" if done["best_step"] not in (0, done["steps"]) else ""
            say(f"held-out loss after:  {after['loss']:.4f} ({after['loss'] - before['loss']:+.4f}){kept}")
            if not after["loss"] < before["loss"]:
                say("warning: the held-out loss did not fall: more or other examples are needed, or a lower lr")
            draft.metrics += [
                {
                    "suite": "held_out",
                    "metric": "loss",
                    "slice": name,
                    "value": scores["loss"],
                    "n": scores["supervised"],
                }
                for name, scores in (("before", before), ("after", after))
            ]
        config = dataclasses.replace(config, eos_token_id=ends)
        _write(recipe, model, config, tokenizer, template, draft.path, _base_name(recipe.base, out))
        draft.data.update(prepared.report.table(data_path, licence, sources))
        draft.model.update(describe(config) | {"trained_params": trained, "method": recipe.method})
        if kind == "adapter":
            draft.model["base_sample"] = weights_sample(base_path)
        draft.step.update(
            {
                "tokens": done["tokens"],
                "steps": done["steps"],
                "seconds": round(done["seconds"], 1),
                "dtype": str(dtype).removeprefix("torch."),
                "peak_memory_bytes": peak_memory_bytes(),
                "best_step": done["best_step"],
                "ended_early": done["ended_early"],
                "estimated_memory_bytes": memory.total,
                "derived": derived,
            }
        )
        write_report(
            draft.path,
            Comparison(
                name=recipe.model_name or out.name, base=places.told(recipe.base), method=recipe.method, trained=trained,
                total=config.parameters(), before=before["loss"], after=after["loss"], supervised=int(before["supervised"]),
                lines=read_metrics(draft.path / "metrics.jsonl"), best_step=done["best_step"], rule=rule, asked=asked,
                answers_before=answers_before, answers_after=answers_after, counts=vars(prepared.report),
                languages=prepared.report.languages, licence=licence, example=pieces(tokenizer, prepared.train[0]),
                settings=places.told(_given(recipe)), task=[one["accuracy"] for one in tasks], questions=len(task), planned=steps,
                tasks={name: [one[name]["accuracy"] for one in tasks] for name in names(task)},
                derived=derived | {"dtype": str(dtype).removeprefix("torch.")},
            ),
        )  # fmt: skip
        write_card(
            draft, out, name=recipe.model_name, kind=kind, licence=recipe.model_licence, base=recipe.base, words=words
        )
    return open_artifact(out)


def _step_tokens(recipe: SftRecipe, prepared: Prepared) -> int:
    """Tokens an optimizer step."""
    return recipe.batch_tokens or min(max(prepared.report.tokens // 20, 512), 4096)


def _rows(recipe: SftRecipe, prepared: Prepared, length: int) -> int:
    """Rows of ``length`` tokens computed at once."""
    return max(1, min(recipe.micro_tokens, _step_tokens(recipe, prepared)) // length)


def measure_every(steps: int, tokens: float, each: float) -> int:
    """Steps between held-out losses (and what is asked beside them): `MEASURES` in a run, or so many as take `MEASURING` of its time, but
    at least two. ``each``: what one takes, as tokens that are trained on; reading one takes a third of training on it."""
    count = min(MEASURES, max(2, int(MEASURING * tokens / max(1, each))))
    return max(1, math.ceil(steps / count))


def ending(every: int, patience: int) -> tuple[str, str]:
    """How a run is to end, in English and Spanish; ``every`` 0: nothing is held out."""
    if not every:
        return "at the last step: nothing is held out to go by", "en el último paso: no hay nada apartado que lo guíe"
    steps, pasos = ("every step", "en cada paso") if every == 1 else (f"every {every} steps", f"cada {every} pasos")
    kept, queda = "the weights of the lowest held-out loss are kept", "se guardan los pesos de la pérdida más baja"
    if not patience:
        return (f"at the last step; measured {steps}, {kept}", f"en el último paso; se mide {pasos} y {queda}")
    row, serie = (
        ("one is", "una no es") if patience == 1 else (f"{patience} in a row are", f"{patience} seguidas no son")
    )
    return (
        f"at the last step, or when {row} not below the lowest; measured {steps}, {kept}",
        f"en el último paso, o cuando {serie} menor que la más baja; se mide {pasos} y {queda}",
    )


def _given(recipe: SftRecipe) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    fields = {one.name: one.default for one in dataclasses.fields(recipe)}
    return {name: value for name, value in dataclasses.asdict(recipe).items() if value != fields[name]}


def _listed(ends: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if ends is None else (ends,) if isinstance(ends, int) else ends


def _write(
    recipe: SftRecipe,
    model: Llama,
    config: ModelConfig,
    tokenizer: Tokenizer,
    template: Template | None,
    folder: Path,
    base: str,
) -> None:
    """The weights (or the adapter, whose file names ``base``), the tokenizer and the template, and the curves."""
    from criadero.checkpoints import save_hf
    from criadero.train.curves import write_curves

    write_curves(folder, title=f"tuning {places.told(recipe.base)}")
    tokenizer.save(folder, chat_template=template.source if template else None)
    if recipe.method != "full" and not recipe.merged:
        ends = list(config.eos_ids)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}) + "\n", encoding="utf-8")
        lora.save_adapter(
            model, folder, base=base, alpha=recipe.lora_alpha, rslora=recipe.rslora, dropout=recipe.lora_dropout
        )
        return
    lora.merge(model)
    save_hf(model, config, folder)


def check_recipe(recipe: SftRecipe) -> None:
    if recipe.epochs < 0:
        raise UserError(f"epochs must be positive, or 0 to derive them, not {recipe.epochs:g}")
    if not 0 <= recipe.distil <= 1:
        raise UserError(f"distil is a part of the loss, from 0 to 1, not {recipe.distil:g}")
    for name in ("lr", "held_out_share", "lora_dropout"):
        if not 0 <= getattr(recipe, name) < 1:
            raise UserError(f"{name} must be at least 0 and below 1, not {getattr(recipe, name):g}")
    check_tracker(recipe.track)
    counts = (
        "fit", "context", "max_length", "weight_decay", "clip", "save_minutes", "eval_every", "patience", "samples",
    )  # fmt: skip
    for name in counts:
        if getattr(recipe, name) < 0:
            raise UserError(f"{name} must not be negative, but it is {getattr(recipe, name):g}")
    if recipe.batch_tokens < 0:
        raise UserError(f"batch_tokens must be positive, or 0 to derive it, not {recipe.batch_tokens}")
    if not 0 < recipe.lora_plus <= 100:
        raise UserError(f"lora_plus must be positive and at most 100 (1: the same rate), not {recipe.lora_plus:g}")
    for name in ("micro_tokens", "lora_rank"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{name} must be at least 1, not {getattr(recipe, name)}")
    if not 0 <= recipe.warmup <= 1:
        raise UserError(f"warmup is a fraction of the steps, from 0 to 1, not {recipe.warmup:g}")
    if not 0 < recipe.lora_alpha <= MAX_ALPHA:
        raise UserError(f"lora_alpha must be positive and at most {MAX_ALPHA:g}, not {recipe.lora_alpha:g}")
    lora.check_targets(recipe.lora_targets)
    if recipe.base_matmul == "int8" and (recipe.method not in INT8_METHODS or recipe.lora_dropout):
        raise UserError(
            "base_matmul int8 goes with method lora or qlora, without lora_dropout: leave out the one or the other"
        )
    if recipe.template:
        builtin_template(recipe.template)


def _check_base(base: Path, kind: str) -> None:
    """An adapter on an adapter could not be opened: say so before the training."""
    if kind == "adapter" and (base / "adapter_config.json").is_file():
        raise UserError(
            f"{base} is an adapter, and an adapter cannot stand on another; add merged = true for whole weights"
        )


def _check_method(recipe: SftRecipe, base: Path) -> None:
    """QLoRA is for a base that lies there in 4 or 8 bits, and leaves it so."""
    from criadero.checkpoints import holds_quantised

    if recipe.method != "qlora":
        return
    if recipe.merged:
        raise UserError(
            "merged writes whole weights, and qlora keeps the base in 4 or 8 bits: leave merged out, and fold the adapter in "
            "afterwards with criadero merge --requantise"
        )
    if (base / "adapter_config.json").is_file() or not holds_quantised(base):
        raise UserError(
            f"qlora needs a base in 4 or 8 bits, and {recipe.base} is not: make one with criadero quantize {recipe.base}, or "
            "take --method lora"
        )


def _multiplies_in_int8(recipe: SftRecipe, obstacle: str | None, begun: str) -> bool:
    """Whether products with the base are computed in whole numbers. UserError where that is asked for and cannot be; ``begun`` is what
    an unfinished run began with, which goes on so where it can (else the loop says that it does not), or as the recipe says."""
    plain = recipe.method in INT8_METHODS and not recipe.lora_dropout
    if recipe.base_matmul == "int8" and obstacle is not None:
        raise UserError(
            f"base_matmul int8 needs the compiled training kernels, which do not compute here ({obstacle}); leave it out"
        )
    wanted = begun == "int8" or (begun == "auto" and INT8_AUTO and fast.int8_is_fast())
    return plain and obstacle is None and wanted


def _longer(recipe: SftRecipe, config: ModelConfig) -> ModelConfig:
    """The configuration with the context that the recipe asks for."""
    if recipe.method != "full" and not recipe.merged:
        raise UserError(
            f"context {recipe.context} changes the base's positions, which an adapter beside it cannot: add --merged, or take "
            "--method full"
        )
    if recipe.context <= config.max_position_embeddings:
        raise UserError(
            f"context {recipe.context}: {recipe.base} has {config.max_position_embeddings} already; leave it out (max_length "
            "bounds the examples)"
        )
    say(
        f"context {config.max_position_embeddings} -> {recipe.context}: positions are interpolated, which costs the base something "
        "until it has learned them, also in the loss before"
    )
    return stretched(config, recipe.context)


def context_of(recipe: SftRecipe, config: ModelConfig) -> int:
    """The longest example, in tokens."""
    context = config.max_position_embeddings
    if recipe.max_length > context:
        raise UserError(
            f"max_length is {recipe.max_length}, but the context of {recipe.base} is {context}; lower it, or leave it out"
        )
    return recipe.max_length or context


def _check_ids(prepared: Prepared, config: ModelConfig, base: str) -> None:
    highest = max(max(example.ids) for example in [*prepared.train, *prepared.held_out])
    if highest >= config.vocab_size:
        raise UserError(
            f"{base}: its tokenizer gives token {highest}, but the model has {config.vocab_size} embeddings: the two do not belong together"
        )


def _base_name(base: str, out: Path) -> str:
    """What ``adapter_config.json`` calls the base: a bundled model's name; else its path, a relative one from ``out`` on, so
    that the two folders may be moved together."""
    path = resolve(base)
    if path.parent == BUNDLED:
        return path.name
    said = places.told(base)
    return said if said == base and Path(base).is_absolute() else places.from_folder(path, out)


def _ends(config: ModelConfig, examples: Sequence[Example], tokenizer: Tokenizer) -> int | tuple[int, ...] | None:
    """The ids that end an answer: the base's, and the special tokens that the chats' last learned tokens are."""
    special = set(tokenizer.special.values())
    last = {next(i for i, learned in zip(e.ids[::-1], e.loss_mask[::-1], strict=True) if learned) for e in examples}
    ends = (*config.eos_ids, *sorted((last & special) - set(config.eos_ids)))
    return ends if len(ends) > 1 else ends[0] if ends else None


def row_length(prepared: Prepared, context: int) -> int:
    """Tokens in a packed row: as many as the longest chat, at least `ROW`, at most the context. Longer rows would only cost:
    attention is quadratic, and chats in one row do not see each other."""
    longest = max(len(example.ids) for example in [*prepared.train, *prepared.held_out])
    return min(context, max(longest, ROW))


def sources_of(recipe: SftRecipe, data: Path) -> tuple[list[dict[str, Any]], str]:
    """What a ``dataset`` artifact's passport says it is made of, and the licence of the data.

    No rows where ``data`` is something else, or where the recipe states a licence: that is the user's word for the whole.
    """
    if recipe.licence != "unknown" or not (data / "passport.json").is_file():
        return [], recipe.licence
    artifact = open_artifact(data)
    rows = artifact.sources()
    declared = (artifact.passport.get("licence") or {}).get("declared")
    return rows, declared or " / ".join(sorted({str(row.get("licence") or "unknown") for row in rows})) or "unknown"


def template_for(recipe: SftRecipe, base: Path) -> Template | None:
    """None: a base without one, which plain documents do not need."""
    from criadero.checkpoints import template_of

    if recipe.template:
        return builtin_template(recipe.template)
    try:
        return template_of(base)
    except UserError:
        if recipe.train_on == "text":
            return None
        raise


def _new_ids(recipe: SftRecipe, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[int]:
    """The ids of the new tokens. UserError when one stands in no example: its row would never learn."""
    seen = {id for example in examples for id in example.ids} if recipe.new_tokens else set()
    for name in recipe.new_tokens:
        if tokenizer.special[name] not in seen:
            raise UserError(
                f"new_tokens: {name!r} stands in no rendered chat, so its row would never learn: the template has to write it "
                "(what spells it inside a message is plain text)"
            )
    return [tokenizer.special[name] for name in recipe.new_tokens]


def _named(places: Sequence[str], rows: Sequence[Sequence[int]], most: int = 4) -> str:
    """Where the examples of a batch stand."""
    found = [places[i] for row in rows for i in row]
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return f"the batch of {', '.join(found[:most])}{more}"


def _prepared_before(lesson: Lesson, base: str, context: int) -> Prepared:
    """The examples of a ``logits`` artifact, which were rendered when it was made, and the counts of then."""
    longest = max(len(one.ids) for one in [*lesson.train.examples, *lesson.held_out.examples])
    if longest > context:
        raise UserError(
            f"the longest example that the teacher was asked about has {longest} tokens, but the context of {base} is {context}: "
            f"make the logits again with max_length = {context}"
        )
    report = Report(**lesson.about["report"])
    report.context = context
    nothing = ChatFile([], Shape("text", ()), {})
    return Prepared(lesson.train.examples, lesson.held_out.examples, report, nothing, [], lesson.about["places"])


def example_batches(
    examples: Sequence[Example], length: int, rows: int, pad: int, dtype: torch.dtype, device: str
) -> list[Batch]:
    """Packed batches in a fixed order, for measuring."""
    packed = [[examples[i] for i in row] for row in pack_examples([len(e.ids) for e in examples], length)]
    return [rows_to_batch(packed[i : i + rows], length, pad, dtype, device) for i in range(0, len(packed), rows)]


@torch.no_grad()
def held_out_loss(model: Llama, batches: Sequence[Batch]) -> dict[str, float]:
    """Mean loss in nats over the supervised tokens of ``batches``, and their count; nan when there are none."""
    was = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        loss, n, _ = next_token_loss(model, batch)
        total, count = total + float(loss), count + n
    model.train(was)
    return {"loss": total / count if count else float("nan"), "supervised": count}
