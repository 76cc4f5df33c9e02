"""One side of benchmarks/engine.py, in a process of its own: reads commands as JSON lines, answers with seconds.

    python benchmarks/engine_worker.py criadero|llama.cpp|openvino|transformers MODEL --threads 2 [--context 2048] [--type TYPE]

It imports nothing but numpy and the side's own engine, so that it runs in an environment that holds only the peer. Every side does the
same work: token ids in, logits of the last token of each sequence out, the largest of them taken as the next token.

    {"do": "load"}                                         -> seconds from nothing to the first token; peak memory
    {"do": "prefill", "tokens": 512}                       -> seconds for a prompt of 512 tokens
    {"do": "decode", "batch": 4, "prompt": 128, "steps": 64}   -> seconds for the 64 steps of 4 sequences
    {"do": "logits", "prompt": 64, "steps": 4, "file": FILE.npy}  -> writes the last logits of 64 tokens and then 4 more, one at a time
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

VOCAB = 32000


def prompt(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, VOCAB - 10, length).astype(np.int32)


class Criadero:
    """Our engine's runner: a whole step is one native call."""

    page = 32

    def __init__(self, model: str, threads: int, context: int, type: str) -> None:
        from criadero.engine.native import NativeRunner

        pages = 16 * (256 // self.page) + context // self.page + 16
        self.runner = NativeRunner(model, threads=threads, pages=pages, page=self.page)
        self.reset()

    def reset(self) -> None:
        self.lengths: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.free = list(range(self.runner.pages))

    def logits(self, rows: dict[int, np.ndarray]) -> np.ndarray:
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
        assert logits is not None
        return logits


class LlamaCpp:
    """llama.cpp through the C interface that llama-cpp-python exposes, with its defaults for a processor."""

    def __init__(self, model: str, threads: int, context: int, type: str) -> None:
        import ctypes

        import llama_cpp as lib

        self.lib = lib
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

    def logits(self, rows: dict[int, np.ndarray]) -> np.ndarray:
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
            found.append(np.ctypeslib.as_array(pointer, shape=(self.vocab,)))
        return np.stack(found)


class OpenVino:
    """OpenVINO's runtime on a model of benchmarks/openvino_model.py, all rows of one length. Its defaults for a processor, but for the
    groups of activations that are rounded together: as long as the weights', which is faster than its default of 32 for groups of 128.
    """

    def __init__(self, model: str, threads: int, context: int, type: str) -> None:
        import openvino

        group = type.rpartition("-g")[2]
        options = {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
        }  # fmt: skip
        self.model = openvino.Core().compile_model(f"{model}/model.xml", "CPU", options)
        self.request = self.model.create_infer_request()
        self.reset()

    def reset(self) -> None:
        self.length = 0
        self.request.reset_state()

    def logits(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        ids = np.stack(list(rows.values())).astype(np.int64)  # [B, T]
        begin, self.length = self.length, self.length + ids.shape[1]
        found = self.request.infer(
            {
                "input_ids": ids, "attention_mask": np.ones((len(ids), self.length), np.int64),
                "position_ids": np.broadcast_to(np.arange(begin, self.length), ids.shape).copy(),
                "beam_idx": np.arange(len(ids), dtype=np.int32),
            },
            share_inputs=True, share_outputs=True,
        )  # fmt: skip
        return found[0][:, -1]

    def settings(self) -> dict[str, str]:
        names = (
            "INFERENCE_PRECISION_HINT",
            "KV_CACHE_PRECISION",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE",
            "ENABLE_CPU_PINNING",
        )
        return {name: str(self.model.get_property(name)) for name in names}


class Transformers:
    """transformers in bf16 or float32, attention by SDPA, all rows of one length. Prompts run as they are; a decoding step is compiled,
    over a cache of fixed size, which is its fastest."""

    def __init__(self, model: str, threads: int, context: int, type: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype={"BF16": torch.bfloat16, "F32": torch.float32}[type]
        ).eval()
        self.compiled = torch.compile(self.model)
        self.reset()

    def reset(self) -> None:
        self.cache: Any = None

    def logits(self, rows: dict[int, np.ndarray]) -> np.ndarray:
        from transformers import StaticCache

        torch = self.torch
        ids = torch.from_numpy(np.stack(list(rows.values())).astype(np.int64))  # [B, T]
        if self.cache is None:
            room = 256 if ids.shape[1] <= 192 else ids.shape[1]
            self.cache, self.length = StaticCache(self.model.config, max_cache_len=room), 0
        positions = torch.arange(self.length, self.length + ids.shape[1])
        self.length += ids.shape[1]
        run = self.compiled if ids.shape[1] == 1 and self.length > 1 else self.model
        with torch.inference_mode():
            out = run(ids, past_key_values=self.cache, position_ids=positions[None], use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].float().numpy()


Engine = Criadero | LlamaCpp | OpenVino | Transformers
SIDES = {"criadero": Criadero, "llama.cpp": LlamaCpp, "openvino": OpenVino, "transformers": Transformers}


def step(engine: Engine, rows: dict[int, np.ndarray]) -> list[int]:
    """The largest logit's token of each row."""
    return [int(i) for i in engine.logits(rows).argmax(-1)]


def prefill(engine: Engine, tokens: int) -> float:
    engine.reset()
    ids = prompt(tokens, 1)
    began = time.perf_counter()
    step(engine, {0: ids})
    return time.perf_counter() - began


def decode(engine: Engine, batch: int, length: int, steps: int) -> float:
    engine.reset()
    prompts = {s: prompt(length, s) for s in range(batch)}
    if isinstance(engine, OpenVino | Transformers):
        latest = step(engine, prompts)
    else:
        latest = [step(engine, {s: ids})[0] for s, ids in prompts.items()]
    began = time.perf_counter()
    for _ in range(steps):
        latest = step(engine, {s: np.array([latest[s]], np.int32) for s in range(batch)})
    return time.perf_counter() - began


def some_logits(engine: Engine, length: int, steps: int) -> np.ndarray:
    """``[vocabulary]`` after tokens that do not depend on the answers, so that sides can be compared."""
    engine.reset()
    ids = prompt(length + steps, 7)
    found = engine.logits({0: ids[:length]})
    for i in range(length, length + steps):
        found = engine.logits({0: ids[i : i + 1]})
    return found[0].astype(np.float32)


def commands() -> Iterator[dict]:
    for line in sys.stdin:
        yield json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--type", default="", help="BF16 or F32 for transformers, int4-g32 or int4-g128 for openvino")
    arguments = parser.parse_args()
    engine: Engine | None = None
    for command in commands():
        answer: dict[str, Any] = {}
        if command["do"] == "load":
            began = time.perf_counter()
            engine = SIDES[arguments.side](arguments.model, arguments.threads, arguments.context, arguments.type)
            step(engine, {0: prompt(1, 0)})
            answer["seconds"] = time.perf_counter() - began
            if isinstance(engine, OpenVino):
                answer["settings"] = engine.settings()
        elif command["do"] == "prefill":
            assert engine
            answer["seconds"] = prefill(engine, command["tokens"])
        elif command["do"] == "logits":
            assert engine
            np.save(command["file"], some_logits(engine, command["prompt"], command["steps"]))
        else:
            assert engine
            answer["seconds"] = decode(engine, command["batch"], command["prompt"], command["steps"])
        answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
