"""Meta's own Llama folders: ``params.json`` and ``consolidated.NN.pth``, one file a tensor-parallel rank.

A ``.pth`` is a pickle, which can run programs when it is opened. So this process never opens one: `meta_reader.py` does,
isolated, and leaves safetensors, which are then read like any stranger's. The layout is that of llama's ``model.py``:
``wq wk wv w1 w3 output`` are cut by rows, ``wo w2`` by columns, embeddings by columns (Llama 1, 2) or rows (3).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.checkpoints.layout import to_rotate_half
from criadero.checkpoints.safetensors_hf import read_files, read_json
from criadero.checkpoints.states import check_shapes
from criadero.config import ModelConfig
from criadero.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")
# keys of params.json that say how to run or train the model, not what it computes
HARMLESS = {"max_batch_size", "max_seq_len", "multiple_of", "ffn_dim_multiplier", "use_kv_cache"}
READ = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta", "use_scaled_rope"}


def is_meta_folder(folder: str | Path) -> bool:
    return (Path(folder) / "params.json").is_file() and not (Path(folder) / "config.json").is_file()


def read_meta(folder: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and weights of a Meta folder.

    ``params.json`` does not say everything: whether the embeddings are tied is seen from the weights; the context length
    and Llama 3.x's scaling factor follow from the published models (see `_context_length`, `_scaling`).
    """
    import torch

    folder = Path(folder)
    params = read_json(folder / "params.json")
    unknown = sorted(set(params) - READ - HARMLESS)
    if unknown:
        raise UserError(f"{folder / 'params.json'}: {unknown[0]} = {params[unknown[0]]!r} is not supported")
    for key in ("dim", "n_layers", "n_heads"):
        if not isinstance(params.get(key), int) or isinstance(params[key], bool) or params[key] <= 0:
            raise UserError(f"{folder / 'params.json'}: {key} must be a positive integer, not {params.get(key)!r}")
    files = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{number:02d}.pth" for number in range(len(files))]
    if not files or files != expected:
        wanted = next((path for path in expected if path not in files), folder / "consolidated.00.pth")
        raise UserError(f"{folder}: {wanted.name} is missing: download the model again")
    with tempfile.TemporaryDirectory(prefix="criadero-meta-") as temporary:
        parts = _read_isolated(files, Path(temporary))
        whole = _join(parts, params, folder)
    if "output.weight" in whole and torch.equal(whole["output.weight"], whole["tok_embeddings.weight"]):
        del whole["output.weight"]
    config = _config(params, whole, folder)
    state = {}
    for name, tensor in whole.items():
        new = _hf_name(name)
        if new.endswith("q_proj.weight"):
            tensor = to_rotate_half(tensor, config.num_attention_heads)
        elif new.endswith("k_proj.weight"):
            tensor = to_rotate_half(tensor, config.num_key_value_heads)
        state[new] = tensor
    return config, state


def _read_isolated(files: list[Path], temporary: Path) -> list[dict[str, Tensor]]:
    """The tensors of each ``.pth``, read by a process that has nothing else to do."""
    size = sum(path.stat().st_size for path in files)
    seconds = 60 + size // 20_000_000
    command = [sys.executable, "-I", str(Path(__file__).with_name("meta_reader.py"))]
    try:
        done = subprocess.run(
            [*command, str(size), str(seconds), str(temporary), *(str(path.resolve()) for path in files)],
            env={"OMP_NUM_THREADS": "1", "PATH": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10 * seconds,
            cwd=temporary,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{files[0].parent}: not read after {10 * seconds} seconds, and given up") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1][-300:] if lines else f"{files[0].parent}: its reader ended with code {done.returncode}"
        raise UserError(f"{reason}; get the file again, from Meta")
    parts = []
    for number in range(len(files)):
        tensors = read_files([temporary / f"{number}.safetensors"])
        # cloned, because the temporary file goes away
        parts.append({name: tensor.clone() for name, tensor in tensors.items() if not name.endswith("rope.freqs")})
    return parts


def _hf_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "layers" and parts[1].isdecimal() and parts[2] in INNER:
        return f"model.layers.{parts[1]}.{INNER[parts[2]]}"
    return name


def _join(parts: list[dict[str, Tensor]], params: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """The ranks' pieces put together."""
    import torch

    names = set(parts[0])
    for number, part in enumerate(parts):
        if set(part) != names:
            name = min(names ^ set(part))
            raise UserError(f"{folder}: consolidated.{number:02d}.pth and .00 differ: only one has {name}")
    whole: dict[str, Tensor] = {}
    for name in list(parts[0]):
        pieces = [part.pop(name) for part in parts]
        if pieces[0].ndim != 2:
            whole[name] = pieces[0]  # norms are the same on every rank
            continue
        columns = name.endswith(BY_COLUMNS)
        if name == "tok_embeddings.weight":
            columns = pieces[0].shape[1] != params["dim"]
        try:
            whole[name] = torch.cat(pieces, dim=1 if columns else 0) if len(pieces) > 1 else pieces[0]
        except RuntimeError:
            shapes = ", ".join(str(list(piece.shape)) for piece in pieces)
            raise UserError(f"{folder}: the pieces of {name} do not fit together: {shapes}") from None
    return whole


def _config(params: dict[str, Any], state: dict[str, Tensor], folder: Path) -> ModelConfig:
    where = str(folder)
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in state or state[name].ndim != 2:
            raise UserError(f"{where}: tensor {name} is missing: the model is incomplete")
    heads = params["n_heads"]
    config = ModelConfig(
        vocab_size=state["tok_embeddings.weight"].shape[0],
        hidden_size=params["dim"],
        intermediate_size=state["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=params["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=params.get("n_kv_heads") or heads,
        max_position_embeddings=_context_length(params),
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        rope_theta=float(params.get("rope_theta", 10000.0)),
        rope_scaling=_scaling(params),
        tie_word_embeddings="output.weight" not in state,
        **_special_ids(folder),
    )
    check_shapes(config, {_hf_name(name): tuple(tensor.shape) for name, tensor in state.items()}, where)
    return config


def _context_length(params: dict[str, Any]) -> int:
    """Tokens the published models were trained to read: Llama 1, 2, Code Llama, 3, and 3.1 or later."""
    if params.get("use_scaled_rope"):
        return 131072
    theta = params.get("rope_theta", 10000.0)
    if theta >= 1_000_000:
        return 16384
    if theta >= 500_000:
        return 8192
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _scaling(params: dict[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's numbers; the two small text models of 3.2 (1B: 16 layers, 3B: 28 layers) were scaled by 32, not 8."""
    if not params.get("use_scaled_rope"):
        return None
    small = (params["dim"], params["n_layers"]) in ((2048, 16), (3072, 28))
    return {
        "rope_type": "llama3",
        "factor": 32.0 if small else 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _special_ids(folder: Path) -> dict[str, Any]:
    """First and last token of a text, from the tokenizer beside the weights if there is one."""
    if not (folder / "tokenizer.model").is_file():
        return {}
    from criadero.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
