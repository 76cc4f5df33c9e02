"""One side of benchmarks/engine.py, in a process of its own: reads commands as JSON lines, answers with seconds.

    python benchmarks/engine_worker.py criadero|llama.cpp|transformers MODEL --threads 2 [--context 2048]

It imports nothing but numpy and the side's own engine, so that it runs in an environment that holds only the peer. Every side does the
same work: token ids in, logits of the last token of each sequence out, the largest of them taken as the next token.

    {"do": "load"}                                         -> seconds from nothing to the first token; peak memory
    {"do": "prefill", "tokens": 512}                       -> seconds for a prompt of 512 tokens
    {"do": "decode", "batch": 4, "prompt": 128, "steps": 64}   -> seconds for the 64 steps of 4 sequences
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

VOCAB = 32000


def prompt(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, VOCAB - 10, length).astype(np.int32)


class Criadero:
    """Our engine's runner: a whole step is one native call."""

    page = 32

    def __init__(self, model: str, threads: int, context: int) -> None:
        from criadero.engine.native import NativeRunner

        self.sequences = 16
        pages = 16 * (256 // self.page) + context // self.page + 16
        self.runner = NativeRunner(model, threads=threads, pages=pages, page=self.page)
        self.reset()

    def reset(self) -> None:
        self.lengths: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.free = list(range(self.runner.pages))

    def step(self, rows: dict[int, np.ndarray]) -> list[int]:
        from criadero.engine.runner import StepBatch

        starts, positions = [0], []
        for sequence, ids in rows.items():
            begin = self.lengths.get(sequence, 0)
            end = self.lengths[sequence] = begin + len(ids)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.page < end:
                table.append(self.free.pop())
            positions.append(np.arange(begin, end, dtype=np.int32))
            starts.append(starts[-1] + len(ids))
        width = max(len(self.tables[s]) for s in rows)
        tables = np.zeros((len(rows), width), np.int32)
        for i, sequence in enumerate(rows):
            tables[i, : len(self.tables[sequence])] = self.tables[sequence]
        batch = StepBatch(
            ids=np.concatenate(list(rows.values())).astype(np.int32), positions=np.concatenate(positions),
            starts=np.array(starts, np.int32), lengths=np.array([self.lengths[s] for s in rows], np.int32),
            tables=tables, adapters=None, logit_rows=np.array(starts[1:], np.int32) - 1, want_hidden=False,
        )  # fmt: skip
        logits, _ = self.runner.step(batch)
        return [int(i) for i in logits.argmax(-1)]


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python exposes, with its defaults for a processor."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import ctypes

        import llama_cpp as lib

        self.lib, self.sequences = lib, 16
        silent = lib.llama_log_callback(lambda level, text, data: None)
        self.keep = silent
        lib.llama_log_set(silent, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(model.encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp cannot open {model}"
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        options = lib.llama_context_default_params()
        options.n_ctx = 16 * 256 + context
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        options.n_seq_max = 16
        options.kv_unified = True  # else each of the 16 sequences gets a sixteenth of the context
        self.context = lib.llama_init_from_model(self.model, options)
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.reset()

    def reset(self) -> None:
        self.lengths: dict[int, int] = {}
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def step(self, rows: dict[int, np.ndarray]) -> list[int]:
        batch, at, last = self.batch, 0, []
        for sequence, ids in rows.items():
            begin = self.lengths.get(sequence, 0)
            self.lengths[sequence] = begin + len(ids)
            for i, token in enumerate(ids):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = int(token), begin + i, 1
                batch.seq_id[at][0], batch.logits[at] = sequence, i == len(ids) - 1
                at += 1
            last.append(at - 1)
        batch.n_tokens = at
        code = self.lib.llama_decode(self.context, batch)
        assert code == 0, f"llama_decode returned {code}"
        found = []
        for row in last:
            pointer = self.lib.llama_get_logits_ith(self.context, row)
            found.append(int(np.ctypeslib.as_array(pointer, shape=(self.vocab,)).argmax()))
        return found


class Transformers:
    """transformers in bf16 with its static default: eager attention by SDPA, dynamic cache, padded to one batch."""

    def __init__(self, model: str, threads: int, context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, self.sequences = torch, 16
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.reset()

    def reset(self) -> None:
        self.cache = None

    def step(self, rows: dict[int, np.ndarray]) -> list[int]:
        torch = self.torch
        ids = torch.from_numpy(np.stack(list(rows.values())).astype(np.int64))  # [B, T]: all rows of one length
        with torch.inference_mode():
            out = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return [int(i) for i in out.logits[:, -1].argmax(-1)]


SIDES = {"criadero": Criadero, "llama.cpp": LlamaCpp, "transformers": Transformers}


def prefill(engine: Criadero | LlamaCpp | Transformers, tokens: int) -> float:
    engine.reset()
    ids = prompt(tokens, 1)
    began = time.perf_counter()
    engine.step({0: ids})
    return time.perf_counter() - began


def decode(engine: Criadero | LlamaCpp | Transformers, batch: int, length: int, steps: int) -> float:
    engine.reset()
    if isinstance(engine, Transformers):
        latest = engine.step({s: prompt(length, s) for s in range(batch)})
    else:
        latest = [engine.step({s: prompt(length, s)})[0] for s in range(batch)]
    began = time.perf_counter()
    for _ in range(steps):
        latest = engine.step({s: np.array([latest[s]], np.int32) for s in range(batch)})
    return time.perf_counter() - began


def commands() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    arguments = parser.parse_args()
    engine = None
    for command in commands():
        if command["do"] == "load":
            began = time.perf_counter()
            engine = SIDES[arguments.side](arguments.model, arguments.threads, arguments.context)
            engine.step({0: prompt(1, 0)})
            answer = {"seconds": time.perf_counter() - began}
        elif command["do"] == "prefill":
            assert engine
            answer = {"seconds": prefill(engine, command["tokens"])}
        else:
            assert engine
            answer = {"seconds": decode(engine, command["batch"], command["prompt"], command["steps"])}
        answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
