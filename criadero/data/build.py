"""Stage ``data``: sources -> cleaned documents, a held-out split and one row of counts per source.

The steps, each a plain function that counts and can keep what it removed:
read -> rows chosen -> normalise -> language -> quality -> readability -> exact -> paragraphs -> near -> removals -> split.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from criadero.artifact import Artifact, create, open_artifact
from criadero.data import dedup, filters
from criadero.data.chats import read_chats
from criadero.data.docset import DocumentTable, document_hash, read_removals
from criadero.data.documents import Document, file_format, read_documents
from criadero.errors import UserError
from criadero.recipe import nearest

ROOT = "../shared/data"
UNREAD = ("not_chosen", "many_turns", "over_max_documents", "bad_row")  # reasons that stand before the filters


def _help(text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Source:
    """One source of documents: where it lies, under which licence, which rows of it are taken."""

    name: str = _help("its name in every table; a mix names it too")
    path: str = _help("file, folder or glob, under root (or as it stands, when nothing lies there)")
    licence: str = _help("SPDX or plain words; the licence of rows that do not carry their own")
    kind: Literal["text", "chat"] = _help("documents or chats", "text")
    licence_field: str = _help("the row's field that holds its own licence", "")
    lang: str = _help("language of rows that do not say; empty: identified", "")
    url: str = _help("where it comes from, with the commit", "")
    attribution: str = _help("who is to be named", "")
    text_field: str = _help("the row's field that holds the text", "text")
    where: tuple[str, ...] = _help(
        "rows to take: 'FIELD = VALUE', 'FIELD != VALUE', 'FIELD ~ REGEX', 'FIELD !~ REGEX'", ()
    )
    max_documents: int = _help("take at most so many (0: all), in an order by hash", 0)
    max_bytes: int = _help("take at most so many bytes of cleaned text (0: all)", 0)
    max_turns: int = _help("leave out chats of more turns (0: any)", 0)
    min_words: int | None = _help("instead of the recipe's min_words", None)
    max_lix: float = _help("leave out documents harder than this LIX (0: any)", 0.0)
    skip_bad: bool = _help("count malformed rows instead of stopping", False)
    held_out: float | None = _help("instead of the recipe's held_out", None)
    trusted: bool = _help("written for this purpose: normalised, but neither filtered nor deduplicated", False)
    join: float = _help("chats: add so many times their number of longer ones, each two or three of them in a row", 0.0)


@dataclass(frozen=True)
class DataRecipe:
    """What to build a dataset from, and how strictly."""

    source: tuple[Source, ...] = _help("the sources, best first: of duplicates the first is kept")
    root: str = _help("folder of the sources; the environment's CRIADERO_DATA goes before it", ROOT)
    languages: tuple[str, ...] = _help("languages to keep", ("en", "es"))
    language_filter: bool = _help("identify the language and remove others", True)
    quality_filter: bool = _help("remove documents that break the quality rules", True)
    plain_quotes: bool = _help("turn curly quotes into straight ones", False)
    min_words: int = _help("shortest document, in words", 20)
    max_code: float = _help("largest share of { } < > = _ | among the characters", 0.01)
    max_duplicate_lines: float = _help("largest share of repeated lines", 0.3)
    max_archaic: float = _help("largest share of archaic words in a text (0: any)", 0.0)
    blocked: tuple[str, ...] = _help("regular expressions of words; a document with one is removed", ())
    exact_dedup: bool = _help("remove exact duplicates", True)
    paragraph_words: int = _help("take out repeated paragraphs of so many words and more (0: leave them)", 12)
    near_dedup: float = _help("remove documents this alike by word 5-grams (0: off)", 0.7)
    held_out: float = _help("fraction of documents held out, by hash of the text", 0.01)
    held_out_bytes: int = _help("at most so many bytes held out per language and kind", 300_000)
    keep_removed: bool = _help("write what the filters removed, and why, to removed.jsonl.zst", False)
    seed: int = _help("of the split and of capped sources", 0)
    removals: str = _help("a ledger (removals.jsonl): the documents it lists by hash are left out", "")


def build_data(recipe: DataRecipe, out: str | Path, *, overwrite: bool = False, resume: bool = True) -> Artifact:
    """Build a ``dataset`` artifact. It takes minutes and has nothing to resume: cut off, it starts again.

    Every source is looked for before work starts. UserError: a missing source, a malformed row, a source of which nothing is left.
    """
    files = find_sources(recipe)
    ledger = read_removals(recipe.removals) if recipe.removals else {}
    tally = filters.Tally()
    with create(
        out,
        kind="dataset",
        recipe=recipe,
        seeds={"data": recipe.seed},
        overwrite=overwrite,
        licence=None,
    ) as draft:
        for source in recipe.source:
            for file in files[source.name]:
                draft.add_input(
                    "contains", file, name=f"{source.name}/{file.name}", licence=source.licence, locator=str(file)
                )
        if recipe.removals:
            draft.add_input("filtered_by", recipe.removals)
        with ExitStack() as stack:
            if recipe.keep_removed:
                removed = stack.enter_context(JsonlWriter(draft.path / "removed.jsonl.zst"))

                def keep(document: Document, why: str) -> None:
                    if why not in (*UNREAD, "removal_request") and document_hash(document.text) not in ledger:
                        removed.write({**as_row(document), "reason": why})

                tally.keep = keep
            train = stack.enter_context(JsonlWriter(draft.path / "train-00000.jsonl.zst"))
            held = stack.enter_context(JsonlWriter(draft.path / "held_out-00000.jsonl.zst"))
            table, rows_of = Table(recipe.source), DocumentTable(draft.path)
            documents = clean(recipe, files, tally, table, ledger)
            for split, document in join_chats(split_documents(documents, recipe), recipe, tally):
                shard = train if split == "train" else held
                rows_of.add(document, split=split, shard=shard.path.name, offset=shard.write(as_row(document)))
                table.count(split, document)
            draft.data.update(rows_of.close())
        rows = table.rows(tally)
        empty = [row["name"] for row in rows if not row["documents_out"]]
        if empty:
            reasons = next(row["removed"] for row in rows if row["name"] == empty[0])
            raise UserError(
                f"source {empty[0]}: no document is left (removed: {reasons or 'none read'}); loosen its filters or drop it"
            )
        if not any(row["held_out"]["documents"] for row in rows):
            (draft.path / "held_out-00000.jsonl.zst").unlink()  # too few to hold one out: there is no such split
        (draft.path / "sources.json").write_text(
            json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        if recipe.removals:
            (draft.path / "removals.jsonl").write_bytes(Path(recipe.removals).read_bytes())
            removed = sum(row["removed"].get("removal_request", 0) for row in rows)
            draft.data["removals"] = {"ledger": "removals.jsonl", "listed": len(ledger), "removed": removed}
        draft.data["by_source"] = rows
        draft.data["by_language"] = table.by_language()
        draft.metrics += [
            {"name": f"{split} {what}", "value": sum(row[split][what] for row in rows)}
            for split in ("train", "held_out")
            for what in ("documents", "bytes")
        ]
    return open_artifact(out)


def find_sources(recipe: DataRecipe) -> dict[str, list[Path]]:
    """The files of every source by its name. UserError naming what is not there, and checking the recipe's own sense."""
    import os

    root = Path(os.environ.get("CRIADERO_DATA") or recipe.root)
    names = [s.name for s in recipe.source]
    if not names:
        raise UserError("no source: give at least one [[source]] table")
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"source {twice[0]!r} is given twice; give each its own name")
    for pattern in recipe.blocked:
        compile_pattern(pattern, "blocked")
    found = {}
    for source in recipe.source:
        for condition in source.where:
            parse_condition(condition, source.name)
        paths = sorted(glob.glob(str(root / source.path), recursive=True)) or sorted(
            glob.glob(source.path, recursive=True)
        )
        if not paths:
            raise UserError(
                f"source {source.name}: nothing at {root / source.path}; get it there"
                + (f" (from {source.url})" if source.url else "")
                + ", or set CRIADERO_DATA to the data's folder"
            )
        for path in paths:
            if Path(path).is_file():
                file_format(Path(path))
        found[source.name] = [Path(p) for p in paths]
    return found


# -- the steps ---------------------------------------------------------------------------------------------------------


def clean(
    recipe: DataRecipe,
    files: Mapping[str, list[Path]],
    tally: filters.Tally,
    table: Table,
    ledger: Container[bytes] = (),
) -> Iterator[Document]:
    """All documents that pass every step, source by source; those whose hash is in the ledger of removals leave last.

    Last, because then their near copies have gone with them. A hash counts that a document had when it came or has when it goes.
    """
    listed: set[tuple[str, str]] = set()

    def one_source(source: Source) -> Iterator[Document]:
        documents = table.seen(source, read_source(source, files[source.name], tally, recipe.seed))
        documents = filters.normalise(documents, tally, plain_quotes=recipe.plain_quotes)
        if ledger:
            documents = note_listed(documents, ledger, listed)
        if source.trusted:
            return documents
        if recipe.language_filter:
            documents = filters.language(documents, tally, languages=recipe.languages)
        if recipe.quality_filter:
            chat = source.kind == "chat"
            words = recipe.min_words if source.min_words is None else source.min_words
            thresholds = filters.Quality(
                min_words=words, max_code=recipe.max_code, max_duplicate_lines=recipe.max_duplicate_lines
            )
            if chat:
                # A chat's turns are short and repeat each other on purpose: only the rules on characters hold.
                thresholds = dataclasses.replace(
                    thresholds, min_word_length=2.0, min_stop_words=0, max_duplicate_lines=1.0, max_bullet_lines=1.0,
                    max_ellipsis_lines=1.0, max_symbol_ratio=0.5, min_alphabetic=0.6, max_top_ngram=1.0, max_duplicate_ngram=1.0,
                    max_duplicate_line_characters=1.0,
                )  # fmt: skip
            documents = filters.quality(documents, tally, thresholds=thresholds)
            if chat:
                documents = filters.pasted(documents, tally)
        if recipe.max_archaic and source.kind == "text":
            documents = filters.archaic(documents, tally, max_share=recipe.max_archaic)
        if recipe.blocked:
            documents = filters.blocked(documents, tally, words=recipe.blocked)
        if source.max_lix:
            documents = filters.readability(documents, tally, max_lix=source.max_lix)
        return documents

    trusted = [s for s in recipe.source if s.trusted]
    documents: Iterable[Document] = itertools.chain.from_iterable(
        map(one_source, [s for s in recipe.source if not s.trusted])
    )
    if recipe.exact_dedup:
        documents = dedup.exact(documents, tally)
    if recipe.paragraph_words:
        documents = dedup.paragraphs(documents, tally, min_words=recipe.paragraph_words)
    if recipe.near_dedup:
        documents = dedup.near(documents, tally, threshold=recipe.near_dedup)
    documents = itertools.chain(documents, itertools.chain.from_iterable(map(one_source, trusted)))
    if ledger:
        documents = drop_listed(documents, tally, ledger, listed)
    return cap_bytes(documents, tally, {s.name: s.max_bytes for s in recipe.source if s.max_bytes})


def note_listed(
    documents: Iterable[Document], ledger: Container[bytes], listed: set[tuple[str, str]]
) -> Iterator[Document]:
    """Pass everything on, and note (source, id) of the documents whose hash is in the ledger as they come in."""
    for document in documents:
        if document_hash(document.text) in ledger:
            listed.add((document.source, document.id))
        yield document


def drop_listed(
    documents: Iterable[Document], tally: filters.Tally, ledger: Container[bytes], listed: Container[tuple[str, str]]
) -> Iterator[Document]:
    """Remove what the ledger lists (``removal_request``), by the noted ids or by the hash of what a document is now."""
    for document in documents:
        if (document.source, document.id) in listed or document_hash(document.text) in ledger:
            tally.drop(document, "removal_request")
        else:
            yield document


def read_source(source: Source, files: Iterable[Path], tally: filters.Tally, seed: int) -> Iterator[Document]:
    """The chosen rows of a source. Rows left out by ``where`` are counted as removed (``not_chosen``), bad ones as ``bad_row``."""
    conditions = [parse_condition(text, source.name) for text in source.where]
    bad: list[str] = []

    def rows() -> Iterator[Document]:
        for file in files:
            if source.kind == "text":
                yield from read_documents(
                    file, source=source.name, licence=source.licence, lang=source.lang, text_field=source.text_field,
                    licence_field=source.licence_field, skip_bad=source.skip_bad, bad=bad,
                )  # fmt: skip
            else:
                yield from _chat_documents(source, file, bad)

    def chosen() -> Iterator[Document]:
        for document in rows():
            row = document.meta.get("row", {})
            if not all(test({**row, "id": document.id}) for test in conditions):
                tally.drop(document, "not_chosen")
            elif source.max_turns and len(document.meta.get("messages", ())) > source.max_turns:
                tally.drop(document, "many_turns")
            else:
                yield document

    documents: Iterable[Document] = chosen()
    if source.max_documents or source.max_bytes:
        # a cap takes a random part, the same one every time: not the first files
        ordered = sorted(documents, key=lambda d: hash_of(seed, "cap", d.source, d.id, d.text))
        for extra in ordered[source.max_documents :] if source.max_documents else []:
            tally.drop(extra, "over_max_documents")
        documents = ordered[: source.max_documents] if source.max_documents else ordered
    yield from documents
    for complaint in bad:
        tally.drop(Document(complaint, complaint, source.lang, source.name, source.licence), "bad_row")


def _chat_documents(source: Source, file: Path, bad: list[str]) -> Iterator[Document]:
    chats = read_chats(file, skip_bad=source.skip_bad, keep_rows=True)
    bad += chats.bad
    turns = {"messages", "conversations", "conversation"}
    for where, messages, row in zip(chats.places, chats.chats, chats.rows, strict=True):
        place = where.replace(str(file.parent) + "/", "", 1)
        yield Document(
            id=str(row.get("id") or place),
            text="\n".join(m["content"] for m in messages),
            lang=str(row.get("lang") or source.lang),
            source=source.name,
            licence=str(row.get(source.licence_field) or source.licence) if source.licence_field else source.licence,
            meta={"messages": messages, "row": {k: v for k, v in row.items() if k not in turns}},
        )


def parse_condition(text: str, source: str) -> Any:
    """``FIELD = VALUE`` (or ``!=``, ``~``, ``!~`` with a regular expression) as a test of a row; an absent field is ``""``."""
    match = re.fullmatch(r"\s*(\w+)\s*(=|!=|~|!~)\s*(.*?)\s*", text)
    if not match:
        raise UserError(
            f"source {source}: cannot read the condition {text!r}; write FIELD = VALUE, != VALUE, ~ REGEX or !~ REGEX"
        )
    name, sign, value = match.groups()
    if "~" in sign:
        pattern = compile_pattern(value, f"source {source}, where")
        return lambda row: bool(pattern.search(str(row.get(name) or ""))) == (sign == "~")
    return lambda row: (str(row.get(name) or "") == value) == (sign == "=")


def compile_pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"{where}: {text!r} is no regular expression ({error}); mend it") from error


def cap_bytes(documents: Iterable[Document], tally: filters.Tally, most: Mapping[str, int]) -> Iterator[Document]:
    """Remove a source's documents once ``most[source]`` bytes of it have passed (``over_max_bytes``)."""
    passed: Counter[str] = Counter()
    for document in documents:
        size = len(document.text.encode())
        if document.source in most and passed[document.source] + size > most[document.source]:
            tally.drop(document, "over_max_bytes")
            continue
        passed[document.source] += size
        yield document


def hash_of(seed: int, *parts: str) -> int:
    return int.from_bytes(
        hashlib.sha256("\0".join((str(seed), *parts)).encode("utf-8", "surrogatepass")).digest()[:8], "big"
    )


def split_documents(documents: Iterable[Document], recipe: DataRecipe) -> Iterator[tuple[str, Document]]:
    """Yield ``("train" | "held_out", document)``. A document is held out by the hash of its text, whatever else is in the data.

    The candidates (a ``held_out`` share) are kept in memory; of each language and kind those of the lowest hash are held out, up to
    ``held_out_bytes``, and the others go to training.
    """
    limits = {s.name: int((recipe.held_out if s.held_out is None else s.held_out) * 2**64) for s in recipe.source}
    candidates: dict[tuple[str, str], list[tuple[int, Document]]] = defaultdict(list)
    for document in documents:
        h = hash_of(recipe.seed, "split", document.text)
        if h < limits[document.source]:
            candidates[document.lang, document.kind].append((h, document))
        else:
            yield "train", document
    for group in sorted(candidates):
        total = 0
        for _, document in sorted(candidates[group], key=lambda pair: pair[0]):
            size = len(document.text.encode())
            if total + size <= recipe.held_out_bytes:
                total += size
                yield "held_out", document
            else:
                yield "train", document


def join_chats(
    documents: Iterable[tuple[str, Document]], recipe: DataRecipe, tally: filters.Tally
) -> Iterator[tuple[str, Document]]:
    """Pass everything on, then for each source with ``join`` add chats made of two or three of its training chats in a row.

    Whoever learned from single questions only loses the thread at the second. The parts share source, licence and language,
    none has a system turn, and held-out chats are in none; which ones meet is drawn by hash. Counted as ``joined``.
    """
    shares = {s.name: s.join for s in recipe.source if s.join and s.kind == "chat"}
    groups: dict[tuple[str, str, str], list[Document]] = defaultdict(list)
    for split, document in documents:
        yield split, document
        messages = document.meta.get("messages", ())
        whole = bool(messages) and messages[0]["role"] == "user" and messages[-1]["role"] == "assistant"
        if split == "train" and document.source in shares and whole:
            groups[document.source, document.licence, document.lang].append(document)
    for (source, licence, lang), parts in sorted(groups.items()):
        for number in range(round(shares[source] * len(parts))):
            draw = hash_of(recipe.seed, "join", source, licence, lang, str(number))
            drawn = [parts[(draw >> (20 * i + 1)) % len(parts)] for i in range(2 + draw % 2)]
            chosen = {part.id: part for part in drawn}
            if len(chosen) < 2:
                continue
            messages = [m for part in chosen.values() for m in part.meta["messages"]]
            text = "\n".join(m["content"] for m in messages)
            joined = Document("+".join(chosen), text, lang, source, licence, {"messages": messages})
            tally.change(joined, "joined")
            yield "train", joined


# -- counting and writing ----------------------------------------------------------------------------------------------


class Table:
    """Counts by source: documents in and out, bytes, languages; joined with the tally's reasons at the end."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self.sources = list(sources)
        self.documents_in: Counter[str] = Counter()
        self.bytes_in: Counter[str] = Counter()
        self.out: Counter[tuple[str, str, str]] = Counter()  # source, split, documents | bytes
        self.languages: Counter[tuple[str, str, str]] = Counter()  # source, lang, documents | bytes
        self.licences: dict[str, Counter[str]] = defaultdict(Counter)
        self.authors: dict[str, set[str]] = defaultdict(set)  # of rows that name theirs: CC BY asks to pass it on

    def seen(self, source: Source, documents: Iterable[Document]) -> Iterator[Document]:
        print(f"data: reading {source.name}", file=sys.stderr, flush=True)
        for document in documents:
            self.documents_in[source.name] += 1
            self.bytes_in[source.name] += len(document.text.encode("utf-8", "surrogatepass"))
            yield document

    def count(self, split: str, document: Document) -> None:
        size = len(document.text.encode())
        for what, n in (("documents", 1), ("bytes", size)):
            self.out[document.source, split, what] += n
            self.languages[document.source, document.lang, what] += n
        self.licences[document.source][document.licence] += 1
        if author := document.meta.get("row", {}).get("author"):
            self.authors[document.source].add(str(author))

    def rows(self, tally: filters.Tally) -> list[dict[str, Any]]:
        """One plain dict a source. ``documents_in`` counts every row read; ``removed`` and ``documents_out`` add up to it."""
        rows = []
        for s in self.sources:
            removed = tally.by_reason(s.name)
            licences = self.licences[s.name]
            splits = {
                split: {what: self.out[s.name, split, what] for what in ("documents", "bytes")}
                for split in ("train", "held_out")
            }
            languages = sorted({lang for name, lang, _ in self.languages if name == s.name})
            rows.append(
                {
                    "name": s.name, "kind": s.kind, "licence": " / ".join(sorted(licences)) or s.licence, "url": s.url,
                    "attribution": s.attribution,
                    "documents_in": self.documents_in[s.name] + sum(removed.get(r, 0) for r in UNREAD),
                    "documents_out": splits["train"]["documents"] + splits["held_out"]["documents"],
                    "bytes_chosen": self.bytes_in[s.name],
                    "bytes_out": splits["train"]["bytes"] + splits["held_out"]["bytes"],
                    **splits,
                    "languages": {
                        lang: {what: self.languages[s.name, lang, what] for what in ("documents", "bytes")} for lang in languages
                    },
                    **({"authors": sorted(self.authors[s.name])} if s.name in self.authors else {}),
                    "removed": removed, "changed": tally.changes(s.name),
                }
            )  # fmt: skip
        return rows

    def by_language(self) -> dict[str, dict[str, int]]:
        total: dict[str, Counter[str]] = defaultdict(Counter)
        for (_, lang, what), n in self.languages.items():
            total[lang][what] += n
        return {lang: dict(total[lang]) for lang in sorted(total)}


def as_row(document: Document) -> dict[str, Any]:
    """A dataset's row: id, text (or messages), lang, source, licence."""
    body = {"messages": document.meta["messages"]} if "messages" in document.meta else {"text": document.text}
    return {"id": document.id, **body, "lang": document.lang, "source": document.source, "licence": document.licence}


class JsonlWriter:
    """A ``.jsonl.zst`` file, written as it comes. The same rows give the same bytes."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self.path, self.at = path, 0
        self.file = zstandard.ZstdCompressor(level=9).stream_writer(path.open("wb"), closefd=True)

    def write(self, row: Mapping[str, Any]) -> int:
        """Returns the offset of the row in the unpacked file, in bytes."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self.file.write(line)
        self.at += len(line)
        return self.at - len(line)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def read_dataset(folder: str | Path, split: str) -> Iterator[Document]:
    """The documents of a ``dataset`` artifact's split (``train`` or ``held_out``), in order; a small one has no ``held_out``."""
    from criadero.data.documents import read_rows

    files = sorted(Path(folder).glob(f"{split}-*.jsonl.zst"))
    if not files and split == "held_out" and any(Path(folder).glob("train-*.jsonl.zst")):
        return
    if not files:
        others = sorted(p.name for p in Path(folder).glob("*"))[:5]
        raise UserError(f"{folder}: no {split}-*.jsonl.zst in it: not a dataset ({nearest(split, others, 'it holds')})")
    for file in files:
        for where, row in read_rows(file):
            try:
                meta: dict[str, Any] = {"messages": row["messages"]} if "messages" in row else {}
                text = row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])
                document = Document(row["id"], text, row["lang"], row["source"], row["licence"], meta)
            except (KeyError, TypeError) as error:
                raise UserError(f"{where}: not a row of a dataset ({error}); build it again") from error
            yield document
