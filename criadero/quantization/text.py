"""Text to calibrate on and to measure with: from a dataset, packed tokens, or a file of documents or chats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from criadero.artifact import Artifact, content_id, open_artifact, resolve
from criadero.chat import Example, Template, render
from criadero.data.build import read_dataset
from criadero.data.chats import read_chats, shapes_of
from criadero.data.documents import Document, read_documents, read_rows
from criadero.errors import UserError
from criadero.model import ModelConfig
from criadero.tokenizer import Tokenizer, load_tokenizer
from criadero.train.batches import Batch, TokenFile, group_name, pack_examples, rows_to_batch

LONGEST = 1024  # tokens in a row; longer ones cost time and teach the Hessians little more
LEAST, LEAST_HELD_OUT = 1024, 256  # tokens below which a figure or a Hessian means nothing
MICRO = 4096  # tokens that go through a layer at once
SAMPLE = 4096  # documents of a file or dataset that are looked at more closely
SHARE = 0.2  # of a text without a held-out split that is kept apart

Named = tuple[str, Example]  # the group it is reported under, and the tokens


@dataclass(frozen=True)
class Text:
    """``calibration`` rows, and ``held_out`` rows by group (``en text``, ``es chat``); ``source`` says where from."""

    calibration: list[Batch]
    held_out: dict[str, list[Batch]]
    source: str


def read_text(
    ref: str | Path, tokenizer: Tokenizer, template: Template | None, config: ModelConfig, *, tokens: int, held_out: int,
    seed: int,
) -> Text:  # fmt: skip
    """About ``tokens`` tokens to calibrate on and ``held_out`` others to measure with, drawn by ``seed``.

    A dataset's or tokens artifact's own held-out split is used; of a file, a fifth of the text is kept apart. UserError:
    text of another tokenizer, chats for a model without template, too little text.
    """
    path = resolve(ref)
    length = min(config.max_position_embeddings, LONGEST)
    rng = np.random.default_rng(seed)
    if (path / "tokens.json").is_file():
        _check_tokenizer(path, tokenizer)
        train, apart = (list(_windows(_packed(path, split, rng), length)) for split in ("train", "held_out"))
    elif path.is_dir() and any(path.glob("train-*.jsonl.zst")):
        documents = (_sample(read_dataset(path, split), rng) for split in ("train", "held_out"))
        train, apart = (
            _encode(one, tokenizer, template, length, 4 * want, ref)
            for one, want in zip(documents, (tokens + held_out, held_out), strict=True)
        )
    else:
        train = _encode(_sample(_documents(path), rng), tokenizer, template, length, 4 * (tokens + held_out), ref)
        apart = []
    if not apart:  # whole windows in the order of the documents, so that few documents are on both sides
        cut = len(train) - max(1, round(SHARE * len(train)))
        train, apart = train[:cut], train[cut:]
    calibration, held = _take(train, tokens, rng), _take(apart, held_out, rng)
    for name, got, least in (("calibrate on", calibration, LEAST), ("measure with", held, LEAST_HELD_OUT)):
        there = sum(len(example.ids) for _, example in got)
        if there < least:
            raise UserError(f"{ref}: only {there} tokens to {name}; at least {least} are needed: give more text")
    groups: dict[str, list[Example]] = {}
    for name, example in held:
        groups.setdefault(name, []).append(example)
    return Text(
        _batches([example for _, example in calibration], length),
        {name: _batches(examples, length) for name, examples in sorted(groups.items())},
        str(ref),
    )


def named_data(model: Artifact) -> str | None:
    """Where the data lies that a model, or the nearest model behind it, was trained on; None when it is not here as it was."""
    for passport in (model.passport, *model.ancestors()):
        for row in passport["inputs"]:
            locator = row.get("locator")
            if row.get("relation") != "trained_on" or not locator:
                continue
            try:
                if content_id(resolve(locator)) == row["id"]:
                    return str(locator)
            except (UserError, OSError):
                continue
    return None


def _documents(path: Path) -> Iterator[Document]:
    """The documents, or the chats as documents, of a file or folder."""
    first = next((row for _, row in read_rows(path, skip_bad=True)), None)
    if first is None:
        raise UserError(f"{path}: it is empty: there is no text in it to calibrate on")
    if shapes_of(first):
        found = read_chats(path)
        for place, chat in zip(found.places, found.chats, strict=True):
            yield Document(place, "", "", path.name, "", {"messages": chat})
    else:
        yield from read_documents(path, source=path.name, licence="")


def _sample(documents: Iterable[Document], rng: np.random.Generator) -> list[Document]:
    """At most SAMPLE documents, each equally likely, in random order."""
    kept: list[Document] = []
    for number, document in enumerate(documents):
        if number < SAMPLE:
            kept.append(document)
        elif (at := int(rng.integers(number + 1))) < SAMPLE:
            kept[at] = document
    return [kept[i] for i in rng.permutation(len(kept))]


def _encode(
    documents: list[Document],
    tokenizer: Tokenizer,
    template: Template | None,
    length: int,
    enough: int,
    ref: str | Path,
) -> list[Named]:
    """Windows of at most ``length`` tokens, until there are ``enough`` tokens. A chat's loss is on what the model says."""
    bos, eos = ([] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    found: list[Named] = []
    have = 0
    for document in documents:
        if have >= enough:
            break
        if document.kind == "chat":
            if template is None:
                raise UserError(f"{ref}: holds chats, but the model has no chat template: calibrate on documents")
            example = render(document.meta["messages"], tokenizer, template)
        else:
            ids = [*bos, *tokenizer.encode(document.text), *eos]
            example = Example(ids, [True] * len(ids))
        name = f"{document.lang or 'und'} {document.kind}"
        found += _windows([(name, example)], length)
        have += len(example.ids)
    return found


def _windows(examples: Iterable[Named], length: int) -> Iterator[Named]:
    for name, example in examples:
        for at in range(0, len(example.ids) - 1, length):
            ids, mask = example.ids[at : at + length], example.loss_mask[at : at + length]
            if len(ids) > 1 and any(mask[1:]):
                yield name, Example(ids, mask)


def _packed(folder: Path, split: str, rng: np.random.Generator) -> Iterator[Named]:
    """Documents of a tokens artifact in random order."""
    file = TokenFile.open(folder, split)
    for number in rng.permutation(len(file.docs))[:SAMPLE]:
        start, end, source = (int(n) for n in file.docs[number])
        ids = file.ids[start:end].tolist()
        yield group_name(file.sources[source]), Example(ids, [True] * len(ids))


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    other = load_tokenizer(folder)
    same = other.vocab_size == tokenizer.vocab_size and all(
        other.decode_bytes([id]) == tokenizer.decode_bytes([id]) for id in range(other.vocab_size)
    )
    if not same:
        raise UserError(f"{folder}: its tokens are not of the model's vocabulary: give the dataset or text itself")


def _take(windows: list[Named], tokens: int, rng: np.random.Generator) -> list[Named]:
    """Random windows, until there are ``tokens`` tokens."""
    taken: list[Named] = []
    have = 0
    for i in rng.permutation(len(windows)):
        if have >= tokens:
            break
        taken.append(windows[i])
        have += len(windows[i][1].ids)
    return taken


def _batches(examples: list[Example], length: int) -> list[Batch]:
    packed = pack_examples([len(example.ids) for example in examples], length)
    rows = [[examples[i] for i in row] for row in packed]
    at_once = max(1, MICRO // length)
    return [rows_to_batch(rows[i : i + at_once], length, 0, torch.float32) for i in range(0, len(rows), at_once)]


def tokens_in(batches: Iterable[Batch]) -> int:
    return sum(batch.tokens for batch in batches)


def flat(groups: Mapping[str, list[Batch]]) -> list[Batch]:
    return [batch for batches in groups.values() for batch in batches]


def bundled_data(ref: str | Path) -> str | None:
    """`named_data` of a reference; None for one without passport."""
    try:
        return named_data(open_artifact(ref))
    except UserError:
        return None
