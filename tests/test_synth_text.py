"""ROUGE-L, coverage, HTML to Markdown and paragraphs, each against something independent."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from criadero.errors import UserError
from criadero.synth.html_text import looks_like_html, to_markdown
from criadero.synth.paragraphs import find_documents, paragraphs, read_text
from criadero.synth.text import Pool, covered, lcs, positions, words


def lcs_by_table(a: list[str], b: list[str]) -> int:
    """The textbook's dynamic programme (Cormen et al., section 14.4), written without looking at text.py."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def test_lcs_is_exact() -> None:
    draw = random.Random(3)
    for _ in range(600):
        letters = "abcdefghijklmnopqrstuvwxyz"[: draw.choice([1, 2, 3, 8, 26])]
        a, b = ([draw.choice(letters) for _ in range(draw.choice([0, 1, 5, 31, 64, 90]))] for _ in "ab")
        assert lcs(positions(a), len(a), b) == lcs_by_table(a, b) == lcs(positions(b), len(b), a)


def rouge_l(a: list[str], b: list[str]) -> float:
    """F1 of recall and precision, by the table."""
    common = lcs_by_table(a, b)
    recall, precision = common / max(1, len(a)), common / max(1, len(b))
    return 2 * recall * precision / (recall + precision) if common else 0.0


def test_words_are_folded() -> None:
    assert words("¿Dónde está el NIÑO, a las 3?") == ["dónde", "está", "el", "niño", "a", "las", "3"]


def test_pool_finds_what_comparing_all_would() -> None:
    draw = random.Random(5)
    bag = [f"w{n}" for n in range(12)]
    texts = [" ".join(draw.choice(bag) for _ in range(draw.randint(1, 14))) for _ in range(300)]
    pool, kept = Pool(), []
    for text in texts:
        expected = any(rouge_l(words(text), words(other)) >= 0.7 - 1e-9 for other in kept)
        assert pool.alike(text, 0.7) == expected
        if not expected:
            pool.add(text)
            kept.append(text)
    assert 50 < len(kept) < 290


def test_covered() -> None:
    source = "La tienda abre los domingos de 10 a 13 horas. El envío cuesta tres euros."
    assert covered("El envío a casa cuesta 3 euros", source)[1] == ["casa", "3"]
    assert covered("Los domingos la tienda abre", source) == (1.0, [])
    assert covered("abren tiendas, deliveries", "abre tienda deliver")[0] == 1.0, "endings do not count"
    assert covered("contratos", "contar")[0] == 0.0
    assert covered("the of", "anything") == (1.0, [])


@pytest.mark.parametrize(
    ("html", "markdown"),
    [
        ("<p>One</p><p>Two <b>bold</b> and <em>thin</em></p>", "One\n\nTwo **bold** and *thin*"),
        ("<h2>Head</h2>text<br>more", "## Head\n\ntext\nmore"),
        ("<ul><li>a</li><li><p>b</p><ol><li>c</li><li>d</li></ol></li></ul>", "- a\n- b\n  1. c\n  2. d"),
        ('<ol start="3"><li>x</li></ol>after', "3. x\n\nafter"),
        (
            '<pre><div>python<button>Copy code</button></div><code class="hljs language-python">if a &lt; b:\n    go()\n</code></pre>',
            "```python\nif a < b:\n    go()\n```",
        ),
        ("Use <code>a &amp; b</code> here", "Use `a & b` here"),
        ('<a href="https://x.org">x</a> <a href="#top">top</a>', "[x](https://x.org) top"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "| a | b |\n|---|---|\n| 1 | 2 |"),
        ("<blockquote><p>said</p></blockquote><p>so</p>", "> said\n\nso"),
        ("<script>alert(1)</script><style>p {}</style><p>¿Qué&nbsp;tal?</p>", "¿Qué tal?"),
        ("<p>never <b>closed", "never **closed"),
        ("</div></ul></li>loose ends</a></pre>", "loose ends"),
    ],
)  # fmt: skip
def test_to_markdown(html: str, markdown: str) -> None:
    assert to_markdown(html).replace("\u00a0", " ") == markdown


def test_what_looks_like_html() -> None:
    assert looks_like_html('<div class="markdown"><p>Hi</p></div>')
    assert looks_like_html("line<br/>line")
    assert not looks_like_html("if a < b and c > d: x")
    assert not looks_like_html("Write `<p>text</p>` for a paragraph.")
    assert not looks_like_html("Like this:\n```html\n<p>Hi</p>\n```\nDone.")
    assert not looks_like_html("An unclosed <p> is fine.")


TEXT = """# The shop

We sell honey and bread in the old mill by the river, and cheese in winter.

## Hours

Open every day from nine to six, on Sundays from ten to one, closed in August.

```
x = 1  # code is no paragraph
```

Short.

### Far away

""" + " ".join(f"Sentence number {n} is here to make this long." for n in range(40))


def test_paragraphs_know_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(TEXT, encoding="utf-8")
    text = read_text(file)
    found = list(paragraphs(file, text, name="a.md", min_words=8, max_words=60))
    assert all(text[one.start : one.end] == one.text == one.text.strip() for one in found)
    assert found[0].headings == ("The shop",)
    assert found[1].headings == ("The shop", "Hours")
    assert found[2].headings == ("The shop", "Hours", "Far away")
    assert len(found) == 2 + 7, "360 words in pieces of at most 60, cut between sentences"
    assert all(one.text.endswith(".") and len(one.text.split()) <= 60 for one in found)
    assert not any("code is no" in one.text or one.text == "Short." for one in found)
    assert len({one.id for one in found}) == len(found)
    assert " ".join(one.text for one in found[2:]) == TEXT.rpartition("### Far away\n\n")[2]


def test_html_and_plain_text(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text(
        "<html><head><title>no</title></head><body><nav>menu</nav><h1>Prices</h1>"
        "<p>A jar of honey is six euros, bread is two.</p></body></html>"
    )
    (one,) = paragraphs(tmp_path / "b.html", read_text(tmp_path / "b.html"), name="b.html", min_words=4, max_words=60)
    assert one.text == "A jar of honey is six euros, bread is two."
    assert one.headings == ("Prices",)
    (tmp_path / "c.txt").write_text("# not a heading in plain text, only a line\n\nAnother paragraph of a few words.\n")
    found = list(paragraphs(tmp_path / "c.txt", read_text(tmp_path / "c.txt"), name="c.txt", min_words=4, max_words=8))
    assert [one.headings for one in found] == [(), ()]


def test_pdf(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    (tmp_path / "d.pdf").write_bytes(
        pdf(["Honey is six euros a jar, bread is two euros.", "We deliver on Tuesday and on Friday."])
    )
    assert pypdf.PdfReader(tmp_path / "d.pdf").pages[0].extract_text().startswith("Honey")
    text = read_text(tmp_path / "d.pdf")
    found = list(paragraphs(tmp_path / "d.pdf", text, name="d.pdf", min_words=4, max_words=60))
    assert [(one.page, one.text) for one in found] == [
        (1, "Honey is six euros a jar, bread is two euros."),
        (2, "We deliver on Tuesday and on Friday."),
    ]
    assert all(text[one.start : one.end] == one.text for one in found)
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 rubbish")
    with pytest.raises(UserError, match="is not a PDF"):
        read_text(tmp_path / "bad.pdf")
    (tmp_path / "blank.pdf").write_bytes(pdf([""]))
    with pytest.raises(UserError, match="no text in it"):
        read_text(tmp_path / "blank.pdf")


def pdf(pages: list[str]) -> bytes:
    """A PDF of one line a page, written by hand (ISO 32000-1, section 7.5)."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, line in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({line}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * n} 0 R /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    out, offsets = b"%PDF-1.4\n", []
    for n, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{n} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    size = len(objects) + 1
    tail = f"trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + f"xref\n0 {size}\n0000000000 65535 f \n{table}{tail}".encode()


def test_documents_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        find_documents(tmp_path / "none")
    (tmp_path / "x.docx").write_bytes(b"PK")
    with pytest.raises(UserError, match="no document that can be read"):
        find_documents(tmp_path / "x.docx")
    with pytest.raises(UserError, match="holds no document"):
        find_documents(tmp_path)
    (tmp_path / "latin.txt").write_bytes("señor".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_text(tmp_path / "latin.txt")
