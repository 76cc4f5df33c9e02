"""GGUF files against the ``gguf`` package, transformers' own reader, and files that are damaged on purpose."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from test_checkpoints_hf import same
from test_model import LLAMA3, VARIANTS, YARN, distance, make, tokens

from criadero.checkpoints import (
    load_config,
    load_model,
    read_gguf,
    read_gguf_config,
    read_gguf_template,
    read_gguf_tokenizer,
    write_gguf,
)
from criadero.checkpoints.ggml import FORMATS, PACK, PLAIN, UNPACK, WRITABLE, pack, unpack
from criadero.checkpoints.gguf_file import read_header
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer, load_tokenizer, train_bpe

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}

# --- number formats, bit for bit ---


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_have_the_sizes_of_ggml(kind: str) -> None:
    code = GGMLQuantizationType[kind]
    assert (FORMATS[kind].code, (FORMATS[kind].block, FORMATS[kind].size)) == (int(code), gguf.GGML_QUANT_SIZES[code])


@pytest.mark.parametrize("kind", UNPACK)
def test_unpacking_random_bytes_equals_the_gguf_package(kind: str) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (40, FORMATS[kind].size * 3), dtype=np.uint8)
    with np.errstate(all="ignore"):  # some of the scales are not finite
        theirs = quants.dequantize(raw, GGMLQuantizationType[kind])
    ours = unpack(raw.reshape(-1), kind, (40, FORMATS[kind].block * 3)).numpy()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def awkward_weights() -> torch.Tensor:
    """Rows of many magnitudes, zeros, halves that round either way, and blocks of one value."""
    dice = np.random.default_rng(0)
    rows = dice.standard_normal((300, 256)) * 10 ** dice.uniform(-7, 3, (300, 1))
    rows[0] = 0
    rows[1] = np.arange(256) / 2
    rows[2] = -np.arange(256) / 2
    rows[3] = 1
    rows[4, ::2] = 0
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize("kind", WRITABLE)
def test_packing_equals_the_gguf_package(kind: str) -> None:
    weights = awkward_weights()
    theirs = quants.quantize(weights.numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(pack(weights, kind, "w"), theirs.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("kind", WRITABLE)
def test_packing_again_changes_nothing_more(kind: str) -> None:
    once = unpack(pack(awkward_weights(), kind, "w"), kind, (300, 256))
    again = unpack(pack(once, kind, "w"), kind, (300, 256)).float()
    # a scale is rounded to float16 after the weights were: a second packing may move by that much
    assert torch.allclose(again, once.float(), rtol=0 if kind in PLAIN else 2e-3, atol=1e-7)


@pytest.mark.parametrize("kind", [*PACK, "F16"])
def test_what_does_not_fit_a_format_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="w holds values that are not finite"):
        pack(torch.full((1, 32), torch.nan), kind, "w")
    with pytest.raises(UserError, match=f"w holds values too large for {kind}"):
        pack(torch.full((1, 32), 1e20), kind, "w")


# --- models ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_round_trip(tmp_path: Path, variant: str) -> None:
    model = make(**VARIANTS[variant], max_position_embeddings=64)
    path = tmp_path / "model.gguf"
    if variant == "yarn untruncated":
        with pytest.raises(UserError, match="truncate"):
            write_gguf(model, None, path, type="F32")
        assert not list(tmp_path.iterdir())
        return
    write_gguf(model, None, path, type="F32")
    config, _, tokenizer = read_gguf(path)
    assert tokenizer is None
    loaded = load_model(path)
    assert same(loaded, model)
    assert (config.tie_word_embeddings, config.head_dim) == (model.config.tie_word_embeddings, model.config.head_dim)
    assert config == load_config(path) == loaded.config
    with torch.no_grad():
        assert distance(loaded(tokens()), model(tokens())) < 1e-5
    if not variant.startswith("yarn "):
        assert config == model.config
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


def test_special_ids_survive(tmp_path: Path) -> None:
    for eos in (None, 2, (2, 5)):
        model = make(bos_token_id=1, eos_token_id=eos, pad_token_id=0)
        write_gguf(model, None, tmp_path / "m.gguf", type="F16")
        assert read_gguf_config(tmp_path / "m.gguf") == model.config


@pytest.mark.parametrize("kind", WRITABLE)
def test_tensors_equal_the_gguf_packages_reading(tmp_path: Path, kind: str) -> None:
    model = make(**SIZE, scale=1, rope_theta=500000.0, rope_scaling=LLAMA3)
    path = tmp_path / "model.gguf"
    write_gguf(model, None, path, type=kind, template="{{ messages }}", name="test")
    reader = GGUFReader(path)
    header = read_header(path)
    assert {tensor.name for tensor in reader.tensors} == set(header.tensors)
    for tensor in reader.tensors:
        theirs = quants.dequantize(tensor.data, tensor.tensor_type)
        info = header.tensors[tensor.name]
        assert (info.kind, info.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        raw = path.read_bytes()[info.offset : info.offset + info.size]
        ours = unpack(np.frombuffer(bytearray(raw), np.uint8), info.kind, info.shape).float().numpy()
        assert np.array_equal(ours.ravel(), np.asarray(theirs, np.float32).ravel()), tensor.name
        if len(info.shape) == 1:
            assert info.kind == "F32"
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["general.name"] == "test"
    assert fields["general.file_type"] == gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    assert read_gguf_template(path) == "{{ messages }}"
    loaded = load_model(path)
    expected = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 5e-2, "Q4_0": 0.5}[kind]
    with torch.no_grad():
        error = float((loaded.float()(tokens()) - model(tokens())).norm() / model(tokens()).norm())
    assert error <= expected
    assert loaded.config.rope_scaling == model.config.rope_scaling


@pytest.mark.parametrize("variant", ["gqa", "mha", "tied", "theta 500000"])
@torch.no_grad()
def test_transformers_reads_our_files(tmp_path: Path, variant: str) -> None:
    """An independent reader undoes our order of rows, with grouped-query attention too."""
    transformers = pytest.importorskip("transformers")
    model = make(**VARIANTS[variant])
    write_gguf(model, None, tmp_path / "model.gguf", type="F32")
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    assert distance(model(tokens()), twin(tokens()).logits) < 1e-5


def test_quantising_and_reordering_commute(tmp_path: Path) -> None:
    """Rows are moved whole, so the numbers of a quantised q or k are those of quantising before the move."""
    model = make(**SIZE)
    write_gguf(model, None, tmp_path / "model.gguf", type="Q8_0")
    state = load_model(tmp_path / "model.gguf").state_dict()
    name = "model.layers.1.self_attn.k_proj.weight"
    weight = model.state_dict()[name]
    assert torch.equal(state[name], unpack(pack(weight, "Q8_0", name), "Q8_0", tuple(weight.shape)))


def test_published_llama3_scaling_is_recognised(tmp_path: Path) -> None:
    """Files of others hold only the divided frequencies; Meta's numbers are tried, anything else is refused."""
    meta = LLAMA3 | {"original_max_position_embeddings": 8192}
    for scaling, known in ((meta, True), (LLAMA3, False)):
        model = make(rope_theta=500000.0, rope_scaling=scaling, head_dim=16)
        path = tmp_path / "model.gguf"
        write_gguf(model, None, path, type="F32")
        path.write_bytes(path.read_bytes().replace(b"criadero.rope_scaling.", b"somebody.rope_scaling."))
        if known:
            assert read_gguf_config(path).rope_scaling == scaling
        else:
            with pytest.raises(UserError, match="are not Llama 3's"):
                read_gguf_config(path)


def test_a_row_that_is_no_multiple_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of 32: choose type F16"):
        write_gguf(make(), None, tmp_path / "model.gguf", type="Q8_0")
    with pytest.raises(UserError, match="choose one of"):
        write_gguf(make(), None, tmp_path / "model.gguf", type="Q9_9")
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path: Path) -> None:
    model = make()
    write_gguf(model, None, tmp_path / "model.gguf", type="F32")
    before = (tmp_path / "model.gguf").read_bytes()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 3] = torch.inf
    with pytest.raises(UserError, match="not finite"):
        write_gguf(model, None, tmp_path / "model.gguf", type="F32")
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


# --- vocabularies ---

TEXTS = [
    "Hello, world", " two  spaces   three", "tab\tand\nnew\r\nlines\n\n\n", "¿Qué hora es? 12345 años", "日本語 🦙🦙",
    "<|end|> <s> </s> <|eot_id|>", "it's we'LL I'm", "", " ", "a\u0301e\u0301 \x00\x7f",
]  # fmt: skip


def same_ids(one: Tokenizer, two: Tokenizer) -> bool:
    for text in TEXTS:
        ids = one.encode(text)
        if ids != two.encode(text) or one.decode(ids) != two.decode(ids):
            return False
    ends = [(t.bos_id, t.eos_id, t.pad_id, t.vocab_size, t.special) for t in (one, two)]
    return ends[0] == ends[1]


def our_tokenizer() -> Tokenizer:
    texts = [
        "a small shop opens at nine and sells bread, milk and coffee",
        "¿a qué hora abren los domingos por la mañana?",
    ]
    return train_bpe(texts, 320)


def test_our_tokenizer_travels_in_the_file(tmp_path: Path) -> None:
    tokenizer = our_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    model = make(vocab_size=352, **ids)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", type="F32")
    again = read_gguf_tokenizer(tmp_path / "model.gguf")
    assert again is not None
    assert again.vocab_size == 320
    assert again.special == tokenizer.special
    assert all(again.encode(text) == tokenizer.encode(text) for text in TEXTS)
    header = read_header(tmp_path / "model.gguf")
    assert header.metadata["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 352  # llama.cpp wants a token for each row
    assert read_gguf(tmp_path / "model.gguf")[0] == model.config


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="320 tokens, the model only 99"):
        write_gguf(make(), our_tokenizer(), tmp_path / "model.gguf", type="F32")


@pytest.mark.parametrize("name", ["llama2", pytest.param("llama3", marks=pytest.mark.slow)])
def test_published_tokenizers_survive(shared: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(next((shared / "tokenizers" / name).rglob("*tokenizer*.model")))
    model = make(vocab_size=tokenizer.vocab_size, hidden_size=12, num_hidden_layers=1)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", type="F16")
    again = read_gguf_tokenizer(tmp_path / "model.gguf")
    assert again is not None
    assert same_ids(tokenizer, again)


@pytest.mark.parametrize("name", ["llama-spm", "deepseek-coder", "gpt-2"])
def test_vocabulary_only_files(shared: Path, name: str) -> None:
    path = shared / "tokenizers" / "llama_cpp_vocab_tests" / f"ggml-vocab-{name}.gguf"
    tokenizer = read_gguf_tokenizer(path)
    assert tokenizer is not None
    questions = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    answers = path.with_suffix(".gguf.out").read_text(encoding="utf-8").splitlines()
    assert len(answers) == len(questions) - (not questions[-1].strip())
    for question, answer in zip(questions, answers, strict=False):
        assert tokenizer.encode(question) == [int(id) for id in answer.split()], question
    if name == "gpt-2":
        with pytest.raises(UserError, match="is 'gpt2'"):
            load_model(path)
        return
    config, state, _ = read_gguf(path)
    assert state == {}
    assert config.vocab_size == tokenizer.vocab_size
    with pytest.raises(UserError, match="holds a vocabulary only"):
        load_model(path)


# --- damage ---


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """A small file with everything in it, and where its data starts."""
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    tokenizer = our_tokenizer()
    model = make(**SIZE, vocab_size=320, num_hidden_layers=1, rope_scaling=LLAMA3, eos_token_id=(1, 2))
    write_gguf(model, tokenizer, path, type="Q8_0", template="{{ messages }}")
    return path.read_bytes(), min(info.offset for info in read_header(path).tensors.values())


@pytest.fixture
def limited() -> Iterator[None]:
    """No more than 1 GB of further memory: a count taken on trust would fail here."""
    statm = Path("/proc/self/statm")
    if not statm.exists():  # macOS neither says how much is used nor limits it
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_cut_file_is_refused(whole: tuple[bytes, int], tmp_path: Path, limited: None) -> None:
    data, start = whole
    dice = random.Random(0)
    path = tmp_path / "model.gguf"
    cuts = [
        *range(40),
        *(dice.randrange(start) for _ in range(60)),
        *(dice.randrange(start, len(data)) for _ in range(40)),
    ]
    for cut in cuts:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            load_model(path)


def test_flipped_bytes_are_refused_or_read(whole: tuple[bytes, int], tmp_path: Path, limited: None) -> None:
    """Whatever a byte of the header is changed to: one clear line, or a model that was checked."""
    data, start = whole
    dice = random.Random(1)
    path = tmp_path / "model.gguf"
    refused = 0
    # the keys before the vocabulary and the table after it are where numbers lie; the vocabulary gets its share
    tokens_at, table_at = data.index(b"tokenizer.ggml.tokens"), data.index(b"rope_freqs.weight")
    places = [*range(24), *(dice.randrange(24, start) for _ in range(60))]
    places += [dice.randrange(24, tokens_at) for _ in range(60)] + [dice.randrange(table_at, start) for _ in range(120)]
    for at in places:
        changed = bytearray(data)
        changed[at] = dice.choice((0, 0xFF, 0x80, changed[at] ^ (1 << dice.randrange(8)), dice.randrange(256)))
        path.write_bytes(changed)
        try:
            load_model(path)
            read_gguf_template(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
            assert len(str(error)) < 600  # noqa: PT017
    assert refused > 50


@pytest.mark.slow
def test_many_flipped_bytes(whole: tuple[bytes, int], tmp_path: Path, limited: None) -> None:
    data, start = whole
    dice = random.Random(2)
    path = tmp_path / "model.gguf"
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            changed[dice.randrange(start)] = dice.choice((0, 0xFF, 0x7F, 0x80, dice.randrange(256)))
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            load_model(path)


def tiny(keys: list[bytes], tensors: list[bytes], data: bytes = b"", counts: tuple[int, int] | None = None) -> bytes:
    numbers = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", code, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\3\4" + b"\0" * 40, "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + b"\0" * 9, "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + b"\0" * 9, "big-endian"),
        (tiny([], [], counts=(0, 2**63)), "keys needs"),
        (tiny([], [], counts=(2**60, 0)), "tensors needs"),
        (tiny([key("a", 8, struct.pack("<Q", 2**62))], []), "key 'a' needs"),
        (tiny([key("a", 9, struct.pack("<IQ", 0, 2**62))], []), "key 'a' needs"),
        (tiny([key("a", 9, struct.pack("<IQ", 8, 2**40))], []), "key 'a' needs"),
        (tiny([key("a", 9, struct.pack("<IQ", 9, 1))], []), "array of unknown type 9"),
        (tiny([key("a", 99, b"")], []), "unknown type 99"),
        (tiny([key("a", 7, b"\2")], []), "neither true nor false"),
        (tiny([key("a", 8, struct.pack("<Q", 2) + b"\xff\xff")], []), "not UTF-8"),
        (tiny([key("a", 7, b"\1")] * 2, []), "occurs twice"),
        (tiny([key("general.alignment", 4, struct.pack("<I", 0))], []), "general.alignment"),
        (tiny([key("general.alignment", 4, struct.pack("<I", 48))], []), "general.alignment"),
        (tiny([key("general.alignment", 8, text("32"))], []), "general.alignment"),
        (tiny([], [tensor("t", (4,), code=99)], b"\0" * 16), "type number 99"),
        (tiny([], [tensor("t", (4, 0))], b"\0" * 16), "cannot have shape"),
        (tiny([], [tensor("t", (33,), code=8)], b"\0" * 64), "cannot have shape"),
        (tiny([], [tensor("t", (1,) * 5)], b"\0" * 16), "5 dimensions"),
        (tiny([], [tensor("t", (2**32, 2**32))], b"\0" * 16), "bytes after the file"),
        (tiny([], [tensor("t", (2**63, 2))], b"\0" * 16), "bytes after the file"),
        (tiny([], [tensor("t", (4,), offset=8)], b"\0" * 64), "not a multiple of 32"),
        (tiny([], [tensor("t", (4,), offset=2**63)], b"\0" * 64), "bytes after the file"),
        (tiny([], [tensor("t", (4,)), tensor("u", (4,))], b"\0" * 64), "overlap"),
        (tiny([], [tensor("t", (4,)), tensor("t", (4,), offset=32)], b"\0" * 64), "occurs twice"),
        (tiny([], [tensor("t", (4,))], b"\0" * 16), "general.architecture is None"),
        (tiny([key("general.architecture", 8, text("mamba"))], []), "general.architecture is 'mamba'"),
        (tiny([key("general.architecture", 8, text("llama"))], []), "key 'llama.embedding_length' is missing"),
    ],
)
def test_lies_are_named(tmp_path: Path, limited: None, content: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def rewrite(path: Path, change: Callable[[dict[str, Any], list[Any]], None]) -> None:
    """Write the file again by the ``gguf`` package, with other keys or tensors."""
    reader = GGUFReader(path)
    keys = {n: (f.types, f.contents()) for n, f in reader.fields.items() if not n.startswith("GGUF.")}
    values = {name: value for name, (_, value) in keys.items()}
    tensors = [[t.name, t.data.copy(), t.tensor_type] for t in reader.tensors]
    change(values, tensors)
    path.unlink()
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", "llama"))
    for name, value in values.items():
        kind = keys[name][0][0] if name in keys else gguf.GGUFValueType.get_type(value)
        sub = keys[name][0][1] if name in keys and kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, sub_type=sub)
    for name, data, kind in tensors:
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_rewritten_by_the_gguf_package_is_read(tmp_path: Path) -> None:
    model = make(**SIZE, rope_scaling=YARN | {"attention_factor": 0.9})
    path = tmp_path / "model.gguf"
    write_gguf(model, None, path, type="F32")
    rewrite(path, lambda keys, tensors: None)
    assert same(load_model(path), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys, tensors: tensors.pop(3), "is missing"),
        (lambda keys, tensors: keys.update({"llama.block_count": 2**31}), r"layers\.1.* is missing"),
        (lambda keys, tensors: keys.update({"llama.attention.head_count_kv": 4}), "has shape"),
        (lambda keys, tensors: keys.update({"llama.attention.head_count": 3}), "must be a multiple|unequal"),
        (lambda keys, tensors: keys.update({"llama.attention.head_count": 0}), "positive"),
        (lambda keys, tensors: keys.update({"llama.expert_count": 8}), "expert_count"),
        (lambda keys, tensors: keys.update({"llama.rope.dimension_count": 8}), "partly rotated"),
        (lambda keys, tensors: keys.update({"llama.rope.scaling.type": "longrope"}), "'longrope' is not supported"),
        (lambda keys, tensors: keys.update({"llama.vocab_size": 2**31}), "has shape"),
        (lambda keys, tensors: keys.pop("llama.context_length"), "context_length' is missing"),
        (lambda keys, tensors: keys.pop("llama.embedding_length"), "embedding_length' is missing"),
        (
            lambda keys, tensors: tensors.append(["blk.0.attn_q.bias", np.zeros(64, np.float32), None]),
            r"blk\.0\.attn_q\.bias is not part of a Llama",
        ),
        (lambda keys, tensors: tensors[5][1].fill(np.nan), "not finite"),
    ],
)
def test_files_that_do_not_fit_themselves(tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(make(**SIZE, num_hidden_layers=1), None, path, type="F32")
    rewrite(path, change)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_the_last_header_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(make(**SIZE), None, path)
    assert read_header(path) is not read_header(path)  # written a moment ago
    os.utime(path, (1, 1))
    kept = read_header(path)
    assert read_header(path) is kept
    os.utime(path, (2, 2))
    assert read_header(path) is not kept
    os.utime(path, (1, 1))
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UserError, match="after the file does"):
        read_header(path)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_header(path)


def test_other_files_are_not_models(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="not a model"):
        load_model(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_gguf(tmp_path / "missing.gguf")
