"""The native step against its twin, `criadero.model.Llama`; and its promise that a row's bits depend on nothing else in the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from criadero.config import ModelConfig, rope_frequencies
from criadero.kernels import native, pack
from criadero.kernels.formats import QuantTensor
from criadero.model import Llama

pytestmark = [
    pytest.mark.skipif(native() is None, reason="the compiled kernels are not installed"),
    pytest.mark.usefixtures("one_torch_thread"),
]


MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
SHAPES = {
    "mha": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4},
    "gqa": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2},
    "mqa": {"hidden_size": 320, "intermediate_size": 100, "num_attention_heads": 5, "num_key_value_heads": 1},
    "288": {"hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 6},
    "odd": {"hidden_size": 60, "intermediate_size": 70, "num_attention_heads": 3, "num_key_value_heads": 3},
    "wide": {"hidden_size": 32, "intermediate_size": 33, "num_attention_heads": 80, "num_key_value_heads": 1, "head_dim": 6},
}  # fmt: skip


def make_model(shape: str = "gqa", **fields: Any) -> Llama:
    """A small model whose attention is far from uniform."""
    values = {"vocab_size": 67, "num_hidden_layers": 2, "max_position_embeddings": 4096} | SHAPES[shape] | fields
    model = Llama(ModelConfig(**values)).eval()
    model.initialise(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(3 if "embed" not in name else 20)
            else:
                weight.copy_(1 + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.requires_grad_(False)


def build(model: Llama, threads: int = 2, make: Any = None) -> Any:
    """The native model; ``make`` turns a matrix (name, float32) into what `pack` takes."""
    c = model.config
    made = native().Model(
        c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads, c.head_dim,
        c.vocab_size, c.rms_norm_eps, threads,
    )  # fmt: skip
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    make = make or (lambda name, w: w)
    for i in range(c.num_hidden_layers):
        made.set_norm(i, "input", state[f"model.layers.{i}.input_layernorm.weight"])
        made.set_norm(i, "post", state[f"model.layers.{i}.post_attention_layernorm.weight"])
        for slot, module in MODULES.items():
            name = f"model.layers.{i}.{module}.weight"
            made.set_linear(i, slot, pack(make(name, state[name]), threads))
    head = pack(make("lm_head.weight", state["lm_head.weight"]), threads)
    made.set_head(head)
    if c.tie_word_embeddings:
        made.set_embedding_linear(head)
    else:
        made.set_embedding(state["model.embed_tokens.weight"])
    made.set_norm(0, "final", state["model.norm.weight"])
    frequencies, factor = rope_frequencies(c)
    made.set_rope(frequencies, factor)
    return made


def new_cache(config: ModelConfig, pages: int = 64, page: int = 16, kv: str = "f32") -> Any:
    return native().Cache(config.num_hidden_layers, pages, page, config.num_key_value_heads, config.head_dim, kv)


def batch(requests: list[tuple[np.ndarray, int, np.ndarray]]) -> dict[str, Any]:
    """Arrays of a step from (new ids, position of the first, page table) of each request."""
    counts = [len(ids) for ids, _, _ in requests]
    tables = np.zeros((len(requests), max(len(table) for _, _, table in requests)), np.int32)
    for row, (_, _, table) in zip(tables, requests, strict=True):
        row[: len(table)] = table
    return {
        "ids": np.concatenate([ids for ids, _, _ in requests]).astype(np.int32),
        "positions": np.concatenate([np.arange(at, at + len(ids)) for ids, at, _ in requests]).astype(np.int32),
        "starts": np.cumsum([0, *counts]).astype(np.int32),
        "lengths": np.array([at + len(ids) for ids, at, _ in requests], np.int32),
        "tables": tables,
        "adapters": None,
        "logit_rows": np.arange(sum(counts), dtype=np.int32),
    }


def run(model: Any, config: ModelConfig, cache: Any, arrays: dict[str, Any]) -> np.ndarray:
    logits = np.full((len(arrays["logit_rows"]), config.vocab_size), np.nan, np.float32)
    model.step(cache, **arrays, logits=logits, hidden=None)
    return logits


def apart(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference over the largest number."""
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def play(model: Any, config: ModelConfig, texts: list[np.ndarray], page: int, kv: str, seed: int) -> list[np.ndarray]:
    """The logits of every position of some texts, run as a random mix of chunks and single tokens, on random pages."""
    random = np.random.default_rng(seed)
    needed = [-(-len(text) // page) for text in texts]
    cache = new_cache(config, sum(needed) + 3, page, kv)
    free = random.permutation(sum(needed) + 3)
    tables = np.split(free[: sum(needed)], np.cumsum(needed)[:-1])
    done, out = [0] * len(texts), [[] for _ in texts]
    while any(at < len(text) for at, text in zip(done, texts, strict=True)):
        chosen = [i for i, text in enumerate(texts) if done[i] < len(text) and random.random() < 0.8]
        if not chosen:
            continue
        parts = [texts[i][done[i] : done[i] + random.choice([1, 1, 2, 7, 33, 150])] for i in chosen]
        logits = run(model, config, cache, batch([(p, done[i], tables[i]) for i, p in zip(chosen, parts, strict=True)]))
        for i, part, rows in zip(chosen, parts, np.split(logits, np.cumsum([len(p) for p in parts])[:-1]), strict=True):
            out[i].append(rows)
            done[i] += len(part)
    return [np.concatenate(rows) for rows in out]


@pytest.fixture
def texts() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, 67, size) for size in (90, 41, 1, 130)]


@pytest.fixture(params=[] if native() is None else native().levels())
def each_level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native().level()
    native().set_level(request.param)
    yield request.param
    native().set_level(before)


def expected(model: Llama, ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None])[0].float().numpy()


# --- parity ---


@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_the_twin(shape: str, page: int, texts: list[np.ndarray]) -> None:
    model = make_model(shape, tie_word_embeddings=page == 48)
    for got, text in zip(play(build(model), model.config, texts, page, "f32", 5), texts, strict=True):
        assert apart(got, expected(model, text)) < 1e-4


def test_every_level_is_the_twin(each_level: str, texts: list[np.ndarray]) -> None:
    model = make_model("gqa")
    for got, text in zip(play(build(model), model.config, texts, 32, "f32", 6), texts, strict=True):
        assert apart(got, expected(model, text)) < 1e-4


@pytest.mark.parametrize(("kv", "most"), [("f32", 1e-4), ("f16", 3e-3), ("bf16", 2e-2), ("int8", 4e-2)])
def test_formats_of_the_cache_over_several_segments(each_level: str, kv: str, most: float) -> None:
    model = make_model("gqa", num_hidden_layers=1)
    text = np.random.default_rng(2).integers(0, 67, 600)
    got = play(build(model), model.config, [text], 32, kv, 7)[0]
    assert apart(got, expected(model, text)) < most


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
])  # fmt: skip
def test_rope_scalings(scaling: dict[str, Any], texts: list[np.ndarray]) -> None:
    model = make_model("mha", rope_scaling=scaling)
    assert apart(play(build(model), model.config, texts[:1], 16, "f32", 8)[0], expected(model, texts[0])) < 1e-4


def quantised(bits: int, group: int, mins: bool, w: np.ndarray) -> QuantTensor:
    """Plain rounding."""
    rows, columns = w.shape
    blocks = w.reshape(rows, columns // group, group)
    low, high = blocks.min(-1), blocks.max(-1)
    if mins:
        scales, least = ((high - low) / 15).astype(np.float16), (-low).astype(np.float16)
        q = np.rint((blocks + least[..., None]) / scales[..., None].astype(np.float32)).clip(0, 15)
    else:
        top = 7 if bits == 4 else 127
        scales, least = (np.abs(blocks).max(-1) / top).astype(np.float16), None
        q = np.rint(blocks / scales[..., None].astype(np.float32)).clip(-top - 1, top)
    q = q.reshape(rows, columns)
    if bits == 8:
        return QuantTensor(8, group, q.astype(np.int8), scales)
    u = (q if mins else q + 8).astype(np.uint8)
    return QuantTensor(4, group, u[:, 0::2] | u[:, 1::2] << 4, scales, least)


@pytest.mark.parametrize(("kind", "most"), [
    ((4, 32, False), 0.03), ((4, 32, True), 0.03), ((8, 32, False), 0.03), ((8, 16, False), 0.03), ((8, 0, False), 0.03), ("bf16", 0.02),
])  # fmt: skip
def test_quantised_weights_against_the_twin_on_their_numbers(
    kind: Any, most: float, each_level: str, texts: list[np.ndarray]
) -> None:
    # activations are rounded to 8 bits (or bf16) on the way into each product: relative error of the logits' root mean square
    model = make_model("gqa", hidden_size=192, intermediate_size=256, tie_word_embeddings=True)
    state = model.state_dict()

    def make(name: str, w: np.ndarray) -> Any:
        if kind == "bf16":
            bits = torch.from_numpy(w).bfloat16()
            state[name].copy_(bits.float())
            return bits.view(torch.uint16).numpy()
        weight = quantised(kind[0], kind[1] or w.shape[1], kind[2], w)
        state[name].copy_(torch.from_numpy(weight.dequantise()))
        return weight

    made = build(model, make=make)  # fills the twin with the rounded weights
    for got, text in zip(play(made, model.config, texts, 16, "f32", 9), texts, strict=True):
        wanted = expected(model, text)
        assert np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean()) < most


def test_forms_of_the_embedding() -> None:
    model = make_model("mha", num_hidden_layers=1)
    table = model.state_dict()["model.embed_tokens.weight"]
    ids = np.arange(20)
    for form in ("f32", "f16", "bf16", "int8", "int4", "int4 mins", "linear"):
        made = build(model)
        if form in ("int8", "int4", "int4 mins"):
            w = quantised(8 if form == "int8" else 4, 32, "mins" in form, table.numpy())
            made.set_embedding_quant(w.q, w.scales, w.mins, w.bits, w.group)
            used = torch.from_numpy(w.dequantise())
        elif form == "linear":
            made.set_embedding_linear(pack(table.numpy(), 1))
            used = table
        else:
            used = table.to({"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[form])
            made.set_embedding((used.view(torch.uint16) if form == "bf16" else used).numpy())
        with torch.no_grad():
            twin = make_model("mha", num_hidden_layers=1)
            twin.model.embed_tokens.weight.copy_(used.float())
        got = run(made, model.config, new_cache(model.config), batch([(ids, 0, np.array([3, 1]))]))
        assert apart(got, expected(twin, ids)) < 1e-4, form


# --- the promise: bits ---


@pytest.mark.parametrize("kv", ["f32", "f16", "int8"])
@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_bits_depend_on_nothing_else(each_level: str, kv: str, weights: str) -> None:
    model = make_model("gqa", num_hidden_layers=1)
    random = np.random.default_rng(4)
    texts = [random.integers(0, 67, size) for size in (530, 40, 9)]  # long enough to be cut over threads
    make = None if weights == "f32" else (lambda name, w: quantised(4, 32, False, w))
    alone = [play(build(model, 1, make), model.config, [text], 16, kv, 1)[0] for text in texts]
    for threads, page in ((1, 32), (2, 16), (3, 64)):
        together = play(build(model, threads, make), model.config, texts, page, kv, 20 + threads)
        for one, other in zip(alone, together, strict=True):
            assert np.array_equal(one, other)


def test_a_long_prompt_in_turns_has_the_same_bits() -> None:
    model = make_model("mha", num_hidden_layers=1)
    text = np.random.default_rng(4).integers(0, 67, 1100)  # more rows than go through the layers at once
    made, table = build(model), np.arange(69)
    whole = run(made, model.config, new_cache(model.config, 69), batch([(text, 0, table)]))
    cache = new_cache(model.config, 69)
    parts = [
        run(made, model.config, cache, batch([(part, at, table)]))
        for part, at in [(text[:700], 0), (text[700:1099], 700), (text[1099:], 1099)]
    ]
    assert np.array_equal(whole, np.concatenate(parts))


def test_what_lies_in_a_page_past_the_end_is_not_read() -> None:
    model = make_model("gqa")
    c, text = model.config, np.random.default_rng(4).integers(0, 67, 40)
    made, cache, table = build(model), new_cache(model.config, 4), np.array([2, 0, 3])
    clean = run(made, c, cache, batch([(text, 0, table)]))
    made.set_adapter(0, 0, "v", np.full((1, 96), np.nan, np.float32), np.ones((32, 1), np.float32))
    poison = batch([(text[:31], 0, np.array([0, 2])), (text[:32], 0, np.array([1, 3]))])
    assert np.isnan(run(made, c, cache, poison | {"adapters": np.array([0, 0], np.int32)})).any()
    parts = [run(made, c, cache, batch([(text[at : at + n], at, table)])) for at, n in [(0, 1), (1, 20), (21, 19)]]
    assert np.array_equal(np.concatenate(parts), clean)


def test_wanted_rows_and_hidden_states() -> None:
    model = make_model("gqa")
    text = np.random.default_rng(4).integers(0, 67, 50)
    made, arrays = build(model), batch([(text, 0, np.arange(4))])
    whole = run(made, model.config, new_cache(model.config), arrays)
    arrays["logit_rows"] = np.array([0, 7, 49], np.int32)
    logits, hidden = np.empty((3, 67), np.float32), np.empty((3, 96), np.float32)
    made.step(new_cache(model.config), **arrays, logits=logits, hidden=hidden)
    assert np.array_equal(logits, whole[[0, 7, 49]])
    with torch.inference_mode():
        wanted = model(torch.from_numpy(text)[None], return_hidden=True)[0, [0, 7, 49]].numpy()
    assert apart(hidden, wanted) < 1e-4
    arrays["logit_rows"] = np.array([], np.int32)  # a chunk of a prompt, of which nothing is wanted
    made.step(new_cache(model.config), **arrays, logits=np.empty((0, 67), np.float32), hidden=None)
    made.step(new_cache(model.config), **arrays, logits=None, hidden=None)


# --- adapters ---


def adapter_tensors(model: Llama, seed: int, rank: int, slots: str = "q k v o gate up down") -> dict[Any, Any]:
    random, state, out = np.random.default_rng(seed), model.state_dict(), {}
    for layer in range(model.config.num_hidden_layers):
        for slot in slots.split():
            rows, columns = state[f"model.layers.{layer}.{MODULES[slot]}.weight"].shape
            a = (random.standard_normal((rank, columns)) / np.sqrt(columns)).astype(np.float32)
            out[layer, slot] = a, (0.3 * random.standard_normal((rows, rank)) / np.sqrt(rank)).astype(np.float32)
    return out


def test_adapters_are_the_merged_weights(each_level: str) -> None:
    model = make_model("gqa", hidden_size=180)
    c, random = model.config, np.random.default_rng(5)
    adapters = [adapter_tensors(model, 1, 8), adapter_tensors(model, 2, 3, "q v down"), {}]
    made, twins = build(model), []
    for index, tensors in enumerate(adapters):
        twin = make_model("gqa", hidden_size=180)
        for (layer, slot), (a, b) in tensors.items():
            made.set_adapter(index, layer, slot, a, b)
            with torch.no_grad():
                twin.get_submodule(f"model.layers.{layer}.{MODULES[slot]}").weight += torch.from_numpy(b @ a)
        twins.append(twin)
    texts = [random.integers(0, 67, size) for size in (30, 20, 25, 9)]
    who = [0, 2, 1, 0]
    cache = new_cache(c, 8, 32)
    indices = np.array([-1 if i == 2 else i for i in who], np.int32)
    first = batch([(text[:-1], 0, np.array([i])) for i, text in enumerate(texts)]) | {"adapters": indices}
    last = batch([(text[-1:], len(text) - 1, np.array([i])) for i, text in enumerate(texts)]) | {"adapters": indices}
    logits = np.split(run(made, c, cache, first), first["starts"][1:-1])
    ends = run(made, c, cache, last)
    for i, text in enumerate(texts):
        wanted = expected(twins[who[i]], text)
        assert apart(np.concatenate((logits[i], ends[i : i + 1])), wanted) < 1e-4
        alone = run(made, c, new_cache(c), batch([(text, 0, np.arange(2))]) | {"adapters": indices[i : i + 1]})
        assert np.array_equal(alone, np.concatenate((logits[i], ends[i : i + 1])))
    made.drop_adapter(0)
    with pytest.raises(ValueError, match="adapter 0 is not there"):
        run(made, c, cache, last)


# --- bad arguments ---

WRONG = [
    ({"ids": [0, 1, 67, 3]}, r"ids\[2\]: 67"),
    ({"ids": [0, -1, 2, 3]}, r"ids\[1\]: -1"),
    ({"ids": [0, 1]}, "positions: 4 entries"),
    ({"positions": [0, 1, 2, 5]}, "row 3 is at position 5, not 3"),
    ({"starts": [0, 4, 5]}, "starts: 3 entries"),
    ({"starts": [1, 4]}, "starts: must go from 0 to 4"),
    ({"starts": [0, 3]}, "starts: must go from 0 to 4"),
    ({"lengths": [3]}, "a length of 3 with 4 new rows"),
    ({"lengths": [2**31 - 1]}, "a length of 2147483647, but its table holds 2 pages"),
    ({"lengths": [-5]}, "a length of -5"),
    ({"tables": [[0]], "positions": [16, 17, 18, 19], "lengths": [20]}, "a length of 20, but its table holds 1 pages"),
    ({"tables": [[4, 0]]}, "page 4 of a cache of 4"),
    ({"tables": [[-1, 0]]}, "page -1 of a cache of 4"),
    ({"tables": [[0], [1]]}, "tables: 2 entries"),
    ({"adapters": [0]}, "adapter 0 is not there"),
    ({"adapters": [0, 0]}, "adapters: 2 entries"),
    ({"logit_rows": [0, 4]}, r"logit_rows\[1\]: 4"),
    ({"logit_rows": [1, 1]}, r"logit_rows\[1\]: 1"),
    ({"logit_rows": [-1, 1]}, r"logit_rows\[0\]: -1"),
    ({"logit_rows": [0, 1, 2]}, "logits: "),
    ({"logit_rows": [0, 1, 2, 3, 3]}, "more than there are rows"),
    ({"ids": [0, 1, 2, 3], "starts": [0, 2, 4], "lengths": [2, 2], "positions": [0, 1, 0, 1], "tables": [[1], [1]]}, "written to twice"),
    ({"ids": [0, 1, 2, 3], "starts": [0, 2, 4], "lengths": [2, 18], "positions": [0, 1, 16, 17], "tables": [[1, 0], [1, 2]]},
     "request 1: page 1 is written to by request 0"),
    ({"ids": [0, 1, 2, 3], "starts": [0, 5, 4], "lengths": [5, 1], "positions": [0, 1, 2, 3], "tables": [[1], [2]]}, r"starts\[1\]: 5"),
    ({"ids": [0, 1, 2, 3], "starts": [0, 0, 4], "lengths": [1, 4], "positions": [0, 1, 2, 3], "tables": [[1], [2]]}, r"starts\[1\]: 0"),
    ({"ids": [], "positions": [], "starts": [0], "lengths": [], "tables": np.zeros((0, 1), np.int32), "logit_rows": []}, "no rows"),
]  # fmt: skip


@pytest.fixture(scope="module")
def small() -> tuple[Any, ModelConfig]:
    model = make_model("mha", num_hidden_layers=1)
    return build(model, 1), model.config


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_a_wrong_step_is_refused_and_writes_nothing(small: Any, change: dict[str, Any], said: str) -> None:
    made, c = small
    cache = new_cache(c, 4, 16)
    arrays = batch([(np.arange(4), 0, np.array([0, 1]))]) | {"logit_rows": np.array([0, 3], np.int32)}
    arrays |= {name: np.array(value, np.int32) for name, value in change.items()}
    logits = np.full((2 if said != "no rows" else 0, c.vocab_size), 7, np.float32)
    with pytest.raises(ValueError, match=said):
        made.step(cache, **arrays, logits=logits, hidden=None)
    assert (logits == 7).all()


def test_wrong_types_and_caches_are_refused(small: Any) -> None:
    made, c = small
    arrays, logits = batch([(np.arange(4), 0, np.array([0]))]), np.empty((4, c.vocab_size), np.float32)
    for name in ("ids", "tables", "logit_rows"):
        with pytest.raises(TypeError):
            made.step(new_cache(c), **(arrays | {name: arrays[name].astype(np.int64)}), logits=logits, hidden=None)
    with pytest.raises(TypeError):
        made.step(new_cache(c), **arrays, logits=logits.astype(np.float64), hidden=None)
    with pytest.raises(TypeError):
        made.step(
            new_cache(c), **arrays, logits=np.asfortranarray(np.empty((4, c.vocab_size), np.float32)), hidden=None
        )
    logits.flags.writeable = False
    with pytest.raises(TypeError):
        made.step(new_cache(c), **arrays, logits=logits, hidden=None)
    other = native().Cache(2, 4, 16, 4, 16, "f32")
    with pytest.raises(ValueError, match="cache: 2 layers"):
        made.step(other, **arrays, logits=None, hidden=np.empty((4, 64), np.float32))
    with pytest.raises(ValueError, match="hidden: "):
        made.step(new_cache(c), **arrays, logits=None, hidden=np.empty((4, 63), np.float32))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [((1, 4, 20, 2, 16, "f32"), "multiple of 16"), ((1, 4, 16, 2, 15, "f32"), "odd"), ((0, 4, 16, 2, 16, "f32"), "layers: 0"),
     ((1, 0, 16, 2, 16, "f32"), "pages: 0"), ((1, 4, 16, 2, 16, "f8"), "f32, f16, bf16 and int8")],
)  # fmt: skip
def test_a_cache_that_cannot_be_is_refused(sizes: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        native().Cache(*sizes)
    with pytest.raises(MemoryError):
        native().Cache(4096, 2**26, 16384, 4096, 4096, "f32")


def test_an_incomplete_or_wrong_model_is_refused() -> None:
    n = native()
    with pytest.raises(ValueError, match="multiple of 3 kv_heads"):
        n.Model(64, 96, 1, 4, 3, 16, 67, 1e-5, 1)
    with pytest.raises(ValueError, match="odd"):
        n.Model(64, 96, 1, 4, 4, 15, 67, 1e-5, 1)
    made = n.Model(64, 96, 1, 4, 4, 16, 67, 1e-5, 1)
    arrays = batch([(np.arange(4), 0, np.array([0]))])
    cache = n.Cache(1, 4, 16, 4, 16, "f32")
    with pytest.raises(ValueError, match="layer 0 has no q"):
        made.step(cache, **arrays, logits=None, hidden=None)
    matrix = pack(np.zeros((64, 96), np.float32), 1)
    for act, said in (
        (lambda: made.set_linear(0, "q", matrix), r"layer 0 q: \[64, 96\], \[64, 64\]"),
        (lambda: made.set_linear(1, "down", matrix), "layer 1 of 1"),
        (lambda: made.set_linear(0, "qq", matrix), 'slot "qq"'),
        (lambda: made.set_head(matrix), "head: "),
        (lambda: made.set_embedding_linear(matrix), "embedding: "),
        (lambda: made.set_embedding(np.zeros((67, 63), np.float32)), "embedding: "),
        (lambda: made.set_embedding(np.zeros((67, 64), np.float64)), "embedding: "),
        (lambda: made.set_norm(0, "input", np.zeros(63, np.float32)), "63 weights"),
        (lambda: made.set_norm(0, "middle", np.zeros(64, np.float32)), "input, post and final"),
        (lambda: made.set_rope(np.zeros(9, np.float32), 1.0), "9 frequencies"),
        (lambda: made.set_adapter(0, 0, "q", np.zeros((2, 64), np.float32), np.zeros((63, 2), np.float32)), "63 rows"),
        (
            lambda: made.set_adapter(0, 0, "q", np.zeros((2, 64), np.float32), np.zeros((64, 3), np.float32)),
            "3 columns",
        ),
        (
            lambda: made.set_adapter(-1, 0, "q", np.zeros((2, 64), np.float32), np.zeros((64, 2), np.float32)),
            "start at 0",
        ),
        (lambda: made.drop_adapter(5), "adapter 5"),
    ):
        with pytest.raises(ValueError, match=said):
            act()
