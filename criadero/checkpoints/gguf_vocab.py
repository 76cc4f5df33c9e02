"""The tokenizer in a GGUF file's ``tokenizer.*`` keys, in and out.

llama.cpp knows two kinds that matter here: "llama" (SentencePiece: a score for every token, merges follow from them) and
"gpt2" (byte-level: a list of merges, and ``tokenizer.ggml.pre``, the name of the pattern that splits text).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from criadero.checkpoints.gguf_file import Header, read_header
from criadero.errors import UserError
from criadero.tokenizer import SPLITS, Tokenizer, tokenizer_from_vocab

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


# --- reading ---


def read_gguf_template(source: Header | str | Path) -> str | None:
    """The chat template's source, or None where the file has none."""
    header = source if isinstance(source, Header) else read_header(source)
    template = header.metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"{header.path}: key 'tokenizer.chat_template' must be text")
    return template


def read_gguf_tokenizer(source: Header | str | Path) -> Tokenizer | None:
    """The tokenizer, of a file of any architecture; None where the file has none."""
    header = source if isinstance(source, Header) else read_header(source)
    if header.metadata.get("tokenizer.ggml.model", "none") == "none":
        return None
    try:
        return _from_keys(header.metadata)
    except UserError as error:
        raise UserError(f"{header.path}: {error}") from None


def _from_keys(keys: Mapping[str, Any]) -> Tokenizer:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = keys.get(f"tokenizer.ggml.{key}", default)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise UserError(f"key 'tokenizer.ggml.{key}' must be of type {kind.__name__}: the file is damaged")
        return value

    def items(key: str, *kinds: type) -> list[Any] | None:
        values = get(key, list)
        if values is not None and any(not isinstance(value, kinds) or isinstance(value, bool) for value in values):
            raise UserError(f"key 'tokenizer.ggml.{key}' holds something of another type: the file is damaged")
        return values

    model = get("model", str)
    if model not in ("llama", "gpt2"):
        raise UserError(f"key 'tokenizer.ggml.model' = {model!r} is not supported, only 'llama' and 'gpt2' are")
    tokens = items("tokens", str)
    if not tokens:
        raise UserError("key 'tokenizer.ggml.tokens' is missing: the file is damaged")
    types = items("token_type", int)
    end = len(tokens)
    if types is not None and len(types) == end:  # rows of the embedding that no token owns
        while end and types[end - 1] == UNUSED and tokens[end - 1] == f"[PAD{end - 1}]":
            end -= 1
        types = types[:end]
    scores = items("scores", float, int)
    characters = get("precompiled_charsmap", list)
    spm = model == "llama"
    pre = get("pre", str, "default")
    return tokenizer_from_vocab(
        "spm" if spm else "bpe",
        tokens[:end],
        scores=scores[:end] if scores is not None and len(scores) == len(tokens) else scores,
        types=types,
        merges=items("merges", str),
        pre=pre,
        bos_id=get("bos_token_id", int),
        eos_id=get("eos_token_id", int),
        pad_id=get("padding_token_id", int),
        add_bos=get("add_bos_token", bool, spm or pre == "llama-bpe") and get("bos_token_id", int) is not None,
        add_prefix=get("add_space_prefix", bool, True),
        squeeze_spaces=get("remove_extra_whitespaces", bool, False),
        characters=bytes(value & 0xFF for value in characters) if spm and characters else b"",
    )


# --- writing ---


def tokenizer_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys that say this tokenizer, for an embedding of ``rows`` rows; read again and compared before they are used."""
    description = json.loads(tokenizer._backend.to_str())
    spm = tokenizer.kind == "spm"
    vocab: dict[str, int] = description["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in description["model"]["merges"]]
    tokens, types = _tokens(description, vocab, rows, spm)
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if spm else "gpt2",
        "tokenizer.ggml.pre": "default" if spm else _split_name(description),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
    }
    if spm:
        keys["tokenizer.ggml.scores"] = _scores(tokens, merges)
        keys["tokenizer.ggml.add_space_prefix"] = _adds_prefix(description)
    else:
        keys["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in merges]
    unknown = description["model"].get("unk_token")
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "padding": tokenizer.pad_id,
        "unknown": vocab.get(unknown) if unknown else None,
    }
    keys |= {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.bos_id is not None and tokenizer._post is not None
    keys["tokenizer.ggml.add_eos_token"] = False
    again = json.loads(_from_keys(keys)._backend.to_str())
    if {tuple(m) for m in again["model"]["merges"]} != set(merges):
        raise UserError("the merges of this tokenizer cannot be said in a GGUF file: nothing was written")
    return keys


def _tokens(description: Mapping[str, Any], vocab: Mapping[str, int], rows: int, spm: bool) -> tuple[list, list[int]]:
    """Token and type of every row of the embedding."""
    tokens = [f"[PAD{id}]" for id in range(rows)]
    types = [UNUSED] * rows
    unknown = description["model"].get("unk_token")
    for token, id in vocab.items():
        byte = spm and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[id], types[id] = token, BYTE if byte else UNKNOWN if token == unknown else NORMAL
    for token in description["added_tokens"]:
        id = token["id"]
        if types[id] != UNKNOWN:
            types[id] = CONTROL if token["special"] else USER_DEFINED
        tokens[id] = token["content"]
    return tokens, types


def _split_name(description: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pattern that splits text."""
    if description.get("normalizer"):
        raise UserError("a byte-level tokenizer that changes its text first cannot be said in a GGUF file")
    step = description.get("pre_tokenizer") or {}
    steps: Sequence[Mapping[str, Any]] = step.get("pretokenizers") or [step]
    patterns = []
    for step in steps:
        if step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
            patterns.append(SPLITS["gpt-2"][0])
        elif step.get("type") != "ByteLevel":
            patterns.append(None)
        if step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            raise UserError("a byte-level tokenizer that puts a space before the text cannot be said in a GGUF file")
    for name, known in SPLITS.items():
        if list(known) == patterns:
            return name
    raise UserError(f"the way this tokenizer splits text has no name in llama.cpp: only {', '.join(SPLITS)} have")


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """Scores that put the tokens in the order of their merges: 0 for what no merge gives, then -1, -2, ..."""
    rank: dict[str, int] = {}
    last = ""
    for merge in merges:
        token = "".join(merge)
        if token != last and token in rank:
            raise UserError("the merges of this tokenizer are in no order of tokens: GGUF scores cannot say them")
        rank.setdefault(token, len(rank) + 1)
        last = token
    return [-float(rank.get(token, 0)) for token in tokens]


def _adds_prefix(description: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text; any other change of the text is refused."""
    step = description.get("normalizer") or {}
    for one in step.get("normalizers") or ([step] if step else []):
        known = one["type"] == "Prepend" or (one["type"] == "Replace" and one["pattern"] == {"String": " "})
        if not known:
            raise UserError(f"a tokenizer that applies {one['type']} to its text first cannot be said in a GGUF file")
    before = description.get("pre_tokenizer") or {}
    prepends = any(one["type"] == "Prepend" for one in step.get("normalizers") or ([step] if step else []))
    return prepends or (before.get("type") == "Metaspace" and before.get("prepend_scheme", "always") != "never")
