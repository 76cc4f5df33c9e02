"""The slow twin of the native runner: `criadero.model.Llama` over a paged cache, on a CPU or a GPU.

All rows of a step go through the network as one row of the batch, ``[1, T, D]``; only attention looks at whose they are. On
CUDA the weights are bf16, and with ``compile`` a step in which every request has one row runs at fixed shapes through a
CUDA graph. (The graph path has been tested on the CPU without the capture only.)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criadero.artifact import Artifact
from criadero.checkpoints import load_model
from criadero.engine.runner import NO_ADAPTER, PAGE, AdapterTensors, StepBatch
from criadero.errors import UserError
from criadero.model import Llama, sdpa

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64)  # a decode step is padded to one of these


class TorchRunner:
    """A `criadero.engine.runner.Runner` in plain PyTorch."""

    def __init__(
        self, model: Llama, *, pages: int, page: int = PAGE, kv_dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        weight = model.model.embed_tokens.weight
        self.model, self.config, self.page, self.pages = model.eval(), model.config, page, pages
        self.device, self.dtype = weight.device, weight.dtype
        self.name = f"torch {self.device.type} {str(self.dtype).removeprefix('torch.')}"
        config = model.config
        shape = (config.num_hidden_layers, pages * page, config.num_key_value_heads, config.head_dim)
        # one page more on a GPU: where the padding rows of a graph write
        shape = (shape[0], shape[1] + page, *shape[2:])
        kv_dtype = kv_dtype or self.dtype
        self._keys = torch.zeros(shape, dtype=kv_dtype, device=self.device)  # [layers, slots, K, Dh]
        self._values = torch.zeros(shape, dtype=kv_dtype, device=self.device)
        self._adapters: dict[int, AdapterTensors] = {}
        self._router = _Router()
        self._decode = _GraphDecode(self) if compile and self.device.type == "cuda" else None

    @classmethod
    def load(
        cls, ref: str | Path | Artifact, *, pages: int, page: int = PAGE, threads: int | None = None, weights: str = "auto",
        kv: str = "auto", device: str = "cpu", compile: bool = False,
    ) -> TorchRunner:  # fmt: skip
        """Read the model. ``weights``: float32, bfloat16, float16, float64; ``auto`` is bfloat16 on a GPU and float32 on a CPU,
        where one token at a time in bfloat16 is slow."""
        for what, name in (("weights", weights), ("kv", kv)):
            if name != "auto" and name not in DTYPES:
                raise UserError(f"{what} {name!r}: the torch runner computes in {', '.join(DTYPES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"device {device}: this machine has no CUDA GPU that PyTorch can use")
        if compile and not device.startswith("cuda"):
            raise UserError("compile captures CUDA graphs: it needs a device cuda")
        automatic = torch.bfloat16 if device.startswith("cuda") else torch.float32
        if threads:
            torch.set_num_threads(threads)
        model = load_model(ref, dtype=DTYPES.get(weights, automatic), device=device)
        return cls(model, pages=pages, page=page, kv_dtype=DTYPES.get(kv), compile=compile)

    @torch.inference_mode()
    def step(self, batch: StepBatch) -> tuple[np.ndarray | None, np.ndarray | None]:
        """See `criadero.engine.runner.Runner.step`."""
        self._check(batch)
        decoding = len(batch.ids) == len(batch.lengths) == len(batch.logit_rows) <= GRAPH_SIZES[-1]
        if self._decode is not None and decoding and not self._adapters and not batch.want_hidden:
            return self._decode(batch), None
        ids = torch.from_numpy(batch.ids).long().to(self.device)
        positions = torch.from_numpy(batch.positions).long().to(self.device)
        self._router.rows = None
        if batch.adapters is not None and (batch.adapters != NO_ADAPTER).any():
            self._router.rows = np.repeat(batch.adapters, np.diff(batch.starts))  # [T]
        attend = _PagedAttention(self, batch)
        hidden = self.model(ids[None], positions=positions[None], attend=attend, return_hidden=True)[0]  # [T, D]
        hidden = hidden[torch.from_numpy(batch.logit_rows).long().to(self.device)]  # [L, D]
        logits = self.model.logits(hidden).float().cpu().numpy() if batch.want_logits else None
        return logits, hidden.float().cpu().numpy() if batch.want_hidden else None

    def _check(self, batch: StepBatch) -> None:
        rows, requests = len(batch.ids), len(batch.lengths)
        if (
            rows == 0
            or len(batch.positions) != rows
            or len(batch.starts) != requests + 1
            or len(batch.tables) != requests
        ):
            raise ValueError("the arrays of the step do not fit together")
        counts = np.diff(batch.starts)
        if batch.starts[0] != 0 or batch.starts[-1] != rows or (counts < 1).any():
            raise ValueError("starts must rise from 0 to the number of rows")
        if (batch.ids < 0).any() or (batch.ids >= self.config.vocab_size).any():
            raise ValueError("a token id is out of range")
        wanted = np.repeat(batch.lengths - counts - batch.starts[:-1], counts) + np.arange(rows)
        if (batch.lengths < counts).any() or (batch.positions != wanted).any():
            raise ValueError("positions must be consecutive and end at lengths - 1")
        needed = -(-batch.lengths // self.page)
        if needed.max() > batch.tables.shape[1] or batch.lengths.max() > self.config.max_position_embeddings:
            raise ValueError("a request is longer than its table, or than the context")
        own = np.arange(batch.tables.shape[1])[None, :] < needed[:, None]
        if ((batch.tables < 0) | (batch.tables >= self.pages))[own].any():
            raise ValueError("a page number is out of range")
        if len(batch.logit_rows) and not 0 <= batch.logit_rows.min() <= batch.logit_rows.max() < rows:
            raise ValueError("a row of logit_rows is out of range")
        if batch.adapters is not None:
            for index in set(batch.adapters.tolist()) - {NO_ADAPTER}:
                if index not in self._adapters:
                    raise ValueError(f"adapter {index} is not loaded")

    # --- adapters ---

    def add_adapter(self, index: int, tensors: AdapterTensors) -> None:
        """See `criadero.engine.runner.Runner.add_adapter`."""
        if index in self._adapters:
            raise ValueError(f"adapter {index} is loaded already")
        for (layer, slot), (a, b) in tensors.items():
            parent, _, child = f"model.layers.{layer}.{_MODULES[slot]}".rpartition(".")
            module = self.model.get_submodule(parent)
            linear = getattr(module, child)
            if not isinstance(linear, _RoutedLinear):
                linear = _RoutedLinear(linear, self._router)
                setattr(module, child, linear)
            if a.shape[1] != linear.base.in_features or b.shape != (linear.base.out_features, a.shape[0]):
                raise ValueError(f"adapter {index}: layer {layer} {slot}: {a.shape} and {b.shape} do not fit")
            linear.parts[index] = (
                torch.from_numpy(np.array(a)).to(self.device, self.dtype),
                torch.from_numpy(np.array(b)).to(self.device, self.dtype),
            )
        self._adapters[index] = tensors

    def drop_adapter(self, index: int) -> None:
        """See `criadero.engine.runner.Runner.drop_adapter`."""
        del self._adapters[index]
        for module in self.model.modules():
            if isinstance(module, _RoutedLinear):
                module.parts.pop(index, None)


class _Router:
    """Which adapter each row of the step uses; None: nobody has one."""

    rows: np.ndarray | None = None


class _RoutedLinear(nn.Module):
    """A linear layer whose rows may each go through an adapter of their own: ``[1, T, in] -> [1, T, out]``."""

    def __init__(self, base: nn.Linear, router: _Router) -> None:
        super().__init__()
        self.base, self.router = base, router
        self.parts: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        if self.router.rows is not None:
            for index, (a, b) in self.parts.items():
                rows = torch.from_numpy(np.flatnonzero(self.router.rows == index)).to(x.device)
                if len(rows):
                    out[:, rows] += F.linear(F.linear(x[:, rows], a), b)
        return out


class _PagedAttention:
    """``attend(layer, q, k, v)`` for one step: stores the new keys and values, then each request reads its own."""

    def __init__(self, runner: TorchRunner, batch: StepBatch) -> None:
        page, device = runner.page, runner.device
        self.keys, self.values = runner._keys, runner._values
        counts = np.diff(batch.starts)
        owner = np.repeat(np.arange(len(counts)), counts)  # [T]: whose row it is
        slots = batch.tables[owner, batch.positions // page].astype(np.int64) * page + batch.positions % page  # [T]
        self.slots = torch.from_numpy(slots).to(device)
        self.single = bool((counts == 1).all())
        # decoding: one padded gather for all. Otherwise request by request
        self.reads: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self.bounds = batch.starts.tolist()
        if self.single:
            longest = int(batch.lengths.max())
            places = np.arange(longest)
            there = places[None] < batch.lengths[:, None]  # [R, S]
            table = batch.tables[:, places // page].astype(np.int64) * page + places % page
            # what is masked is still multiplied by 0, and 0 * NaN is NaN: past its end a request reads its own first key
            self.reads = [torch.from_numpy(np.where(there, table, table[:, :1])).to(device)]  # [R, S]
            mask = torch.from_numpy(there).to(device)
            self.masks = [None if bool(mask.all()) else mask[:, None, None]]  # [R, 1, 1, S]
            return
        for r, count in enumerate(counts.tolist()):
            length = int(batch.lengths[r])
            places = np.arange(length)
            self.reads.append(
                torch.from_numpy(batch.tables[r, places // page].astype(np.int64) * page + places % page).to(device)
            )
            rows = torch.arange(length - count, length, device=device)[:, None]
            lower = torch.arange(length, device=device)[None] <= rows  # [T_r, S]
            self.masks.append(lower if 1 < count < length else None)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # q [1, H, T, Dh], k and v [1, K, T, Dh]
        keys, values = self.keys[layer], self.values[layer]  # [slots, K, Dh]
        keys[self.slots] = k[0].transpose(0, 1).to(keys.dtype)  # [T, K, Dh]
        values[self.slots] = v[0].transpose(0, 1).to(values.dtype)
        if self.single:
            past_k = keys[self.reads[0]].transpose(1, 2).to(q.dtype)  # [R, K, S, Dh]
            past_v = values[self.reads[0]].transpose(1, 2).to(q.dtype)
            out = sdpa(q.permute(2, 1, 0, 3), past_k, past_v, self.masks[0])  # [R, H, 1, Dh]
            return out.permute(2, 1, 0, 3)  # [1, H, R, Dh]
        parts = []
        for r, (read, mask) in enumerate(zip(self.reads, self.masks, strict=True)):
            mine = q[:, :, self.bounds[r] : self.bounds[r + 1]]  # [1, H, T_r, Dh]
            past_k = keys[read].transpose(0, 1)[None].to(q.dtype)  # [1, K, S, Dh]
            past_v = values[read].transpose(0, 1)[None].to(q.dtype)
            whole = mine.shape[2] == past_k.shape[2]
            parts.append(sdpa(mine, past_k, past_v, mask, causal=whole and mine.shape[2] > 1))
        return torch.cat(parts, dim=2)


class _GraphDecode:
    """Decode steps at fixed shapes, so that a whole step is one CUDA graph (or, on the CPU for its test, one plain call).

    A step of R requests is padded to the next of `GRAPH_SIZES`; padding rows write to a page that nobody owns. Attention reads
    a whole context's pages and masks what is not there: right, and small for the contexts this runs at.
    """

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.width = -(-runner.config.max_position_embeddings // runner.page)
        self.graphs: dict[int, tuple[Any, dict[str, Tensor]]] = {}

    def _forward(self, held: Mapping[str, Tensor]) -> Tensor:
        runner, page = self.runner, self.runner.page
        ids, lengths, tables = held["ids"], held["lengths"], held["tables"]  # [R], [R], [R, P]
        places = torch.arange(self.width * page, device=runner.device)
        read = tables[:, places // page] * page + places % page  # [R, S]
        there = places[None] < lengths[:, None]
        slots = read.gather(1, (lengths - 1)[:, None])[:, 0]  # [R]
        read, mask = torch.where(there, read, read[:, :1]), there[:, None, None]  # mask [R, 1, 1, S]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # q [R, H, 1, Dh], k and v [R, K, 1, Dh]
            keys, values = runner._keys[layer], runner._values[layer]
            keys.index_copy_(0, slots, k[:, :, 0].to(keys.dtype))
            values.index_copy_(0, slots, v[:, :, 0].to(values.dtype))
            return sdpa(q, keys[read].transpose(1, 2).to(q.dtype), values[read].transpose(1, 2).to(q.dtype), mask)

        hidden = runner.model(ids[:, None], positions=(lengths - 1)[:, None], attend=attend, return_hidden=True)
        return runner.model.logits(hidden[:, 0]).float()  # [R, V]

    def __call__(self, batch: StepBatch) -> np.ndarray:
        rows = len(batch.ids)
        size = next(size for size in GRAPH_SIZES if size >= rows)
        if size not in self.graphs:
            self.graphs[size] = self._capture(size)
        graph, held = self.graphs[size]
        spare = self.runner.pages  # the page past the last
        ids, lengths = np.zeros(size, np.int64), np.ones(size, np.int64)
        tables = np.full((size, self.width), spare, np.int64)
        ids[:rows], lengths[:rows] = batch.ids, batch.lengths
        width = min(self.width, batch.tables.shape[1])
        tables[:rows, :width] = batch.tables[:, :width]
        for name, value in (("ids", ids), ("lengths", lengths), ("tables", tables)):
            held[name].copy_(torch.from_numpy(value))
        if graph is None:
            held["logits"] = self._forward(held)
        else:
            graph.replay()
        return held["logits"][:rows].cpu().numpy()

    def _capture(self, size: int) -> tuple[Any, dict[str, Tensor]]:
        device = self.runner.device
        held = {
            "ids": torch.zeros(size, dtype=torch.long, device=device),
            "lengths": torch.ones(size, dtype=torch.long, device=device),
            "tables": torch.full((size, self.width), self.runner.pages, dtype=torch.long, device=device),
        }
        if device.type != "cuda":
            return None, held
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm up outside the capture, as torch.cuda.graphs asks
            for _ in range(2):
                self._forward(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held["logits"] = self._forward(held)
        return graph, held
