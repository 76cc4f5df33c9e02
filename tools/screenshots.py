"""Take the pictures of docs/images anew: ``.venv/bin/python tools/screenshots.py MODEL`` (the demo's tuned model, say).

It serves MODEL on a free port, asks a question in English and one in Spanish, opens what the page tells of the answer, and
writes page.png and pagina.png. It needs Chromium (``apt-get install chromium``) and the tests' tools (``make test``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
# file, language, theme, question; what the settings' box, the message field and two buttons under an answer are called there
PICTURES = [
    ("page.png", "en-GB", "light", "Are you open on Sundays?",
     "Keep token probabilities", "Message", "Token probabilities", "About this answer"),
    ("pagina.png", "es-ES", "dark", "¿Cuánto cuesta la miel?",
     "Guardar las probabilidades", "Mensaje", "Probabilidades", "Sobre esta respuesta"),
]  # fmt: skip


def take(browser: Any, address: str, picture: tuple[str, ...]) -> None:
    name, lang, theme, question, keep, message, sure, about = picture
    page = browser.new_page(locale=lang, color_scheme=theme, viewport={"width": 1200, "height": 720})
    page.goto(address)
    page.keyboard.press("Control+,")
    page.get_by_label(re.compile(keep)).check()
    page.keyboard.press("Escape")
    page.get_by_label(message, exact=True).fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("button", name=about).click(timeout=60_000)
    page.get_by_role("button", name=re.compile(sure)).first.click()
    page.locator(".token").nth(1).hover()
    page.wait_for_timeout(500)
    page.screenshot(path=IMAGES / name)
    page.close()
    print(IMAGES / name)


def main() -> int:
    if len(sys.argv) != 2:
        print("error: name one model: tools/screenshots.py MODEL", file=sys.stderr)
        return 2
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("error: no Chromium: apt-get install chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "criadero", "serve", sys.argv[1], "--port", "0", "--no-open"]
        server = subprocess.Popen(
            [*command, "--database", f"{folder}/store.db"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert server.stdout is not None
            address = ""
            for line in server.stdout:  # it prints its address once it listens
                found = re.search(r"http://127\.0\.0\.1:\d+", line)
                if found:
                    address = found.group()
                    break
            if not address:
                print("error: the server did not start", file=sys.stderr)
                return 2
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
                for picture in PICTURES:
                    take(browser, address, picture)
        finally:
            server.terminate()
            server.wait(timeout=30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
