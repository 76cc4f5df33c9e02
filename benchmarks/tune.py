"""LoRA tuning: ours beside TRL and PEFT, in one run, interleaved.

    tools/peers.sh tune
    python benchmarks/tune.py --peer trl [--device cpu|cuda] [--peak TFLOPS] [--shape 135m|1b|7b] [--examples 48] [--rounds 1]
                              [--ours TEXT] [--only TEXT] [--peer-python .peers/bin/python] [--json]

All tune the same random bf16 weights (of SmolLM2-135M's or TinyLlama-1.1B's shape) with adapters of rank 16 on every linear layer, on
the same examples once through, in the same order but for what each setting does to it: lengths as Alpaca's (log-normal, median 90 tokens,
at most 512), about 55 % of the tokens supervised. Counted are real tokens (no padding) a second, the first step left out, and the most
memory that the process used. Ours packs whole examples into rows of at most 1024 tokens, one optimizer step a row, which is about the
eight examples of TRL's steps. "tuned" is TRL with the allocator set as ours sets it for itself; "in float32" is its better half on
processors that do not multiply bf16. Of ours, "int8 products" is ``base_matmul = "int8"``, and a base of 8 or 4 bits ``method = "qlora"``.

With ``--device cuda`` (written without a GPU at hand, and not measured yet) the settings are those of a GPU, memory is the most that
PyTorch had of it, and ``--peak``, the bf16 TFLOPS that its maker states without sparsity, adds the share of them that was used (MFU):
4 for each weight in a matrix product and real token, since frozen weights have no gradient. Take ``--examples 400`` or more there; the
first four steps are left out, in which blocks are compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 2048, "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
    "7b": {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    },
}  # fmt: skip
KEEP = "glibc.malloc.mmap_threshold=17179869184:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROW = 1024
OURS: dict[str, dict[str, Any]] = {
    "Criadero": {},
    "Criadero, int8 products": {"int8": True},
    "Criadero, int8 base, int8 products": {"bits": 8, "int8": True},
    "Criadero, int4 base, int8 products": {"bits": 4, "int8": True},
    "Criadero, int4 base, int8 products, rows of 512": {"bits": 4, "int8": True, "row": 512},
}
PEERS: dict[str, dict[str, Any]] = {
    "TRL, its defaults": {"gradient_checkpointing": True, "max_length": 512},
    "TRL, padding-free, no checkpointing, tuned": {"gradient_checkpointing": False, "padding_free": True, "max_length": None},
    "TRL, grouped by length, no checkpointing, tuned": {
        "gradient_checkpointing": False, "max_length": 512, "train_sampling_strategy": "group_by_length",
    },
    "TRL in float32, padding-free, no checkpointing, tuned": {
        "gradient_checkpointing": False, "padding_free": True, "max_length": None, "bf16": False,
    },
    "TRL in float32, grouped by length, no checkpointing, tuned": {
        "gradient_checkpointing": False, "max_length": 512, "train_sampling_strategy": "group_by_length", "bf16": False,
    },
}  # fmt: skip
OURS_CUDA: dict[str, dict[str, Any]] = {
    "Criadero": {"compile": "on", "rows": 4},
    "Criadero, not compiled": {"rows": 4},
    "Criadero, checkpointing": {"compile": "on", "rows": 4, "checkpointing": "on"},
}
PEERS_CUDA: dict[str, dict[str, Any]] = {
    "TRL, its defaults": {"gradient_checkpointing": True, "max_length": 512, "batch": 32},
    "TRL, sdpa, grouped by length, no checkpointing": {
        "gradient_checkpointing": False, "max_length": 512, "train_sampling_strategy": "group_by_length", "batch": 32,
    },
    "TRL, flash attention 2, padding-free, no checkpointing": {  # needs the package flash-attn
        "gradient_checkpointing": False, "padding_free": True, "max_length": None, "attention": "flash_attention_2", "batch": 32,
    },
}  # fmt: skip


def settings(device: str) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Ours and the peer's."""
    return (OURS_CUDA, PEERS_CUDA) if device == "cuda" else (OURS, PEERS)


def products(shape: dict) -> int:
    """Weights that take part in a matrix product for each token."""
    size, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = size // shape["num_attention_heads"] * shape["num_key_value_heads"]
    block = 2 * size * size + 2 * size * keys + 3 * size * inner
    return shape["num_hidden_layers"] * block + size * shape["vocab_size"]


def examples(count: int, vocab: int) -> list[tuple[list[int], int]]:
    """(token ids, how many of them are the question), the same for all sides."""
    import numpy as np

    draw = np.random.default_rng(0)
    lengths = np.clip(np.round(np.exp(draw.normal(np.log(90), 0.6335, count))), 16, 512).astype(int)
    shares = np.clip(draw.normal(0.45, 0.12, count), 0.1, 0.9)
    return [(draw.integers(3, vocab, n).tolist(), round(n * share)) for n, share in zip(lengths, shares, strict=True)]


def result(tokens: list[int], seconds: list[float], losses: list[float]) -> dict[str, Any]:
    """Of everything after the first step, or on a GPU the first four."""
    import torch

    # not ru_maxrss, which a process inherits from the one that started it: that one has made the weights
    peak, skip = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e9, 1
    if torch.cuda.is_initialized():
        peak, skip = torch.cuda.max_memory_reserved() / 1e9, 4
    return {
        "tokens_per_second": sum(tokens[skip:]) / sum(seconds[skip:]),
        "peak_gb": peak,
        "seconds": seconds,
        "first_loss": losses[0],
    }


def ours(folder: Path, shape: dict, count: int, setting: dict[str, Any], device: str) -> dict[str, Any]:
    """Our loop's parts: batch, loss, backward, AdamW."""
    import torch

    from criadero import lora
    from criadero.chat import Example
    from criadero.checkpoints import load_frozen, load_model
    from criadero.train import fast, gpu
    from criadero.train.batches import rows_to_batch
    from criadero.train.hardware import keep_memory
    from criadero.train.loss import next_token_loss
    from criadero.train.memory import Needs
    from criadero.train.optim import Optimizer

    keep_memory()
    load = load_frozen if "bits" in setting else load_model
    model = load(quantised(folder, setting["bits"]) if "bits" in setting else folder, dtype=torch.bfloat16).to(device)
    parameters = lora.attach(model, rank=16, alpha=32.0)
    if setting.get("int8"):
        fast.multiply_in_int8(model)
    gpu.prepare(model, setting.get("checkpointing", "off"), setting.get("compile", "off"), *[Needs(0, 0, 0, 0, 0)] * 2)
    length, together = setting.get("row", ROW), setting.get("rows", 1)
    optimizer = Optimizer(parameters, method="adamw", weight_decay=0.0, betas=(0.9, 0.999))
    rows: list[list[Example]] = [[]]
    for ids, question in examples(count, shape["vocab_size"]):
        if sum(len(example.ids) for example in rows[-1]) + len(ids) > length:
            rows.append([])
        rows[-1].append(Example(ids, [False] * question + [True] * (len(ids) - question)))
    tokens, seconds, losses = [], [], []
    for start in range(0, len(rows), together):
        began = time.perf_counter()
        batch = rows_to_batch(rows[start : start + together], length, 0, torch.bfloat16, device)
        loss, supervised, _ = next_token_loss(model, batch)
        loss.backward()
        optimizer.collect()
        optimizer.step(1e-4, divide_by=supervised, clip=1.0)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        tokens.append(batch.tokens)
        losses.append(float(loss.detach()) / supervised)
    return result(tokens, seconds, losses)


def quantised(folder: Path, bits: int) -> Path:
    """The weights with their matrices rounded to 8 or 4 bits, a scale for 128 or 32 columns, beside them; made in a process of its own,
    so that it does not count as memory of the run."""
    out = folder.with_name(f"{folder.name}-int{bits}")
    if not out.exists():
        subprocess.run([sys.executable, "-P", __file__, "--quantise", str(bits), "--weights", str(folder)], check=True)
    return out


def quantise(folder: Path, bits: int) -> None:
    """What `quantised` asks for."""
    import torch

    from criadero.checkpoints import load_model
    from criadero.checkpoints.packed import write_quantised
    from criadero.quantization.rounding import as_quant_tensor, nearest

    model = load_model(folder, dtype=torch.bfloat16)
    state: dict[str, Any] = dict(model.state_dict())
    for name, weight in model.named_parameters():
        if name.startswith("model.layers.") and weight.ndim == 2:
            group = 128 if bits == 8 and weight.shape[1] % 128 == 0 else 32
            blocks = weight.detach().float().view(len(weight), -1, group)
            scales = (
                (blocks.abs().amax(-1) / (127 if bits == 8 else 7)).half().float()
            )  # the best would take minutes to find
            numbers = nearest(blocks, scales, bits).to(torch.int8).view(weight.shape)
            state[name] = as_quant_tensor(numbers, scales, bits, group)
    write_quantised(state, model.config, folder.with_name(f"{folder.name}-int{bits}"), dtype=torch.bfloat16)


def trl(folder: Path, shape: dict, count: int, setting: dict[str, Any], device: str) -> dict[str, Any]:
    """TRL's SFTTrainer with PEFT's LoRA, micro-batches of four, two a step; on a GPU 32 at once, about as many tokens as ours."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    narrow = setting.get("bf16", True)
    given = {name: value for name, value in setting.items() if name not in ("attention", "batch")}
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if narrow else torch.float32, use_cache=False,
        **({"attn_implementation": setting["attention"]} if "attention" in setting else {}),
    )  # fmt: skip
    rows = [
        {"input_ids": ids, "labels": [-100] * question + ids[question:]}
        for ids, question in examples(count, shape["vocab_size"])
    ]
    seconds: list[float] = []
    counts: list[int] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.began = time.perf_counter()
            counts.append(0)

        def on_step_end(self, *args: Any, **more: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)

    class Counting(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **more: Any) -> Any:
            mask = inputs.get("attention_mask")
            counts[-1] += inputs["input_ids"].numel() if mask is None else int(mask.sum())
            found = super().compute_loss(model, inputs, *args, **more)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

        def _get_train_sampler(self, *args: Any, **more: Any) -> Any:
            if "train_sampling_strategy" in setting:
                return super()._get_train_sampler(*args, **more)
            return torch.utils.data.SequentialSampler(self.train_dataset)

    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out, per_device_train_batch_size=setting.get("batch", 4),
            gradient_accumulation_steps=1 if "batch" in setting else 2, num_train_epochs=1, use_cpu=device == "cpu",
            report_to=[], save_strategy="no", learning_rate=1e-4, logging_steps=1000, disable_tqdm=True,
            dataloader_pin_memory=False, **({"bf16": True} | given),
        )  # fmt: skip
        adapter = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        data = Dataset.from_list(rows)
        trainer = Counting(
            model=model,
            args=config,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[Clock()],
        )
        trainer.train()
    return result(counts, seconds, losses)


def make_weights(folder: Path, shape: dict) -> None:
    """Random bf16 weights as a Hugging Face folder."""
    import torch

    from criadero.checkpoints import save_hf
    from criadero.config import ModelConfig
    from criadero.model import Llama

    with torch.device("meta"):
        model = Llama(ModelConfig(**shape))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    if shape["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0, 0.02)
    save_hf(model, model.config, folder)


def main() -> None:
    """Interleave the sides and print real tokens a second, peak memory and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    parser.add_argument("--peer-python", default=".peers/bin/python")
    parser.add_argument("--only", default="", help="of the peer, measure only the settings whose name holds this text")
    parser.add_argument(
        "--ours", default="", help="of ours, measure only the settings whose name holds this text, and the first"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--peak", type=float, default=0.0, help="bf16 TFLOPS of the device, for the share that was used"
    )
    parser.add_argument("--examples", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--quantise", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help="a folder with the weights; made when there is none")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.quantise:
        quantise(arguments.weights, arguments.quantise)
        return
    mine, theirs = settings(arguments.device)
    if arguments.side:
        run_side, setting = (ours, mine) if arguments.side in mine else (trl, theirs)
        done = run_side(arguments.weights, shape, arguments.examples, setting[arguments.side], arguments.device)
        print(json.dumps(done))
        return
    sides = [name for name in mine if arguments.ours in name or name == "Criadero"]
    sides = [*sides, *(name for name in theirs if arguments.peer == "trl" and arguments.only in name)]
    with tempfile.TemporaryDirectory() as scratch:
        weights = arguments.weights or Path(scratch) / "weights"
        if not weights.exists():
            weights.mkdir(parents=True)
            make_weights(weights, shape)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(arguments.rounds):
            for name in sides:
                python = sys.executable if name in mine else arguments.peer_python
                env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
                if "tuned" in name:
                    env["GLIBC_TUNABLES"] = KEEP
                command = [
                    python,
                    "-P",
                    __file__,
                    "--side",
                    name,
                    "--shape",
                    arguments.shape,
                    "--weights",
                    str(weights),
                ]
                command += ["--examples", str(arguments.examples), "--device", arguments.device]
                run = subprocess.run(command, env=env, capture_output=True, text=True)
                if run.returncode:
                    sys.exit(f"{name}: {run.stderr.strip()[-2000:]}")
                found[name].append(json.loads(run.stdout.strip().splitlines()[-1]))
    if arguments.json:
        print(json.dumps({"shape": arguments.shape, "examples": arguments.examples, "sides": found}))
        return
    speed = {name: statistics.median(one["tokens_per_second"] for one in runs) for name, runs in found.items()}
    print("| | real tokens/s | peak GB | loss of the first batch | Criadero is |\n|---|---|---|---|---|")
    for name, runs in found.items():
        peak, loss = max(one["peak_gb"] for one in runs), runs[0]["first_loss"]
        print(f"| {name} | {speed[name]:,.0f} | {peak:.1f} | {loss:.3f} | {speed['Criadero'] / speed[name]:.2f}x |")
    if arguments.peak:
        for name in found:
            print(f"{name}: {4 * products(shape) * speed[name] / arguments.peak / 1e12:.1%} of the device's peak")


if __name__ == "__main__":
    main()
