"""Fifty steps on the same batches as a plain loop over Hugging Face's model, PEFT's adapters and PyTorch's optimizer: equal losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from criadero import lora
from criadero.chat import Example
from criadero.train.batches import IGNORE, Batch, rows_to_batch
from criadero.train.loop import Plan, train
from criadero.train.loss import next_token_loss
from criadero.train.optim import Optimizer

STEPS, LR = 50, 2e-3


def batch_at(n: int) -> Batch:
    """Three chats a batch, one a row, of which about half is learned; the same eight come again and again."""
    generator = torch.Generator().manual_seed(n % 8)
    rows = []
    for _ in range(3):
        size = int(torch.randint(6, 40, (1,), generator=generator))
        ids = torch.randint(0, 280, (size,), generator=generator).tolist()
        mask = (torch.rand(size, generator=generator) < 0.5).tolist()
        rows.append([Example(ids, [False, True, *mask[2:]])])
    return rows_to_batch(rows, 40, 0, torch.float32)


def theirs(model: Any, parameters: list[torch.nn.Parameter]) -> list[float]:
    """What TRL does with ``num_items_in_batch``: the summed loss over the learned tokens of the step."""
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    found = []
    for step in range(STEPS):
        total, batches = torch.zeros(()), [batch_at(2 * step), batch_at(2 * step + 1)]
        count = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        for batch in batches:
            out = model(input_ids=batch.ids, attention_mask=(batch.segments >= 0).long()).logits
            part = torch.nn.functional.cross_entropy(
                out.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum"
            )
            (part / count).backward()
            total = total + part.detach()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total) / count)
    return found


def start(folder: Path, method: str) -> tuple[Any, Any, list[tuple[str, torch.nn.Parameter]]]:
    """The same model twice, theirs and ours, with the same adapters; and ours that learn."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from criadero.checkpoints import load_model

    base = tiny.base(folder / "base", intermediate_size=64)
    twin = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = load_model(base)
    if method == "full":
        return twin, model, list(model.named_parameters())
    parameters = lora.attach(model, rank=4, alpha=8, rslora=method == "rslora", dora=method == "dora", seed=3)
    (folder / "start").mkdir()
    lora.save_adapter(model, folder / "start", base=str(base), alpha=8, rslora=method == "rslora", dropout=0.0)
    return peft.PeftModel.from_pretrained(twin, folder / "start", is_trainable=True), model, parameters


def ours(model: Any, parameters: list[tuple[str, torch.nn.Parameter]], folder: Path) -> list[float]:
    optimizer = Optimizer(parameters, method="adamw", weight_decay=0.0, betas=(0.9, 0.999))
    plan = Plan(steps=STEPS, micro_batches=2, lr=LR, schedule="constant", warmup=0.0, clip=1.0, save_minutes=0.0)
    folder.mkdir()
    train(model.train(), optimizer, batch_at, next_token_loss, plan, folder)
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def check(mine: list[float], wanted: list[float]) -> None:
    assert len(mine) == len(wanted) == STEPS
    assert wanted[-1] < wanted[0] - 0.1  # they are learned by heart
    worst = max(abs(a - b) for a, b in zip(mine, wanted, strict=True))
    assert worst < 1e-3, worst


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "full"])
def test_fifty_steps_equal_hugging_faces_and_pefts(tmp_path: Path, method: str) -> None:
    twin, model, parameters = start(tmp_path, method)
    wanted = theirs(twin.train(), [p for p in twin.parameters() if p.requires_grad])
    check(ours(model, parameters, tmp_path / "run"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_fifty_steps_equal_trls(tmp_path: Path, method: str) -> None:
    """TRL is no dependency of the tests: where it is installed, its trainer runs, else this is skipped."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    twin, model, parameters = start(tmp_path, method)
    rows = []
    for number in range(2 * STEPS):
        batch = batch_at(number)
        for ids, targets, segments in zip(batch.ids, batch.targets, batch.segments, strict=True):
            size = int((segments >= 0).sum())
            labels = [IGNORE, *targets[: size - 1].tolist()]  # theirs are shifted later
            rows.append({"input_ids": ids[:size].tolist(), "labels": labels})
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, report_to="none", use_cpu=True, bf16=False, save_strategy="no", max_length=None,
        train_sampling_strategy="sequential", gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    from transformers import AutoTokenizer

    trainer = trl.SFTTrainer(
        model=twin, args=settings, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
    )  # fmt: skip
    trainer.train()
    wanted = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    check(ours(model, parameters, tmp_path / "run"), wanted)
