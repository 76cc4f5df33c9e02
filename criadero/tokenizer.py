"""Text to token ids and back: one run-time backend, the ``tokenizers`` library, whatever the file was.

Read: ``tokenizer.json`` (byte-level or SentencePiece-like BPE), SentencePiece's ``tokenizer.model`` (Llama 1 and 2) and
tiktoken's ``tokenizer.model`` (Llama 3). The two ``.model`` formats are converted on reading, to the same ids as the
``sentencepiece`` and ``tiktoken`` packages give. Trained: byte-level BPE.

Three rules that hold for every vocabulary:

* Text that spells a special token is text. ``encode`` never gives a control token; only ``bos=``, ``eos=`` and a chat
  template (`criadero.chat`) do. An added token that is not marked special, but is named in tokenizer_config.json or looks
  like ``<|...|>``, counts as special here.
* Bytes decide. `Tokenizer.decode` is the bytes of the tokens read as UTF-8, where invalid bytes become U+FFFD. Lone
  surrogates, which no UTF-8 can hold, are encoded as U+FFFD (as tiktoken does).
* SentencePiece vocabularies put a space before the text (``add_dummy_prefix``); decoding takes one away again, except
  with ``continues=True``, for ids that go on from earlier text.

What `Tokenizer.save` writes opens in transformers 4.51 and 5.x: there ``add_special_tokens=False`` gives the ids of
`Tokenizer.encode`, and ``True`` adds BOS once in front (a tokenizer.json that was read keeps its own habit).
"""

from __future__ import annotations

import base64
import binascii
import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from criadero.errors import UserError
from criadero.sentencepiece_file import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceFile,
    read_sentencepiece,
)

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>")
PAD_NAMES = ("<|pad|>", "<pad>", "<|finetune_right_pad_id|>")
# tokens that end an answer, in the vocabularies of the Llama family
END_NAMES = ("<|end|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "</s>", "<|eos|>", "<|end_of_text|>")
_CONTROL_LOOK = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_MARK = "\u2581"  # how SentencePiece writes a space


def _llama3_pattern(digits: str) -> str:
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Names of llama.cpp (src/llama-vocab.cpp) -> the patterns that split text, one after the other.
SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_llama3_pattern(r"\p{N}{1,3}"),),
    "qwen2": (_llama3_pattern(r"\p{N}"),),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
        r"\p{N}",
    ),
}
_ALIASES = {
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
}
_WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is taken whole, whatever the merges say


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: printable ones stand for themselves, the others from U+0100 on."""
    letters = {b: chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = [b for b in range(256) if b not in letters]
    return letters | {b: chr(256 + n) for n, b in enumerate(others)}


_LETTER_OF = _byte_letters()
_BYTE_OF = {letter: byte for byte, letter in _LETTER_OF.items()}


def mend_surrogates(text: str) -> str:
    """``text`` with surrogate pairs joined and lone surrogates as U+FFFD, so that it can be UTF-8."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Tokenizer:
    """A vocabulary. ``kind`` is "bpe" (byte-level) or "spm" (SentencePiece-like); ``special`` maps text to id."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos: str | None = None,
        eos: str | None = None,
        pad: str | None = None,
    ) -> None:
        self._post = backend.post_processor  # only for `save`: it would add BOS and trim offsets
        backend.encode_special_tokens = True
        first = backend.encode("a", add_special_tokens=True).ids[:1]
        description = json.loads(backend.to_str())
        self.kind, self._prefix = _kind_of(description)
        backend.post_processor = None
        backend.no_padding()
        backend.no_truncation()
        named = {name for name in (bos, eos, pad) if name is not None}
        added = backend.get_added_tokens_decoder()
        for name in named:
            if backend.token_to_id(name) is None:
                raise UserError(
                    f"the special token {name!r} is not in the vocabulary: the tokenizer's files do not belong together"
                )
        known = {token.content for token in added.values() if token.special}
        late = [
            AddedToken(token.content, special=True, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)
            for token in added.values()
            if token.content not in known and (token.content in named or _CONTROL_LOOK.fullmatch(token.content))
        ] + [AddedToken(name, special=True, normalized=False) for name in named - {t.content for t in added.values()}]
        if late:
            backend.add_special_tokens(late)
        self._backend = backend
        self._added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        self.special = {
            token.content: id for id, token in sorted(backend.get_added_tokens_decoder().items()) if token.special
        }
        self._vocab = {id: token for token, id in backend.get_vocab(with_added_tokens=True).items()}
        self._special_ids = frozenset(self.special.values())
        self.vocab_size = max(self._vocab, default=-1) + 1
        self.bos_id, self.eos_id, self.pad_id = (self.special[t] if t is not None else None for t in (bos, eos, pad))
        self.adds_bos = self.bos_id is not None and first == [self.bos_id]  # whether plain text gets BOS in front
        ends = (self.special[name] for name in END_NAMES if name in self.special)
        self.end_ids = tuple(sorted({*ends, *(() if self.eos_id is None else (self.eos_id,))}))
        named_tokens = (("bos", bos), ("eos", eos), ("pad", pad))
        self.names = {key: name for key, name in named_tokens if name is not None}
        self._bytes: dict[int, bytes] = {}
        longest_first = sorted(self.special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._inner = _without_first_prefix(backend, description)

    # --- text to ids ---

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``text``; what spells a special token in it is plain text."""
        ids = self._backend.encode(mend_surrogates(text), add_special_tokens=False).ids
        if bos:
            ids.insert(0, self._need("bos", self.bos_id))
        if eos:
            ids.append(self._need("eos", self.eos_id))
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the characters ``text[start:end]`` it comes from (of `mend_surrogates` of the text).

        Tokens that share one character (its bytes) all have its offsets; an added prefix has those of what follows.
        """
        encoding = self._backend.encode(mend_surrogates(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_template(self, text: str, plain: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets of a rendered chat: special tokens are recognised, but not in the ``plain`` spans.

        ``plain`` are the (start, end) of the contents, in order. What stands between two special tokens is encoded as one
        string, as Hugging Face does, so the ids are Hugging Face's where no content spells a special token. ``text`` must
        hold no surrogates.
        """
        tokens: list[tuple[int, int, str]] = []
        at = 0
        for start, end in [*plain, (len(text), len(text))]:
            tokens += [(m.start(), m.end(), m.group()) for m in self._special_pattern.finditer(text, at, start)]
            at = max(at, end)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def run(start: int, end: int) -> None:
            if start < end:
                backend = self._backend if start == 0 or self._inner is None else self._inner
                encoding = backend.encode(text[start:end], add_special_tokens=False)
                ids.extend(encoding.ids)
                offsets.extend((start + a, start + b) for a, b in encoding.offsets)

        done = 0
        for start, end, name in tokens:
            before, after = start, end
            if self._added[name].lstrip:  # such a token swallows the white space beside it
                before = done + len(text[done:start].rstrip())
            if self._added[name].rstrip:
                after = len(text) - len(text[end:].lstrip())
            run(done, before)
            ids.append(self.special[name])
            offsets.append((start, end))
            done = after
        run(done, len(text))
        return ids, offsets

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, in parallel."""
        clean = [mend_surrogates(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch_fast(clean, add_special_tokens=False)]

    def _need(self, name: str, id: int | None) -> int:
        if id is None:
            raise UserError(f"this tokenizer has no {name} token; name one as {name}_token in tokenizer_config.json")
        return id

    # --- ids to text ---

    def token_bytes(self, id: int) -> bytes:
        """The bytes that token ``id`` stands for; for a special token, those of its name."""
        if id not in self._bytes:
            if id not in self._vocab:
                raise UserError(f"token id {id} is not in the vocabulary of {self.vocab_size} tokens")
            self._bytes[id] = self._read_token(self._vocab[id])
        return self._bytes[id]

    def _read_token(self, token: str) -> bytes:
        if token in self._added:
            return token.encode()
        if self.kind == "bpe":
            if all(letter in _BYTE_OF for letter in token):
                return bytes(_BYTE_OF[letter] for letter in token)
            return token.encode()
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(_MARK, " ").encode()

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> bytes:
        """The bytes of ``ids``; ``continues`` keeps the space that starts a SentencePiece text."""
        data = b"".join(self.token_bytes(id) for id in ids if not (skip_special and id in self._special_ids))
        return data[1:] if self._prefix and not continues and data.startswith(b" ") else data

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """The text of ``ids``, with U+FFFD for what is not UTF-8."""
        return self.decode_bytes(ids, skip_special=skip_special, continues=continues).decode("utf-8", "replace")

    def with_special(self, names: Sequence[str]) -> Tokenizer:
        """The same vocabulary with new special tokens after its last id, in order. UserError: one that is there already."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        for number, name in enumerate(names):
            if not name or name != name.strip() or name in names[:number]:
                raise UserError(f"new special token {name!r}: give each once, without white space around it")
            if backend.token_to_id(name) is not None:
                raise UserError(
                    f"new special token {name!r}: it is in the vocabulary already, as {backend.token_to_id(name)}"
                )
        backend.post_processor = self._post
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        made = Tokenizer(backend, **self.names)
        if [made.special[name] for name in names] != list(range(self.vocab_size, self.vocab_size + len(names))):
            raise UserError(
                "new special tokens: the ids of this vocabulary have holes, so there is no place after its end"
            )
        return made

    # --- files ---

    def save(self, folder: str | Path, *, chat_template: str | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and, if given, chat_template.jinja.

        ``PreTrainedTokenizerFast`` and the template inside tokenizer_config.json too: transformers 4.51 needs both.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = json.loads(self._backend.to_str())
        if self._post is not None:
            holder = tokenizers.Tokenizer(models.BPE())
            holder.post_processor = self._post
            description["post_processor"] = json.loads(holder.to_str())["post_processor"]
        names = {f"{key}_token": name for key, name in self.names.items()}
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= names
        if chat_template is not None:
            config["chat_template"] = chat_template
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8", newline="\n")
        for name, content in (
            ("tokenizer.json", description),
            ("tokenizer_config.json", config),
            ("special_tokens_map.json", names),
        ):
            text = json.dumps(content, ensure_ascii=False, indent=1 if name == "tokenizer.json" else 2) + "\n"
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _without_first_prefix(backend: tokenizers.Tokenizer, description: dict) -> tokenizers.Tokenizer | None:
    """For ``Metaspace`` with ``prepend_scheme: first``, the same vocabulary without the space in front: for text that
    stands after a special token. None where all pieces of a text are treated alike."""
    step = description.get("pre_tokenizer") or {}
    if step.get("type") != "Metaspace" or step.get("prepend_scheme") != "first":
        return None
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=step.get("replacement", _MARK), prepend_scheme="never", split=step.get("split", True)
    )
    copy.encode_special_tokens = True
    return copy


class StreamDecoder:
    """Text of a stream of ids, never half a character; all it gives, joined, is ``decode`` of all it got."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_ids if skip_special else frozenset()
        self._strip = tokenizer._prefix and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that ``id`` completes, perhaps none."""
        if id in self._skip:
            return ""
        data = self._tokenizer.token_bytes(id)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _kind_of(description: Mapping[str, Any]) -> tuple[Literal["bpe", "spm"], bool]:
    """Kind of a tokenizer.json, and whether it puts a space in front of the text."""
    if description["model"]["type"] != "BPE":
        raise UserError(
            f"a tokenizer of type {description['model']['type']} is not a Llama tokenizer: only BPE can be read"
        )
    steps: dict[str, list[dict]] = {}
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        step = description.get(part) or {"type": "none"}
        inner = step.get("normalizers") or step.get("pretokenizers") or step.get("decoders")
        steps[part] = inner if step["type"] == "Sequence" and inner else [step]
    everything = [step for part in steps.values() for step in part]
    if any(step["type"] == "ByteLevel" for step in everything):
        return "bpe", False
    metaspace = [step for step in steps["pre_tokenizer"] if step["type"] == "Metaspace"]
    replaces = any(step["type"] == "Replace" and step.get("content") == _MARK for step in steps["normalizer"])
    if not metaspace and not replaces:
        raise UserError("this tokenizer.json is neither byte-level nor SentencePiece-like BPE: it cannot be read")
    prepends = any(step["type"] == "Prepend" for step in steps["normalizer"])
    return "spm", prepends or any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


# --- reading ---


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a folder (tokenizer.json, or else tokenizer.model) or one such file."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} has no tokenizer.json and no tokenizer.model; put the model's tokenizer there")
        path = found[0]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not data:
        raise UserError(f"{path} is empty; get the file again")
    try:
        if path.suffix == ".json" or data.lstrip()[:1] == b"{":
            return _read_json(path, data)
        if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
            return _read_tiktoken(data)
        return _from_sentencepiece(read_sentencepiece(data))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _read_json(path: Path, data: bytes) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as error:  # the library raises bare Exception
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"it is not a tokenizer.json ({reason}); get the file again") from None
    names: dict[str, str | None] = {}
    described = False
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (path.parent / file).is_file():
            continue
        described = True
        try:
            config = json.loads((path.parent / file).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} beside it cannot be read: {error}") from None
        if not isinstance(config, dict):
            raise UserError(f"{file} beside it does not hold a JSON object")
        for key in ("bos_token", "eos_token", "pad_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
    if not described:
        there = {token.content for token in backend.get_added_tokens_decoder().values()}
        for key, known in (("bos_token", BOS_NAMES), ("eos_token", EOS_NAMES), ("pad_token", PAD_NAMES)):
            names[key] = next((name for name in known if name in there), None)
    return Tokenizer(backend, bos=names.get("bos_token"), eos=names.get("eos_token"), pad=names.get("pad_token"))


def _read_tiktoken(data: bytes) -> Tokenizer:
    """Llama 3's file: one ``base64(token) rank`` a line; the 256 special tokens are not in it but follow it."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"line {number} is not 'base64 rank'; get the file again") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError("its ranks are not 0, 1, 2, ... without gaps: the file is cut off; get it again")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"it has no token for byte {missing[0]}: the file is damaged; get it again")
    if len(ranks) != 128000:
        raise UserError(
            f"it has {len(ranks)} tokens where Llama 3 has 128000; other tiktoken files are read as tokenizer.json"
        )
    order = sorted(ranks, key=ranks.__getitem__)
    letters = {token: "".join(_LETTER_OF[byte] for byte in token) for token in order}
    merges = [(letters[left], letters[right]) for left, right in _merges_in_order(order)]
    vocab = {letters[token]: rank for token, rank in ranks.items()}
    backend = _byte_level(vocab, merges, "llama-bpe")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in llama3_special()])
    return _with_bos(backend, "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")


def llama3_special() -> list[str]:
    """The 256 special tokens of Llama 3.1 to 3.3, whose ids start at 128000."""
    names = {
        0: "begin_of_text",
        1: "end_of_text",
        4: "finetune_right_pad_id",
        6: "start_header_id",
        7: "end_header_id",
        8: "eom_id",
        9: "eot_id",
        10: "python_tag",
    }
    reserved = iter(range(256))
    return [f"<|{names[n]}|>" if n in names else f"<|reserved_special_token_{next(reserved)}|>" for n in range(256)]


def _from_sentencepiece(file: SentencePieceFile) -> Tokenizer:
    tokens, types = [p.text for p in file.pieces], [p.type for p in file.pieces]

    def token_id(id: int, what: str) -> int | None:
        if id < 0:
            return None
        if id >= len(tokens) or types[id] not in (CONTROL, UNKNOWN, USER_DEFINED):
            raise UserError(f"its {what} id {id} is not a control piece: the file is damaged; get it again")
        return id

    return tokenizer_from_vocab(
        "spm",
        tokens,
        scores=[p.score for p in file.pieces],
        types=types,
        bos_id=token_id(file.bos_id, "bos"),
        eos_id=token_id(file.eos_id, "eos"),
        pad_id=token_id(file.pad_id, "pad"),
        add_prefix=file.add_dummy_prefix,
        squeeze_spaces=file.remove_extra_whitespaces,
        characters=file.characters,
    )


def _merges_in_order(order: Sequence[Any]) -> list[tuple[Any, Any]]:
    """All pairs of tokens (str or bytes) that join to a token, the token first in ``order`` first.

    SentencePiece and tiktoken rank a pair by what it joins to, and take the leftmost of equals; ``tokenizers`` ranks
    the pairs themselves. The two differ only where x+y and y+z give the same token, side by side; so a pair (x, y)
    whose y also starts the token comes before the others of that token.
    """
    known = set(order)
    merges = []
    for token in order:
        splits = [i for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
        splits.sort(key=lambda i: not token.startswith(token[i:]))
        merges += [(token[:i], token[i:]) for i in splits]
    return merges


def _byte_level(vocab: dict[str, int], merges: list[tuple[str, str]], split: str) -> tokenizers.Tokenizer:
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=split in _WHOLE_WORDS)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _splitter(SPLITS[split])
    backend.decoder = decoders.ByteLevel()
    return backend


def _splitter(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _with_bos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None, pad: str | None) -> Tokenizer:
    """The tokenizer, whose saved files make Hugging Face add BOS once."""
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0",
            pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
            special_tokens=[(bos, backend.token_to_id(bos))],
        )
    return Tokenizer(backend, bos=bos, eos=eos, pad=pad)


def tokenizer_from_vocab(
    kind: Literal["spm", "bpe"],
    tokens: Sequence[str | bytes],
    *,
    scores: Sequence[float] | None = None,
    types: Sequence[int] | None = None,
    merges: Sequence[str] | None = None,
    pre: str = "llama-bpe",
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    add_bos: bool = True,
    add_prefix: bool = True,
    squeeze_spaces: bool = False,
    characters: bytes = b"",
) -> Tokenizer:
    """A tokenizer from what a GGUF or SentencePiece file lists; the id of a token is its place in ``tokens``.

    ``types`` are SentencePiece's and GGUF's: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. "spm"
    needs ``scores`` (merges follow from them); "bpe" needs ``merges`` ("left right" in GPT-2's letters) and ``pre``,
    llama.cpp's name of the pattern that splits text (`SPLITS`). ``characters`` is SentencePiece's character map.
    """
    try:
        texts = [token.decode() if isinstance(token, bytes) else token for token in tokens]
    except UnicodeDecodeError:
        raise UserError("a token of the vocabulary is not UTF-8: the file is damaged") from None
    kinds = list(types) if types is not None else [NORMAL] * len(texts)
    ids = {text: id for id, text in enumerate(texts)}
    if len(ids) != len(texts):
        twice = next(text for id, text in enumerate(texts) if ids[text] != id)
        raise UserError(f"the vocabulary has the token {twice!r} twice")
    for name, numbers in (("types", kinds), ("scores", scores)):
        if numbers is not None and len(numbers) != len(texts):
            raise UserError(f"the vocabulary has {len(texts)} tokens but {len(numbers)} {name}: the file is damaged")
    names: list[str | None] = []
    for what, id in (("bos", bos_id), ("eos", eos_id), ("pad", pad_id)):
        if id is not None and not 0 <= id < len(texts):
            raise UserError(f"the {what} token id {id} is outside the vocabulary of {len(texts)} tokens")
        names.append(None if id is None else texts[id])
    special = {id for id, type in enumerate(kinds) if type in (CONTROL, UNKNOWN)} | {bos_id, eos_id, pad_id} - {None}
    special |= {id for id, type in enumerate(kinds) if type == USER_DEFINED and _CONTROL_LOOK.fullmatch(texts[id])}
    if kind == "spm":
        if scores is None:
            raise UserError("a SentencePiece vocabulary needs scores: the file is damaged")
        backend = _sentencepiece_backend(texts, scores, kinds, add_prefix, squeeze_spaces, characters)
    else:
        backend = _gguf_backend(ids, merges or (), _ALIASES.get(pre, pre), special)
    added = [id for id, type in enumerate(kinds) if id in special or type == USER_DEFINED]
    for id in added:  # one at a time and in order: ids past the model's are given as they come
        backend.add_tokens([AddedToken(texts[id], special=id in special, normalized=False)])
        if backend.token_to_id(texts[id]) != id:
            raise UserError(f"the token {texts[id]!r} cannot keep its id {id}: the vocabulary is damaged")
    return _with_bos(backend, *names) if add_bos else Tokenizer(backend, bos=names[0], eos=names[1], pad=names[2])


def _sentencepiece_backend(
    texts: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    add_prefix: bool,
    squeeze_spaces: bool,
    characters: bytes,
) -> tokenizers.Tokenizer:
    """SentencePiece BPE: the whole text is one word, merged by score; unknown characters fall back to bytes."""
    # only what can come out of merging: a typed <s> or <0x41> is text
    normal = [id for id, type in enumerate(types) if type == NORMAL]
    order = sorted(normal, key=lambda id: -scores[id])
    merges = _merges_in_order([texts[id] for id in order])
    unknown = next((texts[id] for id, type in enumerate(types) if type == UNKNOWN), None)
    has_bytes = sum(type == BYTE for type in types) == 256
    vocab = {text: id for id, text in enumerate(texts)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    steps: list[Any] = [normalizers.Precompiled(characters)] if characters else []
    if squeeze_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    steps += [normalizers.Prepend(_MARK)] if add_prefix else []
    steps += [normalizers.Replace(" ", _MARK)]
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if add_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _gguf_backend(
    ids: Mapping[str, int], merges: Sequence[str], split: str, special: set[int | None]
) -> tokenizers.Tokenizer:
    if split not in SPLITS:
        raise UserError(f"the vocabulary splits text as {split!r}, which is not known here: {', '.join(SPLITS)} are")
    if not merges:
        raise UserError("a byte-level vocabulary needs merges: the file is damaged")
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not space or not {left, right, left + right} <= ids.keys():
            raise UserError(f"the merge {merge!r} does not give a token: the vocabulary is damaged")
        pairs.append((left, right))
    last = max((id for id in ids.values() if id not in special), default=-1)
    # special tokens at the end stay out of the model, so that no text can become one
    return _byte_level({text: id for text, id in ids.items() if id <= last}, pairs, split)


# --- training ---


def train_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL, *, split: str = "llama-bpe"
) -> Tokenizer:
    """Learn a byte-level BPE vocabulary of exactly ``vocab_size`` tokens, special ones (the last ids) included.

    Words are split by Llama 3's pattern, digits in groups of one to three, and a word that is a token is taken whole:
    llama.cpp knows this as "llama-bpe", so that a GGUF file of the model tokenizes alike there. No normaliser: every
    byte sequence comes back. The same texts in the same order give the same vocabulary.
    """
    smallest = 256 + len(special)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}; it must be at least {smallest}: 256 bytes and {len(special)} special tokens"
        )
    if len(set(special)) != len(special):
        raise UserError(f"a special token is named twice: {', '.join(special)}")
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=split in _WHOLE_WORDS))
    backend.pre_tokenizer = _splitter(SPLITS[split])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special),
        initial_alphabet=sorted(_BYTE_OF),
        show_progress=False,
    )
    backend.train_from_iterator((mend_surrogates(text) for text in texts), trainer)
    learned = backend.get_vocab_size()
    if learned + len(special) < vocab_size:
        raise UserError(
            f"the texts give only {learned + len(special)} tokens, not {vocab_size}; give more text or a smaller vocab_size"
        )
    for name in special:
        if backend.token_to_id(name) is not None:
            raise UserError(f"the special token {name!r} is also a word of the texts; choose a name like <|{name}|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    bos, eos, pad = (next((n for n in known if n in special), None) for known in (BOS_NAMES, EOS_NAMES, PAD_NAMES))
    return _with_bos(backend, bos, eos, pad)
