"""Your documents as paragraphs, each with the place it comes from: Markdown, HTML, plain text and PDF."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from criadero.data.documents import TEXTS
from criadero.data.filters import SENTENCE_END
from criadero.errors import UserError
from criadero.synth.html_text import to_markdown

HTML = (".html", ".htm", ".xhtml")
PDF = ".pdf"
SUFFIXES = (*TEXTS, *HTML, PDF)
FORMATS = "Markdown (.md), HTML (.html), plain text (.txt) or PDF (.pdf)"
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*")
_FENCE = re.compile(r"\s*(?:```|~~~)")


@dataclass(frozen=True)
class Paragraph:
    """A piece of a document. ``text == source[start:end]``, where source is what :func:`read_text` gives for `file`.

    `headings` are those it stands under, outermost first; `page` is a PDF's, from 1, else 0.
    """

    id: str
    file: str
    start: int
    end: int
    text: str
    headings: tuple[str, ...] = ()
    page: int = 0


def find_documents(folder: str | Path) -> list[Path]:
    """The file itself, or the documents below a folder in order of name; hidden ones are left out. UserError when there is none."""
    path = Path(folder)
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"{path}: is no document that can be read: give {FORMATS}")
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder of documents")
    found = [
        file for file in sorted(path.rglob("*"))
        if file.is_file() and file.suffix.lower() in SUFFIXES and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]  # fmt: skip
    if not found:
        raise UserError(f"{path}: holds no document: put {FORMATS} in it")
    return found


def read_text(path: Path) -> str:
    """What offsets refer to: the text of the file; of HTML its Markdown; of a PDF its pages, each followed by a form feed."""
    suffix = path.suffix.lower()
    if suffix == PDF:
        return "".join(page + "\f" for page in _pdf_pages(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return to_markdown(text) if suffix in HTML else text


def _pdf_pages(path: Path) -> list[str]:
    try:
        import pypdf
    except ImportError:
        raise UserError(f"{path}: reading PDF needs pypdf: pip install 'criadero[documents]'") from None
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise UserError(f"{path}: is locked with a password: save it without one")
        pages = [(page.extract_text() or "").replace("\f", "\n") for page in reader.pages]
    except UserError:
        raise
    except Exception as error:  # pypdf raises all kinds on damaged files
        raise UserError(
            f"{path}: is not a PDF that can be read ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        ) from None
    if not any(page.strip() for page in pages):
        raise UserError(f"{path}: there is no text in it, only pictures: run a text recognition on it first")
    return pages


def paragraphs(path: Path, text: str, *, name: str, min_words: int, max_words: int) -> Iterator[Paragraph]:
    """The paragraphs of a document. Blank lines part them; short ones under one heading are put together up to `max_words`, longer
    ones are cut at the end of a sentence; those that stay below `min_words` are left out, as are code and rules of lines."""
    made = 0
    for start, end, headings, page in _sections(text, markdown=path.suffix.lower() not in (".txt", PDF)):
        for a, b in _pieces(text, start, end, max_words):
            body = text[a:b]
            if len(body.split()) >= min_words and re.search(r"[^\W\d_]{2}", body):
                made += 1
                yield Paragraph(f"{name}#{made}", name, a, b, body, headings, page)


def _sections(text: str, *, markdown: bool) -> Iterator[tuple[int, int, tuple[str, ...], int]]:
    """(start, end, headings, page) of runs of text under one heading, without fenced code."""
    headings: list[tuple[int, str]] = []
    page = 1 if "\f" in text else 0
    at, begin, fenced = 0, 0, False

    def names() -> tuple[str, ...]:
        return tuple(title for _, title in headings)

    for line in re.split(r"(?<=[\n\f])", text):
        after = at + len(line)
        if markdown and _FENCE.match(line):
            if not fenced:
                yield begin, at, names(), page
            fenced, begin = not fenced, after
        elif fenced:
            begin = after
        elif markdown and (match := _HEADING.fullmatch(line.strip())):
            yield begin, at, names(), page
            level = len(match[1])
            headings = [one for one in headings if one[0] < level] + [(level, _plain(match[2]))]
            begin = after
        elif line.endswith("\f"):
            yield begin, after - 1, names(), page
            page, begin = page + 1, after
        at = after
    yield begin, len(text), names(), page


def _plain(heading: str) -> str:
    """A heading without emphasis, code marks and links."""
    return re.sub(r"[*_`]+", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).strip()


def _pieces(text: str, start: int, end: int, max_words: int) -> Iterator[tuple[int, int]]:
    """Spans of at most `max_words` words: paragraphs put together, long ones cut between sentences, which stay whole."""
    spans: list[tuple[int, int]] = []
    for a, b in _stripped(text, start, end):
        begin = last = a
        if len(text[a:b].split()) > max_words:
            for stop in (a + match.end() for match in SENTENCE_END.finditer(text[a:b])):
                if last > begin and len(text[begin:stop].split()) > max_words:
                    spans.append((begin, last))
                    begin = last + len(text[last:b]) - len(text[last:b].lstrip())
                last = stop
        if text[begin:b].strip():
            spans.append((begin, b))
    joined: list[tuple[int, int]] = []
    for a, b in spans:
        if joined and len(text[joined[-1][0] : b].split()) <= max_words:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    yield from ((a, a + len(text[a:b].rstrip())) for a, b in joined)


def _stripped(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The spans between blank lines, without blanks at their ends."""
    edges = [start, *(start + n for m in re.finditer(r"\n[ \t]*\n", text[start:end]) for n in m.span()), end]
    for a, b in zip(edges[::2], edges[1::2], strict=True):
        body = text[a:b]
        if body.strip():
            yield a + len(body) - len(body.lstrip()), a + len(body.rstrip())
