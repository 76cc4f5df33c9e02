"""What each way of making a model small costs in held-out loss: a table, everything measured on the same tokens in one run.

    python benchmarks/quantize.py [MODEL] [--text DATASET] [--calibration_tokens 32768] [--eval_tokens 32768] [--json]

MODEL is a bundled name, a folder, or ``stories260K``: the public weights of llama2.c under ``$CRIADERO_SHARED/data``. Only the layers
are quantised, so that the rows compare; the last rows do the tables too, as `criadero quantize` does. "rise" is against the
model as it is, with the standard error over rows of text: both were measured on the same rows, so that it is far smaller
than the loss's own. "KL" is the divergence from the model as it is, in nats a token, which chance moves less. Q4_0 and Q8_0 are
llama.cpp's rounding, by our bit-for-bit copy of ggml's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from criadero.checkpoints import load_model, save_hf, template_of, tokenizer_of
from criadero.checkpoints.ggml import pack, unpack
from criadero.checkpoints.packed import power_of_two
from criadero.data.documents import read_rows
from criadero.errors import UserError
from criadero.kernels.formats import QuantTensor
from criadero.quantization.gptq import gptq
from criadero.quantization.layers import HEAD, TABLE, count, head_of, last_states, wide
from criadero.quantization.mixed import choose, cost, sensitivity
from criadero.quantization.rounding import round_matrix
from criadero.quantization.text import flat, read_text
from criadero.train.batches import Batch

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("CRIADERO_SHARED", ROOT.parent / "shared")) / "data"
State = dict[str, torch.Tensor | QuantTensor]


def stories(folder: Path) -> tuple[Path, Path]:
    """The 260 thousand weights of llama2.c as a model folder, and stories like those it has read."""
    sys.path.insert(0, str(ROOT / "tests"))
    import llama2c

    from criadero.tokenizer import tokenizer_from_vocab

    source = SHARED / "weights" / "stories260K"
    config, state = llama2c.read_model(source / "stories260K.bin")
    pieces = llama2c.read_vocabulary(source / "tok512.bin", config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *(p.decode() for p, _ in pieces[3:259])]
    tokens += [piece.decode().replace(" ", "▁") for piece, _ in pieces[259:]]
    types = [2, 3, 3, *[6] * 256, *[1] * (config.vocab_size - 259)]
    scores = [score for _, score in pieces]
    save_hf(state, config, folder / "m")
    tokenizer_from_vocab("spm", tokens, scores=scores, types=types, bos_id=1, eos_id=2).save(folder / "m")
    rows = read_rows(SHARED / "pretrain" / "small_clean_en.jsonl.zst")
    kept = [json.dumps({"text": row["text"]}) for _, row in rows if row.get("src") == "Niklas6/Mini_GPT"]
    (folder / "text.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    return folder / "m", folder / "text.jsonl"


def singles(batches: list[Batch]) -> list[Batch]:
    """One row a batch, to see how the rise varies."""
    return [
        Batch(b.ids[i : i + 1], b.targets[i : i + 1], b.segments[i : i + 1], b.positions[i : i + 1], b.dtype)
        for b in batches for i in range(len(b.ids)) if (b.targets[i] >= 0).any()
    ]  # fmt: skip


@torch.no_grad()
def compare(
    hidden: list[torch.Tensor],
    head: torch.Tensor,
    hidden0: list[torch.Tensor],
    head0: torch.Tensor,
    batches: list[Batch],
) -> list[tuple[float, float]]:
    """Of each batch: the summed loss, and the summed divergence from what ``hidden0`` and ``head0`` say."""
    out = []
    for x, x0, batch in zip(hidden, hidden0, batches, strict=True):
        real = batch.targets >= 0
        one, two = (torch.log_softmax(h[real] @ w.t(), -1) for h, w in ((x, head), (x0, head0)))  # [n, V]
        loss = -one.gather(1, batch.targets[real][:, None]).sum()
        out.append((float(loss), float((two.exp() * (two - one)).sum())))
    return out


def bits(state: Mapping[str, Any], names: list[str], *, plain: float = 16) -> float:
    """Bits a weight of the layers' matrices, scales counted."""
    total = sum(math.prod(state[name].shape) for name in names)
    spent = 0.0
    for name in names:
        one = state[name]
        spent += 8 * one.nbytes if isinstance(one, QuantTensor) else plain * one.numel()
    return spent / total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="cria")
    parser.add_argument("--text", default=str(ROOT / "out/cria/01-data"))
    parser.add_argument("--calibration_tokens", type=int, default=32768)
    parser.add_argument("--eval_tokens", type=int, default=32768)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, text = stories(Path(folder)) if options.model == "stories260K" else (options.model, options.text)
        run(model, text, options)


def run(ref: str | Path, source: str | Path, options: argparse.Namespace) -> None:
    made = load_model(ref)
    config = made.config
    state: State = {n: w.detach() for n, w in made.state_dict().items() if n != HEAD or not config.tie_word_embeddings}
    del made
    try:
        template = template_of(ref)
    except UserError:
        template = None
    text = read_text(
        source, tokenizer_of(ref), template, config, tokens=options.calibration_tokens, held_out=options.eval_tokens,
        seed=1,
    )  # fmt: skip
    held = singles(flat(text.held_out))
    n = count(held)
    names = [name for name in state if name.endswith("_proj.weight")]
    head = head_of(state)
    start_states = last_states(state, config, held)
    before = [loss for loss, _ in compare(start_states, head, start_states, head, held)]
    rows: list[dict[str, Any]] = []

    def schemes(number: int, group: int) -> dict[str, tuple[int, int]]:
        """Where the group does not divide a row, the whole row shares a scale."""
        columns = {name: state[name].shape[1] for name in names}
        return {name: (number, group if group and columns[name] % group == 0 else columns[name]) for name in names}

    def report(label: str, make: Callable[[], State], *, plain: float = 16) -> None:
        start = time.perf_counter()
        changed = make()
        seconds = time.perf_counter() - start
        found = compare(last_states(changed, config, held), head_of(changed), start_states, head, held)
        after = [loss for loss, _ in found]
        differences = [two - one for one, two in zip(before, after, strict=True)]
        error = statistics.stdev(differences) * len(differences) ** 0.5 / n if len(differences) > 1 else 0.0
        row = {
            "what": label, "bits": bits(changed, names, plain=plain), "loss": sum(after) / n, "rise": sum(differences) / n,
            "error": error, "kl": sum(kl for _, kl in found) / n, "seconds": seconds,
        }  # fmt: skip
        rows.append(row)
        if not options.json:
            print(
                f"{label:<22} {row['bits']:>6.3f} {row['loss']:>9.5f} {row['rise']:>+9.5f} ±{error:.5f} "
                f"{row['kl']:>8.5f} {seconds:>7.1f} s",
                flush=True,
            )

    def rounded(number: int, group: int) -> State:
        return state | {name: round_matrix(wide(state[name]), *one) for name, one in schemes(number, group).items()}

    def ggml(kind: str) -> State:
        return state | {name: unpack(pack(state[name], kind, name), kind, tuple(state[name].shape)) for name in names}

    def calibrated(chosen: dict[str, tuple[int, int]], start: State | None = None) -> State:
        changed = dict(start or state)
        gptq(changed, config, text.calibration, chosen)
        return changed

    def mixed(budget: float) -> State:
        rises = sensitivity(
            state, config, text.calibration[: max(1, 4096 // text.calibration[0].tokens)], schemes(4, 32)
        )
        return calibrated(choose(rises, state, schemes(4, 32), budget)[0])

    def tables(start: State, how: Callable[[torch.Tensor], QuantTensor]) -> State:
        return start | {name: how(wide(state[name])) for name in (TABLE, HEAD) if name in state}

    if not options.json:
        print(
            f"{options.model}: {config.parameters():,} weights; {n:,} held-out tokens, {options.calibration_tokens:,} to calibrate on"
        )
        print(f"{'layers as':<22} {'bits':>6} {'loss':>9} {'rise':>9} {'':>8} {'KL':>8} {'time':>9}")
    report("as it is", lambda: state)
    whole = all(state[name].shape[1] % 32 == 0 for name in names)
    if whole:
        report("Q8_0 (ggml)", lambda: ggml("Q8_0"), plain=8.5)
    report("int8 g32", lambda: rounded(8, 32))
    report("int8 row", lambda: rounded(8, 0))
    if whole:
        report("Q4_0 (ggml)", lambda: ggml("Q4_0"), plain=4.5)
    groups = [32, *([128] if all(state[name].shape[1] % 128 == 0 for name in names) else []), 0]
    for group in groups:
        label = f"g{group}" if group else "row"
        report(f"int4 {label} rtn", lambda group=group: rounded(4, group))  # type: ignore[misc]
        report(f"int4 {label} gptq", lambda group=group: calibrated(schemes(4, group)))  # type: ignore[misc]
    sizes = {name: math.prod(state[name].shape) for name in names}
    least = sum(cost(one, state[name].shape[1]) * sizes[name] for name, one in schemes(4, 32).items()) / sum(
        sizes.values()
    )
    for more in (0.5, 1.0):
        report(f"mixed gptq +{more:g} bits", lambda more=more: mixed(least + more))  # type: ignore[misc]
    if config.hidden_size % 32 == 0:
        report("tables int8", lambda: tables(state, lambda w: round_matrix(w, 8, 32)))
        report("tables int8, 2^n", lambda: tables(state, lambda w: power_of_two(w.numpy(), 32)))
        report("tables int4", lambda: tables(state, lambda w: round_matrix(w, 4, 32)))
        report(
            "int4 g32 gptq, tables", lambda: tables(calibrated(schemes(4, 32)), lambda w: power_of_two(w.numpy(), 32))
        )
    if options.json:
        print(json.dumps({"model": options.model, "tokens": n, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
