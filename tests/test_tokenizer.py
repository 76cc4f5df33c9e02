"""Tokenizers against sentencepiece, tiktoken, llama.cpp's expectations and transformers; round trips; damaged files."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from criadero.errors import UserError
from criadero.tokenizer import (
    SPECIAL,
    SPLITS,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    mend_surrogates,
    tokenizer_from_vocab,
    train_bpe,
)

ROOT = Path(__file__).resolve().parents[1]
CORPUS = [
    "The llama walks up the hill, and the little llama walks behind her.",
    "La llama sube al cerro; ¿quién sube con ella? ¡El niño, mañana!",
    "One, two, three: 1 22 333 4444.  Two spaces,\ttabs\nand newlines\r\n\r\n.",
    "def walk(n):\n    return [step for step in range(n)]\n",
] * 3
STRINGS = [
    "",
    " ",
    "  ",
    "a",
    " a",
    "a ",
    "\n",
    "\n\n\n",
    "\t \t\n \r\n\r",
    " " * 100,
    " " * 5 + "x" + " " * 37,
    "\n" * 33 + " " * 16 + "\t" * 9,
    "▁",
    "▁▁a ▁",
    "\x00",
    "a\x00b\x01\x02\x1f\x7f\x80\x9f",
    "\u200b\u200d\ufeff\u2028\u2029\x85\xa0\u3000",
    "Hello, world! I'LL DON'T it's we've 'S",
    "0 1 12 123 1234 12345 3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ १२३",
    "ñandú, pingüino, ¿qué? ¡ay! — «así» …",
    "cafe\u0301 n\u0303 a\u0300\u0301\u0302\u0303 z\u0351\u036b\u0343\u036a",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇲🇽 😶‍🌫️ 1️⃣ 🦙",
    "日本語のテキスト、漢字かな交じり文。我想在apple工作1314151天～",
    "한국어 텍스트 กำลังทดสอบ កាន់តែពិសេសអាចខលចេញ",
    "مرحبا بالعالم ‏שלום עולם नमस्ते दुनिया",
    "𝕳𝖊𝖑𝖑𝖔 𓀀𓁐 \U0010fffd \ue000 \ufffd",
    "<s></s><unk><pad><0x41><0x0A>",
    "<|begin_of_text|><|eot_id|><|end_of_text|> <|start_header_id|>user<|end_header_id|>\n\n",
    "<|bos|><|eos|><|end|><|user|> [INST] <<SYS>> <|endoftext|><|im_start|>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababababab" + "=" * 77 + "-" * 50,
    "for i in range(10):\n\tprint(f'{i:>10}')  # comment\n\n\n    pass\n",
    "http://example.org/a?b=c&d=%20#e C:\\dir\\file.txt $\\frac{1}{2}$",
]
bad_bytes = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "replace"))
words = st.lists(st.sampled_from([*STRINGS, "the", " llama", "ing", "1", "23"]), max_size=6).map("".join)
text = st.one_of(st.text(max_size=60), bad_bytes, words)
quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@cache
def own() -> Tokenizer:
    return train_bpe(CORPUS, 380)


@cache
def read(path: Path) -> Tokenizer:
    """Llama 3's takes two seconds: once for all tests."""
    return load_tokenizer(path)


@pytest.fixture(scope="session")
def llama2(shared: Path) -> Tokenizer:
    return read(shared / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="session")
def llama3(shared: Path) -> Tokenizer:
    return read(shared / "tokenizers/llama3/models__llama3__tokenizer.model")


@pytest.fixture(scope="session")
def sentencepiece_model(shared: Path):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers/llama2/tokenizer.model"))


@pytest.fixture(scope="session")
def tiktoken_model(shared: Path):
    import tiktoken

    lines = (shared / "tokenizers/llama3/models__llama3__tokenizer.model").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    return tiktoken.Encoding("llama3", pat_str=SPLITS["llama-bpe"][0], mergeable_ranks=ranks, special_tokens={})


# --- equal to the reference implementations ---


@pytest.mark.parametrize("string", STRINGS)
def test_llama2_equals_sentencepiece(llama2, sentencepiece_model, string):
    ids = llama2.encode(string)
    assert ids == sentencepiece_model.encode(string)
    assert llama2.decode(ids) == sentencepiece_model.decode(ids)


def test_llama2_equals_sentencepiece_on_anything(llama2, sentencepiece_model):
    @quick
    @given(text)
    @example("ababababa bababab aaaa   aaaaa")
    def check(string: str) -> None:
        ids = llama2.encode(string)
        assert ids == sentencepiece_model.encode(string)
        assert llama2.decode(ids) == string.replace("▁", " ")

    check()


def test_llama2_random_repeats(llama2, sentencepiece_model):
    """Where x+y and y+z are the same token, the leftmost is joined: strings of few letters meet that often."""
    source = random.Random(0)
    for _ in range(1500):
        letters = source.choice(["a ", "ab", "aab ", ".-", "=", "\n ", "10", "ha", "es ", "an"])
        string = "".join(source.choice(letters) for _ in range(source.randrange(2, 40)))
        assert llama2.encode(string) == sentencepiece_model.encode(string), repr(string)


def test_llama2_special_ids(llama2, sentencepiece_model):
    assert (llama2.kind, llama2.vocab_size) == ("spm", sentencepiece_model.vocab_size())
    assert (llama2.bos_id, llama2.eos_id, llama2.pad_id) == (1, 2, None)
    assert llama2.special == {"<unk>": 0, "<s>": 1, "</s>": 2}
    for id in range(3, llama2.vocab_size):
        piece = sentencepiece_model.id_to_piece(id)
        expected = bytes([int(piece[3:5], 16)]) if sentencepiece_model.is_byte(id) else piece.replace("▁", " ").encode()
        assert llama2.token_bytes(id) == expected


@pytest.mark.parametrize("string", STRINGS)
def test_llama3_equals_tiktoken(llama3, tiktoken_model, string):
    ids = llama3.encode(string)
    assert ids == tiktoken_model.encode_ordinary(string)
    assert llama3.decode(ids) == tiktoken_model.decode(ids) == string


def test_llama3_equals_tiktoken_on_anything(llama3, tiktoken_model):
    @quick
    @given(text)
    def check(string: str) -> None:
        ids = llama3.encode(string)
        assert ids == tiktoken_model.encode_ordinary(string)
        assert llama3.decode(ids) == string

    check()


def test_llama3_random_repeats(llama3, tiktoken_model):
    source = random.Random(0)
    for _ in range(1500):
        letters = source.choice(["ab", "aab", ".-", "=", "\n ", "ha", "an", "es", "!?", "ñn", "あい"])
        string = "".join(source.choice(letters) for _ in range(source.randrange(2, 40)))
        assert llama3.encode(string) == tiktoken_model.encode_ordinary(string), repr(string)


def test_llama3_special_ids(llama3):
    """The ids in Meta's documentation and in Llama 3.1's published generation_config.json."""
    assert llama3.vocab_size == 128256
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)
    expected = {
        "start_header_id": 128006,
        "end_header_id": 128007,
        "eom_id": 128008,
        "eot_id": 128009,
        "python_tag": 128010,
    }
    assert {name: llama3.special[f"<|{name}|>"] for name in expected} == expected
    assert llama3.special["<|reserved_special_token_0|>"] == 128002
    assert llama3.special["<|reserved_special_token_247|>"] == 128255
    assert llama3.end_ids == (128001, 128008, 128009)


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_lone_surrogates_become_replacement_characters(request, tiktoken_model, name):
    tokenizer = request.getfixturevalue(name)
    for broken, whole in [("a\ud83d b", "a\ufffd b"), ("\ud83d\ude00", "😀"), ("\udc80\udcff", "\ufffd\ufffd")]:
        assert tokenizer.decode(tokenizer.encode(broken)) == whole == mend_surrogates(broken)
        assert tokenizer.encode_batch([broken]) == [tokenizer.encode(broken)]
        if name == "llama3":
            assert tokenizer.encode(broken) == tiktoken_model.encode_ordinary(broken)


# --- llama.cpp's files of expected ids ---


def vocab_test(shared: Path, name: str) -> list[tuple[str, list[int]]]:
    folder = shared / "tokenizers/llama_cpp_vocab_tests"
    inputs = (folder / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = (folder / f"ggml-vocab-{name}.gguf.out").read_text().split("\n")[: len(inputs)]
    cases = [(string, [int(id) for id in line.split()]) for string, line in zip(inputs, outputs, strict=True)]
    assert len(cases) > 40
    return cases


@pytest.mark.parametrize(("name", "fixture"), [("llama-spm", "llama2"), ("llama-bpe", "llama3")])
def test_llama_cpp_expectations(request, shared, name, fixture):
    tokenizer = request.getfixturevalue(fixture)
    for string, ids in vocab_test(shared, name):
        assert tokenizer.encode(string) == ids, repr(string)


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "deepseek-coder", "phi-3"])
def test_vocabularies_of_gguf_files(shared, name):
    """Read with the gguf package, given to tokenizer_from_vocab."""
    path = shared / "tokenizers/llama_cpp_vocab_tests" / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path.name} is not here")
    from gguf import GGUFReader

    fields = GGUFReader(path).fields

    def get(key: str):
        return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None

    tokenizer = tokenizer_from_vocab(
        "spm" if get("model") == "llama" else "bpe",
        get("tokens"),
        scores=get("scores"),
        types=get("token_type"),
        merges=get("merges"),
        pre=get("pre"),
        bos_id=get("bos_token_id"),
        eos_id=get("eos_token_id"),
        pad_id=get("padding_token_id"),
    )
    assert tokenizer.vocab_size == len(get("tokens"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (get("bos_token_id"), get("eos_token_id"))
    for string, ids in vocab_test(shared, name):
        assert tokenizer.encode(string) == ids, repr(string)
        assert tokenizer.decode(ids) == string


# --- our own ---


def test_trained_vocabulary():
    tokenizer = own()
    assert tokenizer.vocab_size == 380
    assert tokenizer.special == {name: 373 + n for n, name in enumerate(SPECIAL)}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (373, 374, 375)
    assert tokenizer.end_ids == (374, 379)
    assert len(tokenizer.encode("the llama walks")) <= 6
    assert len({tokenizer.token_bytes(id) for id in range(380)}) == 380
    assert tokenizer.encode("x", bos=True, eos=True) == [373, *tokenizer.encode("x"), 374]


def test_training_is_deterministic(tmp_path):
    for name in ("one", "two"):
        train_bpe(iter(CORPUS), 380).save(tmp_path / name)
    code = "from test_tokenizer import CORPUS, train_bpe; import sys; train_bpe(CORPUS, 380).save(sys.argv[1])"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "1",
    }
    subprocess.run([sys.executable, "-c", code, tmp_path / "three"], check=True, env=environment)
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two", "three")]
    assert files[0] == files[1] == files[2]


@quick
@given(text)
def test_round_trip_of_text(string):
    tokenizer = own()
    ids = tokenizer.encode(string)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == string
    assert tokenizer.decode_bytes(ids) == string.encode()
    assert tokenizer.encode_batch([string, "x"]) == [ids, tokenizer.encode("x")]


@quick
@given(st.binary(max_size=50))
def test_round_trip_of_bytes(data):
    tokenizer = own()
    byte_ids = {tokenizer.token_bytes(id): id for id in range(tokenizer.vocab_size)}
    ids = [byte_ids[bytes([byte])] for byte in data]
    assert tokenizer.decode_bytes(ids) == data
    assert tokenizer.decode(ids) == data.decode("utf-8", "replace")


@pytest.mark.parametrize("name", ["own", "llama2", "llama3"])
def test_stream_decoder(request, name):
    tokenizer = own() if name == "own" else request.getfixturevalue(name)
    ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)

    @quick
    @given(st.one_of(ids, text.map(tokenizer.encode)), st.booleans(), st.booleans())
    def check(ids: list[int], skip: bool, continues: bool) -> None:
        decoder = StreamDecoder(tokenizer, skip_special=skip, continues=continues)
        pieces = [decoder.push(id) for id in ids]
        whole = tokenizer.decode(ids, skip_special=skip, continues=continues)
        assert "".join(pieces) + decoder.flush() == whole
        if "\ufffd" not in whole:
            assert not any("\ufffd" in piece for piece in pieces)

    check()


def test_stream_decoder_holds_back_half_a_character():
    tokenizer = own()
    ids = tokenizer.encode("a🦙")
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in ids] == ["a", "", "", "", "🦙"]
    assert decoder.flush() == ""
    assert [decoder.push(id) for id in ids[:3]] == ["a", "", ""]
    assert decoder.flush() == "\ufffd"


def test_continuing_text_keeps_its_space(llama2):
    ids = llama2.encode("once upon")
    assert llama2.decode(ids[-1:]) == "upon"
    assert llama2.decode(ids[-1:], continues=True) == " upon"


@pytest.mark.parametrize("name", ["own", "llama2", "llama3"])
def test_offsets_cover_the_text(request, name):
    tokenizer = own() if name == "own" else request.getfixturevalue(name)
    for string in STRINGS:
        ids, offsets = tokenizer.encode_with_offsets(string)
        assert ids == tokenizer.encode(string)
        assert len(ids) == len(offsets)
        covered = {at for start, end in offsets for at in range(start, end)}
        assert covered == set(range(len(string)))
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("name", ["own", "llama2", "llama3"])
def test_special_text_is_text(request, name):
    tokenizer = own() if name == "own" else request.getfixturevalue(name)
    for special in tokenizer.special:
        for string in (special, f"a {special}b", special * 2):
            assert not set(tokenizer.encode(string)) & set(tokenizer.special.values())
            assert tokenizer.decode(tokenizer.encode(string)) == string


def test_encode_template_tells_template_from_content():
    tokenizer = own()
    string = "<|user|>say <|end|> now<|end|>"
    start = string.index("say")
    ids, offsets = tokenizer.encode_template(string, [(start, start + len("say <|end|> now"))])
    user, end = tokenizer.special["<|user|>"], tokenizer.special["<|end|>"]
    assert ids == [user, *tokenizer.encode("say <|end|> now"), end]
    assert offsets[0] == (0, len("<|user|>"))
    assert offsets[-1] == (len(string) - len("<|end|>"), len(string))


def test_named_tokens_are_special_even_if_the_file_says_otherwise(tmp_path):
    own().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_text())
    for token in description["added_tokens"]:
        token["special"] = False
    file.write_text(json.dumps(description))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.special == own().special
    assert tokenizer.decode(tokenizer.encode("<|end|>")) == "<|end|>"
    assert not set(tokenizer.encode("a<|end|>")) & set(tokenizer.special.values())


def test_training_refuses():
    with pytest.raises(UserError, match="at least 263"):
        train_bpe(CORPUS, 262)
    with pytest.raises(UserError, match=r"give only \d+ tokens, not 5000"):
        train_bpe(CORPUS, 5000)
    with pytest.raises(UserError, match="also a word"):
        train_bpe(CORPUS, 380, ("he",))
    with pytest.raises(UserError, match="has no bos"):
        train_bpe(CORPUS, 380, ("<x>",)).encode("a", bos=True)
    with pytest.raises(UserError, match="token id 380 is not"):
        own().decode([380])


# --- saved files, in transformers ---


@pytest.mark.parametrize("name", ["own", "llama2", pytest.param("llama3", marks=pytest.mark.slow)])
def test_transformers_reads_what_is_saved(request, name, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = own() if name == "own" else request.getfixturevalue(name)
    tokenizer.save(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
    )
    assert (again.bos_id, again.eos_id, again.pad_id, again.special, again.kind) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.special,
        tokenizer.kind,
    )
    for string in STRINGS:
        ids = tokenizer.encode(string)
        assert again.encode(string) == ids
        if not any(special in string for special in tokenizer.special):
            assert theirs.encode(string, add_special_tokens=False) == ids
            assert theirs.encode(string) == tokenizer.encode(string, bos=True)
            assert theirs.decode(ids) == tokenizer.decode(ids)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == theirs.chat_template
    saved = (tmp_path / "tokenizer.json").read_bytes()
    again.save(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == saved


def test_a_tokenizer_that_adds_no_bos_keeps_that(tmp_path):
    own().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    tokenizer = load_tokenizer(tmp_path)
    assert own().adds_bos
    assert not tokenizer.adds_bos
    tokenizer.save(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "tokenizer.json").read_text())["post_processor"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "llama2", "llama3"])
def test_transformers_451_reads_what_is_saved(request, name, tmp_path):
    """In a process of its own, with the packages that tests/compat/install.sh puts into .compat."""
    if not (ROOT / ".compat" / "transformers").is_dir():
        pytest.skip("transformers 4.51.3 is not installed: run tests/compat/install.sh")
    tokenizer = own() if name == "own" else request.getfixturevalue(name)
    tokenizer.save(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}")
    strings = [string for string in STRINGS if not any(special in string for special in tokenizer.special)]
    code = """
import json, sys, transformers
assert transformers.__version__ == "4.51.3", transformers.__version__
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
assert tokenizer.chat_template
strings = json.load(sys.stdin)
print(json.dumps([[tokenizer.encode(s, add_special_tokens=a) for s in strings] for a in (False, True)]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        input=json.dumps(strings),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / ".compat")},
    )
    assert done.returncode == 0, done.stderr
    plain, with_bos = json.loads(done.stdout)
    assert plain == [tokenizer.encode(string) for string in strings]
    assert with_bos == [tokenizer.encode(string, bos=True) for string in strings]


# --- files that are not what they should be ---


def refuses(path: Path, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_missing_files(tmp_path):
    refuses(tmp_path, "no tokenizer.json and no tokenizer.model")
    refuses(tmp_path / "tokenizer.model", "cannot be read: No such file")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    refuses(tmp_path / "tokenizer.model", "is empty")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "data", [b"\x00\xff" * 50, b"hello", b"{}", b'{"model": 3', b"[1, 2]", b"\x0a\xff\xff\xff\xff\x0f"]
)
def test_garbage(tmp_path, file, data):
    (tmp_path / file).write_bytes(data)
    refuses(tmp_path / file, "get the file again|cannot be read")


def test_truncated_sentencepiece(shared, tmp_path):
    data = (shared / "tokenizers/llama2/tokenizer.model").read_bytes()
    for size in (1, 2, 100, 5000, len(data) // 2, len(data) - 1):
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        refuses(tmp_path / "tokenizer.model", "cut off")


def test_truncated_tiktoken(shared, tmp_path):
    data = (shared / "tokenizers/llama3/models__llama3__tokenizer.model").read_bytes()
    for size in (30, 5000, len(data) // 2, len(data) - 4):
        (tmp_path / "tokenizer.model").write_bytes(data[:size])
        refuses(tmp_path / "tokenizer.model", "get it again|get the file again")
    lines = data.splitlines(keepends=True)
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines[:-1]))
    refuses(tmp_path / "tokenizer.model", "127999 tokens")
    (tmp_path / "tokenizer.model").write_bytes(b"".join([*lines[:300], b"!!! 300\n", *lines[301:]]))
    refuses(tmp_path / "tokenizer.model", "line 301")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(data)
    with pytest.raises(UserError):
        load_tokenizer(file)


def test_damaged_tokenizer_json(tmp_path):
    own().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    refuses(file, "not a tokenizer.json")
    description = json.loads(whole)
    description["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a", "continuing_subword_prefix": "##",
                            "max_input_chars_per_word": 100}  # fmt: skip
    file.write_text(json.dumps(description))
    refuses(file, "only BPE")
    file.write_text(whole)
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"bos_token": "<never>"}')
    refuses(file, "'<never>' is not in the vocabulary")
    config.write_text("{")
    refuses(file, "tokenizer_config.json beside it")


def test_vocabularies_that_make_no_sense():
    tokens = ["<unk>", "a", "b", "ab"]
    good = {"scores": [0.0, -1.0, -2.0, 0.0], "types": [2, 1, 1, 1]}
    assert tokenizer_from_vocab("spm", tokens, **good, add_prefix=False).encode("abab") == [3, 3]
    for change, reason in [
        ({"scores": [0.0]}, "4 tokens but 1 scores"),
        ({"types": [1]}, "4 tokens but 1 types"),
        ({"scores": None}, "needs scores"),
        ({"bos_id": 4}, "outside the vocabulary"),
    ]:
        with pytest.raises(UserError, match=reason):
            tokenizer_from_vocab("spm", tokens, **(good | change))
    with pytest.raises(UserError, match="'a' twice"):
        tokenizer_from_vocab("spm", ["<unk>", "a", "a", "b"], **good)
    with pytest.raises(UserError, match="needs merges"):
        tokenizer_from_vocab("bpe", tokens)
    with pytest.raises(UserError, match=re.escape("merge 'a c' does not")):
        tokenizer_from_vocab("bpe", tokens, merges=["a c"])
    with pytest.raises(UserError, match="splits text as 'martian'"):
        tokenizer_from_vocab("bpe", tokens, merges=["a b"], pre="martian")
