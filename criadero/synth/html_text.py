"""HTML to Markdown, for scraped chats and for documents. Nothing but the standard library's parser; no script is run, nothing fetched."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = {
    "p",
    "div",
    "section",
    "article",
    "header",
    "footer",
    "main",
    "aside",
    "ul",
    "ol",
    "li",
    "table",
    "tr",
    "pre",
}
_BLOCKS |= {"h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "hr", "dl", "dt", "dd", "figure", "figcaption", "form"}
_SKIPPED = {"script", "style", "head", "nav", "button", "svg", "template", "noscript", "textarea", "select", "iframe"}
_VOID = {"br", "hr", "img", "input", "meta", "link", "wbr", "col", "area", "base", "embed", "source", "track"}
# a pair of these in a text, outside of fenced code, is the mark of a scraped page
_MARK = re.compile(r"<(p|div|pre|ul|ol|table|h[1-6]|blockquote)\b[^<>]*>.*?</\1\s*>|<br\s*/?>", re.I | re.S)


def looks_like_html(text: str) -> bool:
    """Whether a turn is HTML, not text that speaks of it: a block element outside of code."""
    outside = re.sub(r"```.*?(?:```|\Z)|`[^`\n]*`", "", text, flags=re.S)
    return bool(_MARK.search(outside))


def to_markdown(html: str) -> str:
    """Headings, paragraphs, lists, tables, code, quotes, emphasis and links as Markdown; scripts, styles and buttons are left out."""
    parser = _Markdown()
    parser.feed(html)
    parser.close()
    return parser.text()


class _Markdown(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.skipped = 0  # depth within elements that are left out
        self.pre = self.fence = 0  # depth, and where in `out` the opening fence ends
        self.lists: list[int] = []  # for each open list its next number; -1: bullets
        self.links: list[str] = []
        self.row: list[str] | None = None
        self.rows = 0
        self.quotes: list[int] = []

    def text(self) -> str:
        joined = "".join(self.out)
        parts = re.split(r"(```.*?```)", joined, flags=re.S)  # code keeps its blanks
        parts[::2] = [
            re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]*\n[ \t]*(?![ \t]*(?:-|\d+\.) )", "\n", part))
            for part in parts[::2]
        ]
        return re.sub(r"\n{3,}", "\n\n", "".join(parts)).strip()

    def _block(self) -> None:
        if self.pre or not self.out or self.out[-1].endswith("\n\n"):
            return
        ended = self.out[-1].endswith("\n")
        if self.lists:  # the lines of a list stand close
            self.out += [] if ended else ["\n"]
        else:
            self.out.append("\n" if ended else "\n\n")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SKIPPED or self.skipped:
            self.skipped += tag not in _VOID
            return
        values = dict(attrs)
        if tag == "br":
            self.out.append("\n")
        elif tag == "hr":
            self._block()
            self.out.append("---\n\n")
        elif tag == "pre":
            self._block()
            self.pre += 1
            self.out.append("```")
            self.fence = len(self.out)
            self.out.append("\n")
        elif tag == "code":
            if not self.pre:
                self.out.append("`")
            elif self.pre == 1:  # a page puts the language and a button between the two: they are no code
                language = re.search(r"language-([\w+#-]+)", values.get("class") or "")
                self.out[self.fence :] = [language[1] if language else "", "\n"]
        elif tag in ("ul", "ol"):
            if not self.lists:
                self._block()
            start = values.get("start") or ""
            self.lists.append(-1 if tag == "ul" else int(start) if start.isdigit() else 1)
        elif tag == "li":
            if self.out and not self.out[-1].endswith("\n"):
                self.out.append("\n")
            depth = max(len(self.lists) - 1, 0)
            number = self.lists[-1] if self.lists else -1
            self.out.append("  " * depth + (f"{number}. " if number >= 0 else "- "))
            if number >= 0:
                self.lists[-1] += 1
        elif tag in ("strong", "b"):
            self.out.append("**")
        elif tag in ("em", "i"):
            self.out.append("*")
        elif tag == "a":
            self.links.append(values.get("href") or "")
            self.out.append("[")
        elif tag == "table":
            self._block()
            self.rows = 0
        elif tag == "tr":
            self.row = []
        elif tag in ("td", "th") and self.row is not None:
            self.row.append("")
        elif tag == "blockquote":
            self._block()
            self.quotes.append(len(self.out))
        elif tag in _BLOCKS:
            if not (
                self.out and re.search(r"(?:- |\d+\. )\Z", self.out[-1])
            ):  # a paragraph in a list item goes on in its line
                self._block()
            if re.fullmatch(r"h[1-6]", tag):
                self.out.append("#" * int(tag[1]) + " ")

    def handle_endtag(self, tag: str) -> None:
        if self.skipped:
            self.skipped -= tag not in _VOID
            return
        if tag == "pre" and self.pre:
            self.pre -= 1
            self.out.append("```\n\n" if self.out[-1].endswith("\n") else "\n```\n\n")
        elif tag == "code" and not self.pre:
            self.out.append("`")
        elif tag in ("strong", "b"):
            self.out.append("**")
        elif tag in ("em", "i"):
            self.out.append("*")
        elif tag == "a" and self.links:
            href = self.links.pop()
            if re.match(r"(?:https?:|mailto:)", href):
                self.out.append(f"]({href})")
            else:
                at = max(n for n, piece in enumerate(self.out) if piece == "[")
                self.out[at] = ""  # a link within the page is words
        elif tag in ("ul", "ol") and self.lists:
            self.lists.pop()
            if not self.lists:
                self._block()
        elif tag == "tr" and self.row is not None:
            self.out.append("| " + " | ".join(" ".join(cell.split()) for cell in self.row) + " |\n")
            if not self.rows:
                self.out.append("|" + "---|" * len(self.row) + "\n")
            self.rows += 1
            self.row = None
        elif tag == "blockquote" and self.quotes:
            at = self.quotes.pop()
            quoted = "".join(self.out[at:]).strip()
            self.out[at:] = ["\n".join(f"> {line}".rstrip() for line in quoted.split("\n")), "\n\n"]
        elif tag in _BLOCKS and tag not in ("li",):
            self._block()

    def handle_data(self, data: str) -> None:
        if self.skipped:
            return
        if self.row:
            self.row[-1] += data
        elif self.pre:
            self.out.append(data)
        else:
            folded = re.sub(r"\s+", " ", data)
            if self.out and self.out[-1].endswith(("\n", " ")):
                folded = folded.lstrip(" ")
            if folded:
                self.out.append(folded)
