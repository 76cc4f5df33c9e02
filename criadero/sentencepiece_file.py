"""SentencePiece's ``tokenizer.model``: the few fields that matter, read from the protobuf wire format.

Field numbers: sentencepiece_model.proto (https://github.com/google/sentencepiece). Only the reader is here; what the
fields mean for encoding is in `criadero.tokenizer`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from criadero.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_BPE = 2


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; ``type`` is one of the numbers above."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceFile:
    """What the file says. Ids are -1 where there is no such token; ``characters`` is the compiled character map."""

    pieces: tuple[Piece, ...]
    bos_id: int
    eos_id: int
    pad_id: int
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    characters: bytes


class _Damaged(ValueError):
    pass


def read_sentencepiece(data: bytes) -> SentencePieceFile:
    """Parse a whole file; anything that is not a SentencePiece BPE model is a UserError."""
    pieces, trainer, normalizer = [], b"", b""
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(_bytes(value)))
            elif number == 2:
                trainer = _bytes(value)
            elif number == 3:
                normalizer = _bytes(value)
        train, norm = dict(_fields(trainer)), dict(_fields(normalizer))
        numbers = {
            key: _signed(train.get(key, default)) for key, default in ((3, 1), (24, 0), (41, 1), (42, 2), (43, -1))
        }
        flags = {key: bool(_signed(norm.get(key, 1))) for key in (3, 4, 5)}
        characters = _bytes(norm.get(2, b""))
    except (_Damaged, UnicodeDecodeError, struct.error):
        raise UserError("it is no SentencePiece or tiktoken file, or it is cut off; get the file again") from None
    if not pieces or not trainer:
        raise UserError("it is no SentencePiece or tiktoken file, or it is cut off; get the file again")
    if numbers[3] != _BPE:
        raise UserError("it is a SentencePiece model that is not BPE; Llama's is")
    if numbers[24] or not flags[5]:
        raise UserError("it marks spaces at the end of words or not at all; Llama's marks them at the start")
    return SentencePieceFile(
        tuple(pieces),
        bos_id=numbers[41],
        eos_id=numbers[42],
        pad_id=numbers[43],
        add_dummy_prefix=flags[3],
        remove_extra_whitespaces=flags[4],
        characters=characters,
    )


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    type = _signed(fields.get(3, NORMAL))
    if 1 not in fields or not NORMAL <= type <= BYTE:
        raise _Damaged
    score = fields.get(2, b"\0\0\0\0")
    return Piece(_bytes(fields[1]).decode(), struct.unpack("<f", _bytes(score))[0], type)


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise _Damaged
    return value


def _signed(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise _Damaged
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise _Damaged
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value & (1 << 64) - 1, at
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one message: an int for varints, else the raw bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise _Damaged
        if number == 0 or size > len(data) - at:
            raise _Damaged
        yield number, data[at : at + size]
        at += size
