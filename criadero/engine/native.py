"""The native runner: a whole step of the model is one call of the compiled kernels (``criadero/kernels/csrc/step.cpp``).

Weights are taken from the memory-mapped file one matrix at a time and repacked for this processor, so that loading needs little
more memory than the packed model. BF16 and Q8_0 matrices of a large model are not even that: where the kernels can, they compute
on the rows as they lie in the file. Its slow twin is `criadero.engine.torch_runner`.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from criadero.artifact import Artifact, resolve
from criadero.checkpoints import ADAPTER, adapter_base, load_config, load_model
from criadero.checkpoints.adapter_file import beside_a_base
from criadero.checkpoints.states import check_shapes, expected_shapes
from criadero.config import ModelConfig, rope_frequencies
from criadero.engine.runner import NO_ADAPTER, PAGE, AdapterTensors, StepBatch
from criadero.errors import UserError
from criadero.kernels import level, native, pack, physical_cores
from criadero.kernels.formats import QuantTensor, bf16, describe, floats

if TYPE_CHECKING:
    from torch import Tensor

Weight = QuantTensor | np.ndarray  # an array: float32, float16, or uint16 that holds the bits of bfloat16
WEIGHTS = {
    "auto": "auto", "float32": "f32", "f32": "f32", "bfloat16": "bf16", "bf16": "bf16", "int8": "int8", "int4": "int4",
}  # fmt: skip
KV = {
    "auto": "auto", "float32": "f32", "f32": "f32", "float16": "f16", "f16": "f16", "bfloat16": "bf16", "bf16": "bf16",
    "int8": "int8",
}  # fmt: skip
SLOT_OF = {
    "self_attn.q_proj": "q", "self_attn.k_proj": "k", "self_attn.v_proj": "v", "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
NORMS = {"input_layernorm": "input", "post_attention_layernorm": "post"}
EMBEDDING = "model.embed_tokens.weight"
UNIT = 16  # positions: pages are a multiple of it
OWN = 2**30  # the number of the adapter that `ref` itself is
# bytes up to which an embedding is copied; a larger one stays in the mapped file, where only used rows are read
COPIED = 2**25
# weights from which on a model's rows are left in the file: a smaller one is repacked in a tenth of a second, and may then lie in
# the processor's caches, where turning rows anew for each token costs more than memory does
MAPPED = 10**8


@dataclass(frozen=True)
class GgmlBlocks:
    """A matrix as it lies in a mapped file: quantised, of GGUF, or of any in BF16.

    ``heads``: rows are in the order that rotates neighbours (else 0).
    """

    kind: str
    raw: np.ndarray  # uint8, the bytes of the tensor
    shape: tuple[int, int]
    heads: int
    where: str  # for messages
    threads: int

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 of bf16."""
        return {"Q6_K": 16, "BF16": 0}.get(self.kind, 32)

    @property
    def form(self) -> str:
        """One of `WEIGHTS`."""
        return "bf16" if self.kind == "BF16" else "int4" if self.kind in ("Q4_0", "Q4_K") else "int8"

    @property
    def stays(self) -> bool:
        """Whether the kernels can compute on it as it lies."""
        return self.kind in ("BF16", "Q8_0")

    def described(self) -> str:
        """As `criadero.kernels.formats.describe` says it."""
        return self.form + (f" g{self.group}" if self.group else "") + (" with minimums" if self.kind == "Q4_K" else "")

    def unpack(self) -> Weight:
        """The same numbers as a `QuantTensor`, or of BF16 as an array; the file's are forgotten, but for an array that is them."""
        from criadero.checkpoints.ggml import finite
        from criadero.checkpoints.layout import to_rotate_half

        damaged = UserError(f"{self.where} holds values that are not finite; get the file again")
        if self.kind == "BF16":
            bits = self.raw.view(np.uint16).reshape(self.shape)
            if not finite(bits):
                raise damaged
            if not self.heads:
                return bits
            made = np.ascontiguousarray(to_rotate_half(bits, self.heads))
            _forget(self.raw)
            return made
        width, group, (rows, columns), wide = int(self.form[3:]), self.group, self.shape, self.kind.endswith("_K")
        q = np.empty((rows, columns * width // 8), np.uint8 if width == 4 else np.int8)
        scales = np.empty((rows, columns // group), np.float32 if wide else np.float16)
        mins = np.empty((rows, columns // group), np.float32) if self.kind == "Q4_K" else None
        native().repack_ggml(self.kind, self.raw, rows, columns, self.heads, self.threads, q, scales, mins)  # type: ignore[union-attr]
        _forget(self.raw)
        if not (finite(scales) and (mins is None or finite(mins))):
            raise damaged
        return QuantTensor(width, group, q, scales, mins)


Load = Callable[[str], Weight | GgmlBlocks]  # by Hugging Face's name of the tensor; once each


class NativeRunner:
    """A `criadero.engine.runner.Runner` on the compiled kernels."""

    def __init__(
        self, ref: str | Path | Artifact, *, pages: int, page: int = PAGE, threads: int | None = None, weights: str = "auto",
        kv: str = "auto", mapped: bool | None = None,
    ) -> None:  # fmt: skip
        """Load a bundled model, an artifact, a Hugging Face or Meta folder, a GGUF file, or an adapter on its base.

        ``weights``: f32, bf16, int8, int4 or auto, which keeps quantised weights, f32 and bf16 as they are stored, and rounds
        f16 to bf16. ``kv``: f32, f16, bf16, int8 or auto: f32 beside f32 weights, else f16. ``page`` must be a multiple of 16.
        ``mapped``: compute BF16 and Q8_0 on the file's own rows; by default where the kernels are made for it and the model is large.
        Such rows are not looked at before they are needed: a number among them that is not finite makes the logits NaN, which ends a
        request with an error. As of any mapped file, what is cut short meanwhile ends the process.
        UserError: what cannot be read or does not fit together.
        """
        for what, name, known in (("weights", weights, WEIGHTS), ("kv", kv, KV)):
            if name not in known:
                raise UserError(f"{what} {name!r}: the native runner knows {', '.join(known)}")
        if page % UNIT or page <= 0:
            raise UserError(f"page: the native runner's pages are a multiple of {UNIT} tokens, not {page}")
        if native() is None:
            raise UserError(
                "the native runner needs the compiled kernels, which are missing or turned off: use runner torch"
            )
        self.config, self.page, self.pages = load_config(ref), page, pages
        self.threads = threads or physical_cores()
        path = resolve(ref)
        base = adapter_base(path) if path.is_dir() and (path / ADAPTER).is_file() else None
        own: AdapterTensors = {}
        load: Load | None = None
        if base is not None:
            from criadero.engine.adapters import read_adapter

            if beside_a_base(path):  # it cannot stand beside the base
                load, base = dict(_arrays(load_model(path).state_dict())).pop, None
            else:
                own = read_adapter(path, self, base)[0]
        self._model = _new_model(self.config, self.threads)
        kinds, self._own = _fill(
            self._model,
            self.config,
            load or open_weights(base or path, self.threads)[1],
            WEIGHTS[weights],
            own,
            self.threads,
            native().maps_rows() and self.config.parameters() >= MAPPED if mapped is None else mapped,  # type: ignore[union-attr]
        )
        self.name = f"native {level()} {kinds.most_common(1)[0][0]}"
        kind = KV[kv]
        if kind == "auto":
            kind = "f32" if kinds.most_common(1)[0][0] == "f32" else "f16"
        self._cache = _new_cache(self.config, pages, page, kind)
        self._adapters: set[int] = set()
        for (layer, slot), (a, b) in self._own.items():
            self._model.set_adapter(OWN, layer, slot, a, b)
        self._logits = np.empty((0, self.config.vocab_size), np.float32)
        self._hidden = np.empty((0, self.config.hidden_size), np.float32)

    def step(self, batch: StepBatch) -> tuple[np.ndarray | None, np.ndarray | None]:
        """See `criadero.engine.runner.Runner.step`."""
        wanted = len(batch.logit_rows)
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self.config.vocab_size), np.float32)
            self._hidden = np.empty((wanted, self.config.hidden_size), np.float32)
        logits = self._logits[:wanted] if batch.want_logits else None
        hidden = self._hidden[:wanted] if batch.want_hidden else None
        adapters = batch.adapters
        if self._own:
            given = np.full(len(batch.lengths), NO_ADAPTER, np.int32) if adapters is None else adapters
            adapters = np.where(given == NO_ADAPTER, np.int32(OWN), given).astype(np.int32)
        if len(batch.lengths) and batch.lengths.max() > self.config.max_position_embeddings:
            raise ValueError(
                f"lengths: {batch.lengths.max()} tokens; the model's context is {self.config.max_position_embeddings}"
            )
        try:
            self._model.step(
                self._cache, batch.ids, batch.positions, batch.starts, batch.lengths, batch.tables, adapters,
                batch.logit_rows, logits, hidden,
            )  # fmt: skip
        except TypeError:
            raise ValueError(
                "the arrays of a step must be C-contiguous int32, the tables with two dimensions"
            ) from None
        return logits, hidden

    def add_adapter(self, index: int, tensors: AdapterTensors) -> None:
        """See `criadero.engine.runner.Runner.add_adapter`. On a quantised base that is under an adapter of its own, both apply."""
        if not 0 <= index < OWN:
            raise ValueError(f"adapter {index}: numbers lie between 0 and {OWN - 1}")
        if index in self._adapters:
            raise ValueError(f"adapter {index} is loaded already")
        if not tensors:
            raise ValueError(f"adapter {index} has no tensors")
        whole = dict(self._own)
        for key, (a, b) in tensors.items():
            if key in whole:  # B A + B' A' = [B B'] [A; A']
                a, b = np.concatenate((whole[key][0], a)), np.concatenate((whole[key][1], b), axis=1)
            whole[key] = a, b
        self._adapters.add(index)
        try:
            for (layer, slot), (a, b) in whole.items():
                self._model.set_adapter(index, layer, slot, *(np.ascontiguousarray(x, np.float32) for x in (a, b)))
        except BaseException:
            self.drop_adapter(index)
            raise

    def drop_adapter(self, index: int) -> None:
        """See `criadero.engine.runner.Runner.drop_adapter`."""
        self._adapters.discard(index)
        self._model.drop_adapter(index)

    def profile(self, on: bool = True) -> dict[str, float]:
        """Seconds spent in each part of a step since the last call; measured from now on, or, with False, no more."""
        return dict(self._model.profile(on))


def _new_model(config: ModelConfig, threads: int) -> Any:
    try:
        return native().Model(  # type: ignore[union-attr]
            config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.vocab_size, config.rms_norm_eps, threads,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"the native runner cannot compute this model: {error}") from None


def _new_cache(config: ModelConfig, pages: int, page: int, kind: str) -> Any:
    shape = (config.num_hidden_layers, pages, page, config.num_key_value_heads, config.head_dim)
    try:
        return native().Cache(*shape, kind)  # type: ignore[union-attr]
    except ValueError as error:
        raise UserError(f"a cache of {pages} pages of {page} tokens cannot be made: {error}") from None
    except MemoryError:
        raise UserError(
            f"a cache of {pages} pages of {page} tokens does not fit the memory: give it fewer pages"
        ) from None


# --- weights: from a file's tensors to packed matrices ---


def _fill(
    model: Any, config: ModelConfig, load: Load, form: str, own: AdapterTensors, threads: int, mapped: bool
) -> tuple[Counter[str], AdapterTensors]:
    """Put every tensor into the model, one after the other.

    Formats of the layers' matrices, counted in weights, and what of the adapter ``own`` was not merged (where the base is quantised).
    """
    kinds: Counter[str] = Counter()
    rest: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}

    def packed(name: str, weight: Weight | GgmlBlocks) -> Any:
        if isinstance(weight, GgmlBlocks) and (
            form not in ("auto", weight.form) or (weight.kind == "BF16" and not mapped)
        ):
            weight = weight.unpack()
        if not isinstance(weight, GgmlBlocks):
            weight = converted(weight, form)
            if mapped and isinstance(weight, np.ndarray) and weight.dtype == np.uint16 and _map_under(weight):
                weight = GgmlBlocks(
                    "BF16", weight.reshape(-1).view(np.uint8), weight.shape, 0, f"tensor {name}", threads
                )
        if isinstance(weight, np.ndarray):
            kind = "bf16" if weight.dtype == np.uint16 else "f32"
        else:
            kind = weight.described() if isinstance(weight, GgmlBlocks) else describe(weight)
        kinds[kind] += weight.shape[0] * weight.shape[1]
        try:
            if not isinstance(weight, GgmlBlocks):
                made = pack(weight, threads)
            elif mapped and weight.stays:
                _advise(weight.raw, "MADV_WILLNEED")  # what is not in memory yet is read while the rest is made ready
                return native().Linear.map_rows(weight.kind, weight.raw, *weight.shape, weight.heads)  # type: ignore[union-attr]
            else:
                made = native().Linear.pack_ggml(weight.kind, weight.raw, *weight.shape, weight.heads, threads)  # type: ignore[union-attr]
        except ValueError as error:
            where = weight.where if isinstance(weight, GgmlBlocks) else f"tensor {name}"
            raise UserError(f"{where} cannot be used by the native runner: {error}; get the file again") from None
        _forget(weight.raw if isinstance(weight, GgmlBlocks) else weight)
        return made

    frequencies, factor = rope_frequencies(config)
    model.set_rope(frequencies, factor)
    # the largest first: while there is little else, there is room for it twice
    outer = ("lm_head.weight", EMBEDDING)
    names = sorted((name for name, _ in expected_shapes(config)), key=lambda name: name not in outer)
    for name in names:
        weight = load(name)
        if name == EMBEDDING:
            if config.tie_word_embeddings:
                head = packed(name, weight)
                model.set_head(head)
                model.set_embedding_linear(head)
            else:
                _set_embedding(model, weight, mapped)
        elif name == "lm_head.weight":
            model.set_head(packed(name, weight))
        elif name == "model.norm.weight":
            model.set_norm(0, "final", _vector(weight))
        else:
            _, _, number, inner = name.removesuffix(".weight").split(".", 3)  # model.layers.3.self_attn.q_proj
            layer = int(number)
            if inner in NORMS:
                model.set_norm(layer, NORMS[inner], _vector(weight))
                continue
            key = layer, SLOT_OF[inner]
            if key in own and isinstance(weight, GgmlBlocks) and weight.kind == "BF16":
                weight = weight.unpack()
            if key in own and isinstance(weight, np.ndarray):
                weight = _merged(weight, *own[key])
            elif key in own:
                rest[key] = own[key]
            model.set_linear(*key, packed(name, weight))
    native().give_back_memory()  # type: ignore[union-attr]
    return kinds, rest


def _vector(weight: Weight | GgmlBlocks) -> np.ndarray:
    assert isinstance(weight, np.ndarray)  # the formats of blocks are for matrices
    return floats(weight)


def converted(weight: Weight, form: str) -> Weight:
    """A matrix in the number format ``form`` (f32, bf16, int8, int4), or with ``auto`` in its own, f16 as bf16."""
    if form == "auto":
        if isinstance(weight, QuantTensor) or weight.dtype in (np.float32, np.uint16):
            return weight
        form = "bf16" if weight.dtype == np.float16 else "f32"
    if isinstance(weight, QuantTensor) and form == f"int{weight.bits}":
        return weight
    if form in ("int8", "int4"):
        import torch

        from criadero.quantization.rounding import round_matrix

        columns = weight.shape[1]
        group = 32 if columns % 32 == 0 else columns  # one scale a row is for 8 bits only
        return round_matrix(torch.from_numpy(floats(weight)), 4 if form == "int4" and group == 32 else 8, group)
    if not isinstance(weight, QuantTensor) and weight.dtype == (np.uint16 if form == "bf16" else np.float32):
        return weight
    return floats(weight) if form == "f32" else bf16(floats(weight))


def _merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """W + B A in the dtype of W, rounded once, as `criadero.lora.merge` does."""
    whole = floats(weight) + b @ a  # [N, K]
    if weight.dtype == np.uint16:
        return bf16(whole)
    return whole.astype(weight.dtype)


def _set_embedding(model: Any, weight: Weight | GgmlBlocks, mapped: bool) -> None:
    """Rows to look up, in the form they are stored in."""
    if isinstance(weight, GgmlBlocks):
        if mapped and weight.stays:
            model.set_embedding_linear(native().Linear.map_rows(weight.kind, weight.raw, *weight.shape, 0))  # type: ignore[union-attr]
            return
        raw, weight = weight.raw, weight.unpack()
        _forget(raw)  # all of it was read; of a table only used rows are read again
    if isinstance(weight, QuantTensor):
        arrays = [None if a is None else _held(a) for a in (weight.q, weight.scales, weight.mins)]
        model.set_embedding_quant(*arrays, weight.bits, weight.group)
    else:
        model.set_embedding(_held(weight))


def _held(array: np.ndarray) -> np.ndarray:
    """The array itself when it is large and mapped, else a copy."""
    fit = array.flags.c_contiguous and array.flags.aligned
    return array if fit and array.nbytes > COPIED else np.array(array, order="C")


def _forget(weight: Weight) -> None:
    """Tell the system that the mapped pages of a tensor are not needed any more, so that they do not count as ours."""
    arrays = (weight.q, weight.scales, weight.mins) if isinstance(weight, QuantTensor) else (weight,)
    for array in (one for one in arrays if one is not None):
        _advise(array, "MADV_DONTNEED")


def _advise(array: np.ndarray, advice: str) -> None:
    """Tell the system, where it takes advice, about the mapped pages of an array."""
    under = _map_under(array)
    if under and hasattr(mmap, advice):
        file, begin = under
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        file.madvise(getattr(mmap, advice), first, begin + array.nbytes - first)


def _map_under(array: np.ndarray) -> tuple[mmap.mmap, int] | None:
    """The mapped file that an array lies in, and where in it; None of an array in memory of its own."""
    base: Any = array
    whole = array
    while isinstance(base, np.ndarray):
        whole, base = base, base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap):
        return None
    return base, array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]


# --- files ---


def open_weights(path: Path, threads: int = 1) -> tuple[ModelConfig, Load]:
    """Configuration, and a function from Hugging Face's name of a tensor to its weights, which are read when it is called."""
    from criadero.checkpoints import find_place, packed
    from criadero.checkpoints.meta import is_meta_folder, read_meta

    path = find_place(path)
    if path.is_file():
        return _open_gguf(path, threads)
    if is_meta_folder(path):
        config, state = read_meta(path)
        return config, dict(_arrays(state)).pop
    if packed.is_quantised(path):
        config, weights = packed.read_quantised(path)
        return config, weights.pop
    config = load_config(path)
    return config, map_folder(path, config).pop


def _open_gguf(path: Path, threads: int) -> tuple[ModelConfig, Load]:
    """The tensors of a GGUF file; see `criadero.checkpoints.ggml_quantised` for its formats."""
    from criadero.checkpoints.ggml import finite, unpack_array
    from criadero.checkpoints.ggml_quantised import KEPT
    from criadero.checkpoints.gguf import gguf_name, hf_name, read_gguf_config, reorder
    from criadero.checkpoints.gguf_file import read_header
    from criadero.checkpoints.layout import to_rotate_half

    header = read_header(path)
    config = read_gguf_config(header)
    if not header.tensors:
        raise UserError(f"{path}: holds a vocabulary only, no model")
    shapes = {hf_name(name): info.shape for name, info in header.tensors.items() if name != "rope_freqs.weight"}
    check_shapes(config, shapes, str(path))
    whole = np.memmap(path, np.uint8, "r")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def load(name: str) -> Weight | GgmlBlocks:
        info = header.tensors[gguf_name(name)]
        if info.kind not in (*KEPT, "BF16") or len(info.shape) != 2:
            plain = unpack_array(whole[info.offset : info.offset + info.size], info.kind, info.shape)
            if not finite(plain):
                raise UserError(f"{path}: tensor {info.name!r} holds values that are not finite; get the file again")
            weight = np.ascontiguousarray(reorder(name, config, to_rotate_half, plain))
            if name == EMBEDDING or not np.may_share_memory(weight, plain):
                _forget(plain)  # of a table only used rows are read again, of what was copied nothing
            return weight
        raw = whole[info.offset : info.offset + info.size]
        rows, columns = info.shape
        order = heads.get(name.split(".")[-2], 0)
        return GgmlBlocks(info.kind, raw, (rows, columns), order, f"{path}: tensor {info.name!r}", threads)

    return config, load


def map_folder(folder: Path, config: ModelConfig) -> dict[str, Weight]:
    """The tensors of a Hugging Face folder as arrays over the mapped files, checked against the configuration."""
    from criadero.checkpoints.packed import map_file
    from criadero.checkpoints.safetensors_hf import weight_files
    from criadero.checkpoints.states import check_tie

    state: dict[str, Weight] = {}
    for path in weight_files(folder):
        for name, array in map_file(path).items():
            if name.endswith(".rotary_emb.inv_freq"):  # files of 2023 store them; they follow from the configuration
                continue
            if name in state:
                raise UserError(f"{path}: tensor {name} is also in another file of this model")
            if array.dtype not in (np.float32, np.float16, np.uint16):
                raise UserError(
                    f"{path}: tensor {name} has type {array.dtype}; only F32, F16 and BF16 weights are read"
                )
            state[name] = array
    check_shapes(config, {name: tuple(weight.shape) for name, weight in state.items()}, str(folder))
    if config.tie_word_embeddings and (head := state.pop("lm_head.weight", None)) is not None:
        pair = {"lm_head.weight": head, "model.embed_tokens.weight": state["model.embed_tokens.weight"]}
        check_tie(config, {name: floats(weight) for name, weight in pair.items()}, str(folder))
    return state


def _arrays(state: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors as arrays of the same memory, bfloat16 as its bits."""
    import torch

    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        yield name, (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
