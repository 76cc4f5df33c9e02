"""Which layers suffer most from 4 bits: measured one by one, then the worst stay at 8 bits under a budget.

A unit is what an engine computes in one product (q, k and v; o; gate and up; down), and has one number format: vLLM fuses
them and refuses a mixture inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from criadero.model import ModelConfig
from criadero.quantization.gptq import DOWN, GATE_UP, OUT, QKV, Scheme
from criadero.quantization.layers import (
    NORM,
    State,
    embed,
    empty_block,
    forward,
    head_of,
    layer_name,
    load_layer,
    losses,
    wide,
)  # fmt: skip
from criadero.quantization.rounding import round_matrix
from criadero.train.batches import Batch

UNITS = {"qkv": QKV, "o": OUT, "gate_up": GATE_UP, "down": DOWN}
Unit = tuple[int, str]


@torch.no_grad()
def sensitivity(
    state: State,
    config: ModelConfig,
    batches: Sequence[Batch],
    schemes: Mapping[str, Scheme],
    tick: Callable[[], None] = lambda: None,
) -> dict[Unit, float]:
    """The rise of the summed loss when one unit alone is rounded as ``schemes`` says, for every unit that it names whole.

    One pass over the layers carries a copy of the hidden states for each unit rounded below.
    """
    rows = embed(batches, state, config)
    block = empty_block(config)
    plain = [row.x for row in rows]
    branches: dict[Unit, list[torch.Tensor]] = {}
    for layer in range(config.num_hidden_layers):
        load_layer(block, state, layer)
        for unit, xs in branches.items():
            branches[unit] = [forward(block, row, x) for row, x in zip(rows, xs, strict=True)]
        for part, names in UNITS.items():
            full = {name: layer_name(layer, name) for name in names}
            if not all(name in schemes for name in full.values()):
                continue
            rounded = {name: round_matrix(wide(state[name]), *schemes[name], what=name) for name in full.values()}
            load_layer(block, rounded, layer, names)
            branches[layer, part] = [forward(block, row, x) for row, x in zip(rows, plain, strict=True)]
            load_layer(block, state, layer, names)
        plain = [forward(block, row, x) for row, x in zip(rows, plain, strict=True)]
        tick()
    norm, head = wide(state[NORM]), head_of(state)
    before = sum(losses(rows, plain, norm, head, config.rms_norm_eps))
    return {
        unit: sum(losses(rows, xs, norm, head, config.rms_norm_eps)) - before for unit, xs in branches.items()
    }  # fmt: skip


def choose(
    rises: Mapping[Unit, float], state: State, schemes: dict[str, Scheme], budget: float
) -> tuple[dict[str, Scheme], list[Unit]]:
    """Raise units to 8 bits, those first that save the most loss a bit, while the average over the matrices of ``schemes``
    stays within ``budget`` bits a weight, scales counted. Returns the new schemes and the units raised."""
    sizes = {name: state[name].shape[0] * state[name].shape[1] for name in schemes}
    total = sum(sizes.values())
    spent = sum(sizes[name] * cost(scheme, state[name].shape[1]) for name, scheme in schemes.items()) / total
    made, raised = dict(schemes), []

    def names_of(unit: Unit) -> list[str]:
        return [layer_name(unit[0], name) for name in UNITS[unit[1]]]

    def extra(unit: Unit) -> float:
        return 4 * sum(sizes[name] for name in names_of(unit)) / total

    for unit in sorted(rises, key=lambda unit: (-rises[unit] / extra(unit), unit)):
        if rises[unit] > 0 and spent + extra(unit) <= budget + 1e-9:
            spent += extra(unit)
            raised.append(unit)
            made |= {name: (8, schemes[name][1]) for name in names_of(unit)}
    return made, raised


def cost(scheme: Scheme, columns: int) -> float:
    """Bits a weight: its own, and its share of a float16 scale."""
    return scheme[0] + 16 / (scheme[1] or columns)
