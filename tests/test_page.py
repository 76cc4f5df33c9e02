"""The chat page in a real browser: the journeys of a user, accessibility, and that nothing on it is obeyed or fetched.

They run in the system's Chromium (`apt-get install chromium`) against a scripted server (page_server.py).
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import page_server
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (pip install playwright)")
expect = playwright.expect

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = os.environ.get("CRIADERO_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"
DESKTOP, PHONE = {"width": 1280, "height": 820}, {"width": 390, "height": 844}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        one = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield one
        one.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, page_server.World]]:
    address, world, server = page_server.start()
    yield address, world
    server.shutdown()


@pytest.fixture
def world(served: tuple[str, page_server.World]) -> page_server.World:
    served[1].wipe()
    served[1].delay = 0.001
    return served[1]


@pytest.fixture
def open_page(browser: Any, served: tuple[str, page_server.World]) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end nothing may have gone wrong in it, and nothing asked of another host."""
    opened: list[tuple[Any, list[str]]] = []

    def make(
        where: str = "", *, lang: str = "en-GB", theme: str = "light", size: dict[str, int] = DESKTOP, **more: Any
    ) -> Any:
        context = browser.new_context(viewport=size, locale=lang, color_scheme=theme, **more)
        context.set_default_timeout(8000)
        page, wrong = context.new_page(), list[str]()
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((served[0], "blob:")) else wrong.append(f"asks {r.url}"))
        opened.append((context, wrong))
        page.goto(f"{served[0]}/{where}")
        return page

    yield make
    for context, _ in opened:
        context.close()
    assert [wrong for _, found in opened for wrong in found] == []


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    return page.locator("article:not(.mine)")


def settled(page: Any) -> None:
    expect(page.get_by_role("button", name="Stop")).to_have_count(0)


def test_ask_and_read_the_answer(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    ask(page, "hello there")
    expect(answers(page)).to_contain_text("A llama hums to say that it is near.")
    expect(page).to_have_title("hello there · Criadero")
    expect(page.get_by_role("link", name="hello there")).to_have_attribute("aria-current", "page")
    expect(page.get_by_role("button", name="/ 2,048 tokens used")).to_be_visible()
    page.reload()
    expect(answers(page)).to_contain_text("A llama hums")
    page.get_by_role("button", name="About this answer").click()
    expect(page.locator("dl.about")).to_contain_text(
        "chat model made from cria, trained on 1,234,567 tokens of 1 source, CC-BY-SA-4.0"
    )
    expect(page.locator("dl.about")).to_contain_text("criadero replay rcpt_")


def test_markdown_code_and_formulas(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "markdown please")
    answer = answers(page)
    expect(answer.get_by_role("heading", name="La hora de ordeñar")).to_be_visible()
    expect(answer.locator(".katex")).to_have_count(4)
    expect(answer.locator("table td").first).to_have_text("Alpaca baby")
    expect(answer.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(answer.locator(".katex .mfrac").first).to_be_visible()  # laid out: its styles were not refused
    link = answer.get_by_role("link", name="a guide")
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer.locator(".code").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("def load(mass: float)")


def test_what_a_model_writes_is_never_obeyed(open_page: Any, world: page_server.World) -> None:
    """S13: scripts, handlers, frames, styles and forms are shown as text; images of other hosts are not fetched."""
    page = open_page()
    ask(page, "hostile")
    answer = answers(page)
    expect(answer).to_contain_text("<script>document.title = 'taken'</script>")
    expect(answer).to_contain_text("Image not loaded: a pixel")
    assert page.title() == "hostile · Criadero"
    assert (
        answer.locator(
            "script, img, iframe, style, form, input, [onclick], [onerror], [style*='display: none']"
        ).count()
        == 0
    )
    assert [a.get_attribute("href") for a in answer.locator("a[href]").all()] == ["https://example.org/"]
    expect(answer.locator(".math-raw")).to_have_count(1)


def test_an_address_sends_nothing(open_page: Any, world: page_server.World) -> None:
    """S10: a link into the page can open a chat, and no more."""
    page = open_page("?q=delete+everything&prompt=hello#q=hello")
    expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    page.wait_for_timeout(200)
    assert world.chats == {}
    assert page.get_by_label("Message", exact=True).input_value() == ""


def test_stopping_keeps_what_was_there(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "slow one")
    expect(page.locator(".live")).to_contain_text("word10 ")
    page.keyboard.press("Escape")
    expect(answers(page)).to_contain_text("Stopped by you")
    expect(answers(page)).to_contain_text("word10 ")
    time.sleep(0.1)
    (kept,) = [m for m in world.messages.values() if m["role"] == "assistant"]
    assert kept["finish_reason"] == "cancelled"
    assert "word400" not in kept["content"]
    ask(page, "and now")
    expect(answers(page)).to_have_count(2)


def test_edit_regenerate_and_branches(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "first question")
    expect(answers(page)).to_have_count(1)
    page.get_by_role("button", name="Another answer").click()
    settled(page)
    expect(page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
    page.get_by_role("button", name="Previous version").click()
    expect(page.get_by_role("group", name="Version 1 of 2")).to_be_visible()
    page.get_by_label("Message", exact=True).press("ArrowUp")  # the last question, from an empty field
    editor = page.get_by_label("Edit your message")
    expect(editor).to_be_focused()
    assert editor.input_value() == "first question"
    editor.fill("second question")
    editor.press("Enter")
    expect(page.locator("article.mine")).to_have_text(re.compile("second question"))
    settled(page)
    page.locator("article.mine").hover()
    page.locator("article.mine").get_by_role("button", name="Previous version").click()
    expect(page.locator("article.mine")).to_have_text(re.compile("first question"))
    expect(page.get_by_role("group", name="Version 1 of 2")).to_have_count(2)  # of the question, and of its answer
    assert len(world.messages) == 5


def test_a_broken_answer_says_so_and_can_be_asked_again(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "fails")
    expect(page.get_by_role("alert")).to_contain_text("its numbers were not finite")
    expect(page.locator(".live")).to_contain_text("The first words came")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("its numbers were not finite")
    assert len(world.asked) == 2


def test_the_queue_is_shown(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "queue")
    expect(page.locator(".live")).to_contain_text("3 in the queue, about 12 s")
    expect(answers(page)).to_contain_text("A llama hums")


def test_history_search_rename_delete(open_page: Any, world: page_server.World) -> None:
    for n in range(60):
        world.message(world.chat(title=f"chat {n}")["id"], None, "user", "wool" if n == 7 else "stone")
    page = open_page()
    rows = page.get_by_role("navigation").locator("li")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Older chats").click()
    expect(rows).to_have_count(60)
    page.keyboard.press("Control+k")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("wool")
    expect(rows).to_have_count(1)
    rows.hover()
    page.get_by_role("button", name="Rename: chat 7").click()
    page.get_by_label("Title").fill("The one about wool")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="The one about wool").click()
    expect(page.locator("article.mine")).to_contain_text("wool")
    page.get_by_role("button", name="Delete: The one about wool").click()
    page.get_by_role("button", name="Delete chat").click()
    expect(rows).to_have_count(0)
    assert len(world.chats) == 59


def test_system_prompt_sampling_and_model(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    page.keyboard.press("Control+,")
    panel = page.get_by_role("complementary", name="Settings")
    panel.get_by_label("System prompt").fill("You sell wool.")
    panel.get_by_role("spinbutton", name="Temperature").fill("0.3")
    panel.get_by_role("spinbutton", name="Seed").fill("42")
    panel.get_by_label("Stop at").fill("END\nFIN")
    panel.get_by_label("Keep token probabilities").check()
    panel.get_by_role("button", name="Close").click()
    page.get_by_role("combobox", name="Model").select_option("shop")
    ask(page, "a question")
    expect(answers(page)).to_contain_text("Claro: A llama hums")
    (asked,) = world.asked
    assert asked["model"] == "shop"
    assert asked["seed"] == 42
    assert asked["probabilities"] is True
    assert asked["params"] == {"temperature": 0.3, "stop": ["END", "FIN"]}
    (chat,) = world.chats.values()
    assert chat["system"] == "You sell wool."
    assert chat["model"] == "shop"


def test_the_default_model_is_chosen_until_another_is_picked(open_page: Any, world: page_server.World) -> None:
    world.default = "shop"  # an adapter that was named, on a base that is in memory already
    page = open_page()
    model = page.get_by_role("combobox", name="Model")
    expect(model).to_have_value("shop")
    model.select_option("cria")
    page.reload()
    expect(model).to_have_value("cria")
    world.default = "cria-chat"  # started for another one: what was picked then says nothing
    page.reload()
    expect(model).to_have_value("cria-chat")


def test_probabilities_by_pointer_and_keyboard(open_page: Any, world: page_server.World) -> None:
    chat = world.chat(title="p")["id"]
    question = world.message(chat, None, "user", "hi")
    list(world.answer(question["id"], {"probabilities": True}, "cria-chat"))
    page = open_page(f"#c/{chat}")
    page.get_by_role("button", name="Token probabilities").click()
    tokens = page.get_by_role("toolbar").get_by_role("button")
    tokens.nth(2).hover()
    expect(page.locator(".card .row.chosen")).to_contain_text("␣hums")
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".card .row.chosen")).to_contain_text("␣llama")
    expect(page.locator(".card")).to_contain_text("␣quizá")
    assert tokens.nth(1).get_attribute("aria-label").startswith("␣llama: ")


def test_trace(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "where from")
    page.get_by_role("button", name="Trace in the training data").click()
    page.get_by_role("button", name="hums to say that it is near.").click()
    expect(page.get_by_role("region", name="Word for word")).to_contain_text(
        "Project Gutenberg · gutenberg/1234 · PD-US"
    )
    expect(page.locator(".trace")).to_contain_text("not proof of cause")


def test_ratings_ask_for_consent_once(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "rate me")
    answer = answers(page)
    answer.get_by_role("button", name="Bad answer").click()
    page.get_by_role("dialog").get_by_role("button", name="Yes, use them").click()
    answer.get_by_label("What would have been better?").fill("It hums.")
    answer.get_by_role("button", name="Save").click()
    expect(answer).to_contain_text("Better answer kept")
    (message,) = [m for m in world.messages.values() if m["role"] == "assistant"]
    assert message["feedback"] == {"rating": -1, "better": "It hums."}
    assert world.consent
    answer.get_by_role("button", name="Good answer").click()
    expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    assert message["feedback"] == {"rating": 1, "better": None}


@pytest.mark.parametrize("blind", [True, False])
def test_side_by_side(open_page: Any, world: page_server.World, blind: bool) -> None:
    page = open_page()
    page.get_by_role("button", name="Compare two models").click()
    page.get_by_label("Second model").select_option("shop")
    page.get_by_label("Blind").set_checked(blind)
    ask(page, "abrimos hoy?")
    sides = page.locator(".side")
    settled(page)
    if blind:
        expect(page.get_by_text("Which answer is better?")).to_be_visible()
        assert "shop" not in page.locator(".duel").inner_text()
        page.get_by_role("button", name="B is better").click()
        expect(sides.nth(1)).to_contain_text("your choice")
        expect(page.get_by_role("region", name="Blind votes so far")).to_contain_text(
            "21%–100%" if world.votes[0]["b"] == "cria-chat" else "0%–79%"
        )
        page.get_by_role("button", name="Go on").click()
    else:
        expect(sides.nth(1)).to_contain_text("shop")
        expect(page.get_by_role("button", name="Go on")).to_have_count(2)  # both have answered
        assert len({asked["seed"] for asked in world.asked}) == 1
        assert len(world.asked) == 2
        sides.nth(1).get_by_role("button", name="Go on with this one").click()
    expect(answers(page)).to_have_count(1)
    expect(page.get_by_role("group", name="Version")).to_be_visible()


def test_turns_that_the_model_no_longer_sees(open_page: Any, world: page_server.World) -> None:
    chat, parent = world.chat(title="long")["id"], None
    for n in range(30):
        parent = world.message(chat, parent, "assistant" if n % 2 else "user", f"turn {n} " * 40)["id"]
    page = open_page(f"#c/{chat}")
    meter = page.get_by_role("button", name=re.compile("Context: "))
    meter.click()
    dropped = len(world.context(parent)["dropped"])
    expect(page.get_by_text(f"{dropped} messages no longer fit")).to_be_visible()
    expect(page.locator("article.unseen")).to_have_count(dropped)
    expect(page.get_by_text("From here on the model sees the conversation")).to_be_visible()


def test_an_answer_that_the_guard_stopped_says_what_it_copied(open_page: Any, world: page_server.World) -> None:
    chat = world.chat(title="Copy")["id"]
    question = world.message(chat, None, "user", "Once upon")
    hit = {
        "choice": 0,
        "copied_tokens": 51,
        "document": "tale #3",
        "source": "tales",
        "licence": "CC-BY-NC-4.0",
        "asks": "",
    }
    block = {"guard": {"index": "index", "tokens": 50, "stopped": [hit]}}
    world.message(chat, question["id"], "assistant", "a time", finish_reason="guard", criadero=block)
    for language, words in (
        ("en", "Stopped: 51 tokens as in tale #3, which may not be copied (CC-BY-NC-4.0)"),
        ("es", "Detenida: 51 tokens como en tale #3, que no se puede copiar (CC-BY-NC-4.0)"),
    ):
        page = open_page(f"#c/{chat}", lang=language)
        expect(page.get_by_text(words)).to_be_visible()


def test_attachments_are_text(open_page: Any, world: page_server.World, tmp_path: Path) -> None:
    (tmp_path / "hours.txt").write_text("lunes: 10-20\n```\nx", encoding="utf-8")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\x00")
    page = open_page()
    page.locator("input[type=file]").set_input_files([tmp_path / "hours.txt", tmp_path / "photo.jpg"])
    expect(page.get_by_role("alert")).to_have_text("photo.jpg is not text in UTF-8")
    ask(page, "when do we open?")
    expect(page.locator("article.mine details")).to_contain_text("hours.txt")
    (question,) = [m for m in world.messages.values() if m["role"] == "user"]
    assert question["content"] == "````file: hours.txt\nlunes: 10-20\n```\nx\n````\n\nwhen do we open?"


def test_your_data(open_page: Any, world: page_server.World) -> None:
    world.message(world.chat(title="kept")["id"], None, "user", "a secret")
    page = open_page("#data")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export everything").click()
    assert "a secret" in Path(download.value.path()).read_text(encoding="utf-8")
    page.get_by_label("My ratings and better answers may be used").check()
    page.get_by_role("button", name="Delete everything…").click()
    sure = page.get_by_role("button", name="Delete everything for good")
    expect(sure).to_be_disabled()
    page.get_by_label("Write “delete everything” to confirm").fill("delete everything")
    sure.click()
    expect(page.get_by_text("Deleted: 1 chats, 1 messages")).to_be_visible()
    assert world.chats == {}
    assert not world.consent
    expect(page.get_by_role("navigation").locator("li")).to_have_count(0)


def test_a_tie_is_no_share(open_page: Any, world: page_server.World) -> None:
    world.votes = [{"a": "cria-chat", "b": "shop", "winner": "tie"}]
    row = open_page("#data").locator("tbody tr")
    expect(row.locator("td")).to_have_text(["shop", "0 · 0 · 1", "–", re.compile("0%–100%")])


def test_a_key_is_asked_for(browser: Any) -> None:
    address, world, server = page_server.start(key="sk-criadero-1")
    world.chat(title="mine")
    page = browser.new_page()
    page.set_default_timeout(8000)
    page.goto(address)
    page.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("That key is not accepted.")
    page.get_by_label("Key").fill("sk-criadero-1")
    page.keyboard.press("Enter")
    expect(page.get_by_role("link", name="mine")).to_be_visible()
    assert page.evaluate("Object.keys(localStorage).some(k => localStorage[k].includes('sk-'))") is False
    page.close()
    server.shutdown()


def test_a_server_that_is_gone(browser: Any) -> None:
    address, _, server = page_server.start()
    page = browser.new_page()
    page.set_default_timeout(8000)
    page.goto(address)
    expect(page.get_by_label("Message", exact=True)).to_be_visible()
    page.route("**/api/**", lambda route: route.abort())
    ask(page, "anyone?")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    assert page.get_by_label("Message", exact=True).input_value() == "anyone?"  # not lost
    page.close()
    server.shutdown()


def test_keyboard_only(open_page: Any, world: page_server.World) -> None:
    page = open_page()
    ask(page, "with keys alone")
    expect(answers(page)).to_have_count(1)
    settled(page)
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)  # while it is open, keys are its own
    page.keyboard.press("Alt+ArrowUp")
    expect(answers(page)).to_be_focused()
    page.keyboard.press("Tab")
    expect(answers(page).get_by_role("button", name="Copy")).to_be_focused()
    page.keyboard.press("Shift+Escape")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.press("Control+Shift+O")
    expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()


def test_spanish_and_themes(open_page: Any, world: page_server.World) -> None:
    page = open_page(lang="es-ES", theme="dark")
    expect(page.get_by_role("heading", name="¿De qué hablamos?")).to_be_visible()
    expect(page.locator(".top .made")).to_contain_text(
        "hecho a partir de cria, entrenado con 1.234.567 tokens de 1 fuente"
    )
    assert page.evaluate("document.documentElement.lang + document.documentElement.dataset.theme") == "esdark"
    page.get_by_role("button", name="English").click()
    page.get_by_role("button", name="Theme: as the system").click()
    page.reload()
    expect(page.get_by_role("heading", name="What shall we talk about?")).to_be_visible()
    assert page.evaluate("document.documentElement.lang + document.documentElement.dataset.theme") == "enlight"


def test_on_a_phone(open_page: Any, world: page_server.World) -> None:
    world.chat(title="an older chat")
    page = open_page(size=PHONE, has_touch=True, is_mobile=True)
    ask(page, "markdown")
    expect(answers(page).locator("pre")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    page.get_by_role("button", name="Show chats").tap()
    page.get_by_role("link", name="an older chat").tap()
    expect(page.get_by_role("navigation")).to_have_count(0)
    page.get_by_role("button", name="Settings of this chat").tap()
    expect(page.get_by_role("complementary", name="Settings")).to_be_visible()


def test_a_thousand_messages(open_page: Any, world: page_server.World) -> None:
    """Only the last are put into the document; older ones come when they are near, and nothing jumps."""
    chat, parent = world.chat(title="thousand")["id"], None
    for n in range(1000):
        parent = world.message(chat, parent, "assistant" if n % 2 else "user", f"**turn {n}** " + "wool " * 60)["id"]
    page = open_page(f"#c/{chat}")
    expect(page.get_by_text("turn 999")).to_be_visible()
    assert page.locator("article").count() <= 120
    first = page.locator("article").first
    text = first.inner_text()
    count = page.locator("article").count()
    page.evaluate("document.querySelector('.scroller').scrollTop = 300")
    page.wait_for_function("n => document.querySelectorAll('article').length > n", arg=count)
    assert (
        abs(page.evaluate("document.querySelector('.scroller').scrollTop") - 300) > 1000
    )  # it stayed where it was read
    assert text.split("\n")[0] in page.locator(".scroller").inner_text()
    ask(page, "still quick?")
    expect(answers(page).last).to_contain_text("A llama hums")


def test_against_the_real_server(browser: Any, tmp_path: Path) -> None:
    """The same journey with a model behind it: what the scripted server says is what the real one says."""
    serving = pytest.importorskip("serving", reason="needs httpx")
    from criadero.serve.page_answers import sampling
    from criadero.serve.settings import Settings
    from criadero.serve.store import open_store

    store = open_store(str(tmp_path / "criadero.db"))
    wrong: list[str] = []
    with serving.serving(Settings(models=("cria-chat", "cria")), store=store) as live:
        page = browser.new_page(locale="en-GB")
        page.set_default_timeout(20_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(live.url)
        page.keyboard.press("Control+,")
        page.get_by_label("Keep token probabilities").check()
        usual = {
            "Temperature": "temperature",
            "Top p": "top_p",
            "Repetition penalty": "repetition_penalty",
            "Longest answer": "max_tokens",
        }
        for label, name in usual.items():  # what the page says is what the server does
            dial = page.get_by_role("spinbutton", name=label, exact=True)
            assert dial.get_attribute("placeholder") == f"default: {sampling({})[name]}"
        page.get_by_role("spinbutton", name="Longest answer").fill("24")
        page.get_by_role("spinbutton", name="Seed").fill("7")
        page.keyboard.press("Tab")
        page.keyboard.press("Escape")
        ask(page, "Hola, ¿quién eres?")
        expect(answers(page)).to_have_count(1)
        first = answers(page).locator(".markdown").inner_text()
        page.get_by_role("button", name="About this answer").click()
        expect(page.locator("dl.about")).to_contain_text("criadero replay rcpt")
        expect(page.get_by_role("button", name="/ 512 tokens used")).to_be_visible()
        page.get_by_role("button", name="Token probabilities").click()
        page.get_by_role("toolbar").get_by_role("button").first.hover()
        expect(page.locator(".card .row.chosen")).to_have_count(1)
        page.get_by_role("button", name="Another answer").click()
        expect(page.get_by_role("group", name="Version 2 of 2")).to_be_visible()
        assert answers(page).locator(".markdown").inner_text() == first  # the same seed
        page.get_by_role("button", name="Good answer").click()
        page.get_by_role("dialog").get_by_role("button", name="Yes, use them").click()
        expect(page.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
        page.get_by_role("button", name="Compare two models").click()
        ask(page, "Cuéntame algo del mar")
        page.get_by_role("button", name="A is better").click()
        expect(page.get_by_role("region", name="Blind votes so far")).to_be_visible()
        page.get_by_role("button", name="Go on").click()
        expect(answers(page)).to_have_count(2)
        page.get_by_role("link", name="Your data").click()
        with page.expect_download() as download:
            page.get_by_role("button", name="Export everything").click()
        assert "Cuéntame algo del mar" in json.dumps(
            json.loads(Path(download.value.path()).read_text("utf-8")), ensure_ascii=False
        )
        page.get_by_role("button", name="Delete everything…").click()
        page.get_by_label("Write “delete everything” to confirm").fill("delete everything")
        page.get_by_role("button", name="Delete everything for good").click()
        expect(page.get_by_text("Deleted: ")).to_be_visible()
        expect(page.get_by_role("navigation").locator("li")).to_have_count(0)
        page.close()
    store.close()
    assert wrong == []


VIEWS: dict[str, Callable[[Any, page_server.World], None]] = {
    "empty": lambda page, world: None,
    "answer": lambda page, world: (ask(page, "markdown"), settled(page), page.locator(".katex").first.wait_for()),
    "about": lambda page, world: (ask(page, "hi"), page.locator("article .tools button").last.click()),
    "probabilities": lambda page, world: (
        page.keyboard.press("Control+,"),
        page.locator(".settings input[type=checkbox]").first.check(),
        page.keyboard.press("Escape"),
        ask(page, "hi"),
        settled(page),
        page.locator("article:not(.mine) .tools button").nth(4).click(),
        page.locator(".token").first.focus(),
    ),
    "trace": lambda page, world: (
        ask(page, "hi"),
        settled(page),
        page.locator("article:not(.mine) .tools button").nth(4).click(),
        page.locator(".span").click(),
    ),
    "settings": lambda page, world: page.keyboard.press("Control+,"),
    "data": lambda page, world: page.goto(page.url.split("#")[0] + "#data"),
    "keys": lambda page, world: page.keyboard.press("Control+/"),
    "duel": lambda page, world: (
        page.locator(".top button.wide").click(),
        ask(page, "abrimos"),
        page.locator(".vote button").first.click(),
        page.locator(".vote table").wait_for(),
    ),
    "broken": lambda page, world: (ask(page, "fails"), page.locator(".live .notice").wait_for()),
}
TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.mark.skipif(not AXE.exists(), reason="no axe-core: run `npm ci` in web/")
@pytest.mark.parametrize("size", [DESKTOP, pytest.param(PHONE, marks=pytest.mark.slow)], ids=["desktop", "phone"])
@pytest.mark.parametrize("view", VIEWS)
def test_wcag(open_page: Any, world: page_server.World, view: str, size: dict[str, int]) -> None:
    """axe finds nothing against WCAG 2.2 A and AA or its best practices, in both themes."""
    page = open_page(size=size, bypass_csp=True)  # for axe itself
    page.locator("textarea").first.wait_for()
    VIEWS[view](page, world)
    page.evaluate(AXE.read_text(encoding="utf-8"))
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_timeout(250)  # transitions
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        found = page.evaluate("tags => axe.run(document, { runOnly: tags })", TAGS)
        told = [(rule["id"], [node["html"][:160] for node in rule["nodes"]]) for rule in found["violations"]]
        assert told == [], f"{theme}: {json.dumps(told, indent=1)}"
        assert len(found["passes"]) > 20


def test_the_first_load_is_light() -> None:
    """What the browser fetches before the page is there: document, script, style, font and icon, compressed."""
    document = (page_server.STATIC / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'(?:src|href)="\./([^"]+)"', document)
    assert any(name.endswith(".js") for name in names)
    assert any(name.endswith(".css") for name in names)
    files = [page_server.STATIC / name for name in names] + list(page_server.STATIC.glob("assets/atkinson*"))
    size = sum(len(gzip.compress(file.read_bytes(), 9)) for file in files) + len(gzip.compress(document.encode()))
    assert size <= 200_000


def test_nothing_inline_and_no_other_host() -> None:
    document = (page_server.STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bstyle=|\bon\w+=", document)
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", document)
    for file in page_server.STATIC.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(?:https?:|data:|//)|@import", file.read_text(encoding="utf-8")), file.name
