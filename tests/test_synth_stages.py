"""The stages of synth, end to end with a scripted teacher: what is asked, kept, removed and counted; kills; bad input."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from scripted_teacher import scripted_teacher

from criadero import cli
from criadero.artifact import Artifact, create, open_artifact, verify
from criadero.data.build import read_dataset
from criadero.data.documents import read_rows
from criadero.errors import UserError
from criadero.run import make, run
from criadero.synth import evol_instruct as evol
from criadero.synth import self_instruct as instruct
from criadero.synth.clean_chats import in_order, split_rounds, without_errors
from criadero.synth.dataset import SEEDS, read_tasks
from criadero.synth.documents import first_sentences, parse, plain
from criadero.train.examples import read_dataset_chats

SERVED = {"teacher_model": "scripted", "teacher_licence": "apache-2.0"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("criadero.synth.teacher._sleep", lambda _: None)
    monkeypatch.setenv("CRIADERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CRIADERO_TEACHER_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(made: Artifact, name: str) -> dict[str, Any]:
    return next(row for row in made.passport["data"]["by_source"] if row["name"] == name)


def rows_of(made: Artifact, split: str = "train") -> list[dict[str, Any]]:
    return [row for file in sorted(made.path.glob(f"{split}-*")) for _, row in read_rows(file)]


def check_dataset(made: Artifact) -> None:
    """What every dataset has to be: sealed, read by the stages that use one, its counts adding up."""
    assert made.kind == "dataset"
    assert verify(made.path) == []
    documents = list(read_dataset(made.path, "train")) + list(read_dataset(made.path, "held_out"))
    rows = made.passport["data"]["by_source"]
    assert sum(row["documents_out"] for row in rows) == len(documents)
    assert len({document.id for document in documents}) == len(documents)
    assert read_dataset_chats(made.path, "train", skip_bad=False).chats
    assert "sk-" not in (made.path / "passport.json").read_text()


# -- Self-Instruct ----------------------------------------------------------------------------------------------------


def block(
    n: int, instruction: str, given: str = "(none)", output: str = "It is so because it has always been so."
) -> str:
    return f"### {n}\nInstruction: {instruction}\nInput: {given}\nOutput: {output}\n"


def good(request: int, place: int) -> str:
    """An instruction unlike all others."""
    return f"Explain what makes {' and '.join(f'a{request}b{place}c{n}' for n in range(6))} rare."


def tasks_script(text: str, n: int) -> str:
    first = int(re.findall(r"### (\d+)", text)[-1])
    return "\n".join(block(first + i, good(n, i), output=f"Answer {n} and {i} of them.") for i in range(5))


def self_instruct(out: str, url: str, **changes: Any) -> Artifact:
    values = {
        "teacher": url,
        **SERVED,
        "tasks": 12,
        "per_request": 5,
        "batch": 2,
        "languages": ["en"],
        "concurrency": 1,
    }
    return make("self_instruct", values | changes, out, overwrite=True)


def test_self_instruct_makes_a_dataset() -> None:
    with scripted_teacher(tasks_script) as server:
        made = self_instruct("tasks", server.url)
        check_dataset(made)
        assert len(server.requests) == 3, "no more is asked for than is wanted"
        row = source(made, "self_instruct")
        assert row["documents_out"] == 12
        assert row["licence"] == "apache-2.0"
        assert row["removed"] == {"enough": 3}
        assert row["documents_in"] == 15
        assert source(made, "seeds")["documents_out"] == 33
        (teacher,) = [one for one in made.inputs if one["relation"] == "outputs_of"]
        assert (teacher["name"], teacher["licence"]) == ("scripted", "apache-2.0")
        assert made.passport["step"]["teacher"]["answered"] == 3
        prompt = server.requests[0]["messages"][-1]["content"]
        shown = re.findall(r"(?m)^Instruction: (.*)$", prompt)
        assert len(shown) == 3
        assert set(shown) <= {task.instruction for task in read_tasks(SEEDS)}
        # made again from the recorded answers: the same files, and nobody is asked
        again = make(
            "self_instruct",
            {"teacher": "tasks/answers.jsonl", "tasks": 12, "per_request": 5, "batch": 2, "languages": ["en"]},
            "again",
        )
        assert (again.path / "train-00000.jsonl.zst").read_bytes() == (made.path / "train-00000.jsonl.zst").read_bytes()
        assert [one["id"] for one in again.inputs if one["relation"] == "outputs_of"] == [teacher["id"]]
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("instruction", "given", "output", "reason"),
    [
        ("Too short.", "(none)", "yes", "short"),
        ("word " * 151 + "end", "(none)", "yes", "long"),
        ("* Explain how a clock works", "(none)", "yes", "beginning"),
        ("Describe the picture of the old harbour.", "(none)", "yes", "beyond_text"),
        ("Write a program that adds two numbers.", "(none)", "yes", "program"),
        ("Repeat what I say to you.", "(none)", "Repeat what I say to you.", "echo"),
        ("Tell me who made you, in short.", "(none)", "As an AI language model made by OpenAI, I cannot.", "pasted"),
        (
            "Explica por qué el cielo es azul por la mañana.",
            "(none)",
            "Porque la luz se dispersa en el aire.",
            "language",
        ),
        ("Explain to a child what a shadow is.", "(none)", "It is dark.", "alike"),
        ("Please explain to a child what the shadow is.", "(none)", "It is dark.", "alike"),
    ],
)
def test_self_instruct_filters(instruction: str, given: str, output: str, reason: str) -> None:
    with scripted_teacher(lambda text, n: block(4, good(n, 1)) + block(5, instruction, given, output)) as server:
        made = self_instruct("tasks", server.url, tasks=2, batch=1, per_request=1)
        assert source(made, "self_instruct")["removed"] == {reason: 2}
        assert source(made, "self_instruct")["documents_out"] == 2


def test_self_instruct_counts_what_it_cannot_read() -> None:
    script: list[Any] = [
        "I would rather not.",
        "### 4\nInstruction: Only half of a task is here\n",
        [block(4, good(0, 0)) + block(5, "This one was cut off in the mid", output="of its ans"), "length"],
        block(4, good(1, 1)),
    ]
    with scripted_teacher(lambda text, n: script[n]) as server:
        made = self_instruct("tasks", server.url, tasks=2, batch=1, per_request=2)
        assert source(made, "self_instruct")["removed"] == {"unparsable": 2, "cut_off": 1}


def test_self_instruct_gives_up_on_a_barren_teacher() -> None:
    with (
        scripted_teacher(lambda *_: "No.") as server,
        pytest.raises(UserError, match=r"not one usable task in 8 requests \(removed: unparsable 8\)"),
    ):
        self_instruct("tasks", server.url, batch=1)
    assert not Path("tasks").exists()
    assert not Path("tasks.partial").exists()


def test_parse_reads_what_teachers_write() -> None:
    text = (
        "Instrucción: Di hola.\nEntrada: ninguna\nRespuesta: Hola.\n\n"
        "### Tarea 5:\n**Instruction:** Sum this:\n**Input:** a\nb\n**Output:**\n1. x\n2. y\n\n"
    )
    first, second = instruct.parse(text)
    assert first is not None
    assert second is not None
    assert (first.instruction, first.input, first.output) == ("Di hola.", "", "Hola.")
    assert (second.instruction, second.input, second.output) == ("Sum this:", "a\nb", "1. x\n2. y")


def test_seeds_are_enough_and_differ() -> None:
    tasks = read_tasks(SEEDS)
    assert len(tasks) >= 60
    assert sum(task.lang == "es" for task in tasks) >= 30
    assert all(task.output for task in tasks)
    assert len({task.id for task in tasks}) == len(tasks)


def test_budget_stops_and_a_larger_one_goes_on() -> None:
    # a request may cost at most its bytes and 100 tokens, each 0.001; it does cost 0.15
    priced = {"price_in": 1000.0, "price_out": 1000.0, "answer_tokens": 100}
    with scripted_teacher(tasks_script) as server:
        self_instruct("other", server.url, tasks=1, seed=9, **priced, budget=9.0)
        most = max(len(one["messages"][0]["content"].encode()) for one in server.requests) / 1000 + 0.1
        server.requests.clear()
        with pytest.raises(UserError, match=r"the budget of .* does not cover"):
            self_instruct("tasks", server.url, budget=most + 0.1, **priced)
        assert not Path("tasks").exists()
        paid = len(server.requests)
        assert 1 <= paid < 3
        made = self_instruct("tasks", server.url, budget=20.0, **priced)
        assert len(server.requests) == 3
        assert made.passport["step"]["teacher"]["cost"] == "0.45"
        assert made.passport["step"]["teacher"]["cached"] == paid


# -- Evol-Instruct ----------------------------------------------------------------------------------------------------


def evol_script(text: str, _: int) -> str:
    task = text.partition("<<<\n")[2].partition("\n>>>")[0]
    if "SAME or DIFFERENT" in text:
        return "SAME" if "gains nothing" in text.rpartition("Second:")[2] else "DIFFERENT."
    if "<<<" not in text:
        return (
            "I am sorry, I cannot."
            if "refuse" in text
            else "the of and."
            if "empty answer" in text
            else f"The answer to it is {text[:20]}."
        )
    if "stays" in task:
        return task
    if "misread" in task:
        return "The rewritten task is: do it."
    return f"<<<\n{task} And why is that?\n>>>"


def write_tasks(*questions: str) -> str:
    rows = [{"id": f"t{n}", "lang": "en", "prompt": q, "completion": "So it is."} for n, q in enumerate(questions)]
    Path("first.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "first.jsonl"


def test_evol_instruct_eliminates_by_the_four_rules() -> None:
    data = write_tasks(
        "What is a mill?",
        "It stays the same.",
        "Will you misread it?",
        "It gains nothing at all.",
        "Will you refuse this?",
        "Give an empty answer.",
    )
    with scripted_teacher(evol_script) as server:
        values = {
            "teacher": server.url,
            **SERVED,
            "data": data,
            "data_licence": "CC0-1.0",
            "rounds": 2,
            "held_out": 0.0,
        }
        made = make("evol_instruct", values, "evolved")
        check_dataset(made)
    row = source(made, "evol_instruct")
    assert row["removed"] == {"no_gain": 4, "prompt_words": 2, "sorry": 2, "says_nothing": 2}
    assert row["documents_in"] == 12
    assert row["documents_out"] == 2
    assert source(made, "begun_with") == source(made, "begun_with") | {"licence": "CC0-1.0", "documents_out": 6}
    first, second = [row for row in rows_of(made) if row["source"] == "evol_instruct"]
    assert first["messages"][0]["content"] == "What is a mill? And why is that?"
    assert second["messages"][0]["content"] == "What is a mill? And why is that? And why is that?"
    assert [one["made"]["round"] for one in (first, second)] == [1, 2]
    assert second["made"]["parent"] == first["id"]
    assert second["made"]["root"] == "t0"
    assert first["made"]["operator"] in evol.OPERATORS


def test_evol_families_stay_on_one_side() -> None:
    data = write_tasks(*(f"What is number {n} good for?" for n in range(30)))
    with scripted_teacher(evol_script) as server:
        made = make(
            "evol_instruct", {"teacher": server.url, **SERVED, "data": data, "rounds": 2, "held_out": 0.3}, "evolved"
        )
    train, apart = rows_of(made), rows_of(made, "held_out")

    def roots(rows: list[dict[str, Any]]) -> set[str]:
        return {row["made"]["root"] if "made" in row else row["id"] for row in rows}

    assert not roots(train) & roots(apart)
    assert len(train) + len(apart) == 90
    assert len(apart) > 9


def test_operators_are_drawn_evenly_and_the_same_again() -> None:
    recipe = evol.EvolInstructRecipe(teacher="x")
    drawn = [evol.operator_of(recipe, f"t{n}", 1) for n in range(600)]
    assert drawn == [evol.operator_of(recipe, f"t{n}", 1) for n in range(600)]
    assert all(70 < drawn.count(operator) < 130 for operator in evol.OPERATORS)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("SAME", True),
        ("Different.", False),
        ("iguales", True),
        ("Son DISTINTAS", False),
        ("perhaps", None),
        ("same or different", None),
    ],
)
def test_same(text: str, verdict: bool | None) -> None:
    assert evol.same(text) is verdict


def test_bad_answers() -> None:
    assert evol.bad_answer("Lo siento, no puedo.") == "sorry"
    assert evol.bad_answer("I am sorry to say that " + "the bridge was closed " * 20) == ""
    assert evol.bad_answer("... the, of!") == "says_nothing"
    assert evol.bad_answer("42") == ""


# -- shared chats -----------------------------------------------------------------------------------------------------


def conversation(*turns: str, first: str = "human") -> dict[str, Any]:
    other = "gpt" if first == "human" else "human"
    return {"conversations": [{"from": (first, other)[n % 2], "value": text} for n, text in enumerate(turns)]}


def clean(rows: list[dict[str, Any]], **changes: Any) -> Artifact:
    tiny.base(Path("student"))
    Path("shared.json").write_text(json.dumps([{"id": f"c{n}", **row} for n, row in enumerate(rows)]))
    values = {"data": ["shared.json"], "base": "student", "data_licence": "CC0-1.0", "held_out": 0.0, "near_dedup": 0.0}
    return make("clean_chats", values | changes, "clean")


ASKED = "Can you tell me when the shop is open on Sundays?"
SAID = "Yes, we are open on Sundays from ten to one."


def test_clean_chats() -> None:
    made = clean(
        [
            conversation(ASKED, f"<p>{SAID}</p><p>Copy code</p>"),
            conversation("Where the link began.", ASKED + " And why?", SAID, "Thank you for that", first="gpt"),
            conversation(ASKED + " Please", SAID, "What else is there for me to know?", "Something went wrong. Try again."),
            conversation(ASKED, SAID),
            conversation("¿A qué hora abre la tienda los domingos por la mañana?", "Abrimos a las diez de la mañana."),
            conversation("Pouvez-vous me dire quand la boutique est ouverte ?", "Oui, elle est ouverte le dimanche, dans la rue."),
            conversation("", ""),
            conversation(ASKED + " So?", "network error"),
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "It is so."}]},
            {"conversations": [{"from": "human", "value": ASKED}, {"from": "bing", "value": SAID}, {"from": "gpt", "value": SAID}]},
            {"other": 1},
            conversation(ASKED + " Now?", "No."),
        ]
    )  # fmt: skip
    check_dataset(made)
    row = source(made, "shared")
    assert row["removed"] == {"duplicate": 1, "language": 1, "empty": 2, "roles": 2, "no_chat": 1, "short": 1}
    assert row["documents_in"] == 12
    assert row["documents_out"] == 4
    assert {k: v for k, v in row["changed"].items() if k in ("html", "buttons", "beginning_cut", "end_cut", "cut_at_error")} == {
        "html": 1, "buttons": 1, "beginning_cut": 1, "end_cut": 1, "cut_at_error": 1,
    }  # fmt: skip
    texts = [one["messages"] for one in rows_of(made)]
    assert texts[0] == [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
    assert [m["content"] for m in texts[1]] == [ASKED + " And why?", SAID]
    assert len(texts[2]) == 2
    assert [row["lang"] for row in rows_of(made)] == ["en", "en", "en", "es"]


def test_long_chats_are_split_by_rounds() -> None:
    rounds = [text for n in range(12) for text in (f"{n}: {ASKED}", f"{n}: {SAID}")]
    long = conversation(
        ASKED, SAID, "Read this: " + "the shop is open " * 80, SAID, "What is the matter with that?", SAID
    )
    made = clean([conversation(*rounds), long])
    check_dataset(made)
    derived = made.passport["step"]["derived"]
    rows = rows_of(made)
    assert derived["split"] == 2
    assert derived["long_rounds"] == 1
    assert derived["parts"] == len(rows)
    first = [row["messages"] for row in rows if row["id"].startswith("c0#")]
    assert [m["content"] for part in first for m in part] == rounds, "nothing is lost, and nothing twice"
    assert all(part[0]["role"] == "user" and len(part) % 2 == 0 for part in first)
    assert len(first) > 2


def test_chats_may_be_longer_than_the_student_is_yet(capsys: pytest.CaptureFixture[str]) -> None:
    """It gets the context when it is tuned: stage sft has the same setting."""
    rounds = [text for n in range(6) for text in (f"{n}: {ASKED}", f"{n}: {SAID}")]
    made = clean([conversation(f"{n}: {ASKED}", *rounds[1:]) for n in range(4)], context=512)
    assert "context 512: student has 128, so it has to be tuned with the same context" in capsys.readouterr().err
    assert [len(row["messages"]) for row in rows_of(made)] == [12] * 4
    values = {"base": "student", "data": str(made.path), "method": "full", "context": 512, "epochs": 1.0}
    tuned = make("sft", values | {"held_out_share": 0.0, "dtype": "float32"}, "tuned")
    assert 128 < tuned.passport["data"]["counts"]["longest"] <= 512


def test_split_rounds_fills_parts() -> None:
    def measure(messages: Any) -> int:
        return sum(len(m["content"]) for m in messages)

    turns = [{"role": "system", "content": "ss"}] + [
        {"role": ("user", "assistant")[n % 2], "content": "xxx"} for n in range(10)
    ]
    parts, long_rounds = split_rounds(turns, measure, 14)  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [5, 5, 3]
    assert all(part[0]["role"] == "system" for part in parts)
    assert long_rounds == 0
    assert split_rounds(turns, measure, 7) == ([], 5)  # type: ignore[arg-type]
    assert split_rounds(turns, measure, 32) == ([turns], 0)  # type: ignore[arg-type]


def test_order_and_errors() -> None:
    assert in_order([("system", "s"), ("assistant", "a"), ("user", "u"), ("assistant", "a"), ("user", "u")]) == (
        [("system", "s"), ("user", "u"), ("assistant", "a")],
        ["beginning_cut", "end_cut"],
    )
    chat = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "An error occurred " + "in the old mill " * 20},
    ]
    assert without_errors(chat) == (chat, []), "a long answer that begins so is an answer"


# -- documents --------------------------------------------------------------------------------------------------------

SHOP = """# The mill shop

## Opening hours

The mill shop opens every day from 9 to 18, and on Sundays from 10 to 13. It is closed in August.

## Deliveries

Deliveries leave on Tuesday and Friday afternoons. They cost 3 euros and reach villages up to 10 kilometres away.
"""


def folder(**files: str) -> str:
    Path("docs").mkdir(exist_ok=True)
    for name, text in files.items():
        Path("docs", name.replace("_", ".")).write_text(text)
    return "docs"


def qa_script(text: str, _: int) -> str:
    if "Opening hours" in text:
        return (
            "Q: When does the mill shop open on Sundays?\nA: The mill shop opens from 10 to 13 on Sundays.\n"
            "Q: When is it closed?\nA: It is closed in August and on 24 December.\n"
            "Q: Who owns the shop?\nA: The famous Rodríguez family has owned it since ancient times, they claim.\n"
            "Q: What does the text say?\nA: The mill shop opens every day.\n"
        )
    if "Deliveries" in text:
        return "1. **Question:** How much do deliveries cost?\n**Answer:** Deliveries cost 3 euros.\n\nQ: Without an answer?"
    return "NOTHING"


def test_document_questions_are_traceable_and_grounded() -> None:
    docs = folder(shop_md=SHOP, poem_txt="The river runs below the wheel and the wheel turns all the night long.")
    with scripted_teacher(qa_script) as server:
        values = {
            "teacher": server.url,
            **SERVED,
            "documents": docs,
            "document_licence": "CC-BY-4.0",
            "max_paragraph": 30,
            "held_out": 0.0,
        }
        made = make("document_questions", values, "asked")
        check_dataset(made)
        assert all(
            "Where it stands: The mill shop > " in r["messages"][0]["content"]
            for r in server.requests
            if "mill shop >" in str(r)
        )
    row = source(made, "documents")
    assert row["removed"] == {"nothing_asked": 1, "number": 1, "ungrounded": 1, "refers_to_text": 1}
    assert row["documents_in"] == 6
    assert row["licence"] == "apache-2.0 AND CC-BY-4.0"
    for one in rows_of(made):
        text = Path("docs", one["made"]["file"]).read_text()
        paragraph = text[one["made"]["start"] : one["made"]["end"]]
        assert set(re.findall(r"\d+", one["messages"][1]["content"])) <= set(re.findall(r"\d+", paragraph))
        assert one["made"]["headings"][0] == "The mill shop"
    listed = [row for _, row in read_rows(made.path / "paragraphs.jsonl")]
    assert [one["questions"] for one in listed] == [0, 1, 1]
    names = {one["name"] for one in made.inputs if one["relation"] == "contains"}
    assert names == {"documents/shop.md", "documents/poem.txt"}


def test_documents_without_a_teacher() -> None:
    docs = folder(
        shop_md=SHOP,
        tienda_md="# La tienda\n\n## Horario\n\nLa tienda abre todos los días de 9 a 18 horas, menos en agosto.\n",
    )
    made = make("document_questions", {"documents": docs, "held_out": 0.0, "max_paragraph": 30}, "asked")
    check_dataset(made)
    chats = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows_of(made)}
    assert chats["What is there to know about Deliveries?"].startswith("Deliveries leave on Tuesday")
    assert chats["¿Qué hay que saber sobre Horario?"].startswith("La tienda abre")
    assert made.passport["data"]["synthetic_share"] == "0.0"
    assert not any(one["relation"] == "outputs_of" for one in made.inputs)


def test_questions_with_their_context() -> None:
    with scripted_teacher(qa_script) as server:
        values = {
            "teacher": server.url,
            **SERVED,
            "documents": folder(shop_md=SHOP),
            "with_context": True,
            "max_paragraph": 30,
            "held_out": 0.0,
        }
        made = make("document_questions", values, "asked")
    asked = [row["messages"][0]["content"] for row in rows_of(made)]
    assert all("\n\nContext:\n" in one for one in asked)
    assert any(one.startswith("What does the text say?") for one in asked), "here it may speak of the text"


def test_parse_questions() -> None:
    assert parse("P: ¿Qué?\nR: Eso.\nY más.\n\n2) Pregunta 2: ¿Y?\nRespuesta 2: No.") == [
        ("¿Qué?", "Eso.\nY más."),
        ("¿Y?", "No."),
    ]
    assert parse("A: alone\nQ: one\nQ: two\nA: yes") == [("two", "yes")]
    assert first_sentences("One two three. Four five. Six.", 5) == "One two three. Four five."
    assert (
        plain("- **Bold** and [a link](http://x) in `code`\n- next_name *so*") == "Bold and a link in code next_name so"
    )


# -- bad input, kills, recipes ----------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli._run(list(words)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["self-instruct", "--teacher", "nobody"], "no such model 'nobody'"),
        (["self-instruct", "--teacher", "http://localhost:1/v1", "--teacher_model", "m", "--teacher_licence", "openai-terms"], "compete"),
        (["self-instruct", "--teacher", "http://localhost:1/v1", "--teacher_model", "m", "--teacher_licence", "llama2", "--student", "mit"],
         "same family"),
        (["self-instruct", "--teacher", "x", "--languages", "fr"], "en and es"),
        (["self-instruct", "--teacher", "x", "--most_alike", "2"], "most_alike"),
        (["self-instruct", "--teacher", "x", "--tasks", "0"], "tasks must be at least 1"),
        (["self-instruct", "--teacher", "x", "--seeds", "none.jsonl"], "none.jsonl"),
        (["self-instruct"], "TEACHER must be given"),
        (["evol-instruct", "--teacher", "x", "--rounds", "0"], "rounds"),
        (["evol-instruct", "--teacher", "x", "--operators", "widen"], "choose from constraints"),
        (["clean-chats", "none.json", "--data_licence", "MIT"], "no such file"),
        (["clean-chats", "one.json"], "'data_licence' must be given"),
        (["clean-chats", "one.json", "--data_licence", "MIT", "--base", "nobody"], "no such model"),
        (["clean-chats", "one.json", "--data_licence", "MIT", "--context", "-1", "--base", "student"], "context must be positive"),
        (["documents", "none"], "no such file or folder"),
        (["documents", "docs", "--kinds", "poetry"], "choose from closed_qa"),
        (["documents", "docs", "--min_paragraph", "500", "--max_paragraph", "600"], "no paragraph of 500 words"),
        (["judge", "none.jsonl", "--a", "student", "--teacher", "student"], "none.jsonl"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    tiny.base(Path("student"))
    folder(shop_md=SHOP)
    Path("one.json").write_text(json.dumps([conversation(ASKED, SAID)]))
    before = sorted(here.rglob("*"))
    assert said in refused(capsys, "synth", *words, "--out", "new")
    assert sorted(here.rglob("*")) == before, "nothing is left behind"


def hangs(_text: str, _n: int) -> str:
    time.sleep(0.6)
    return "late"


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (hangs, ["--timeout", "0.1"], "requests in a row had no answer (the last: timeout); the 0 answers so far are kept"),
        (lambda *_: (200, {}, b"<html>busy</html>"), [], "requests in a row had no answer (the last: malformed)"),
        (lambda *_: "As a language model, I like this one.", [], "not one usable task in"),
        (tasks_script, ["--price_in", "1", "--price_out", "1e6", "--budget", "0.5"], "the budget of 0.5 does not cover another"),
    ],
    ids=["times out", "no chat completions", "no tasks", "too dear"],
)  # fmt: skip
def test_a_bad_teacher_is_one_line(
    script: Callable[[str, int], Any], flags: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("criadero.synth.teacher._sleep", lambda _: None)
    monkeypatch.setattr("criadero.synth.teacher.TRIES", 1)
    with scripted_teacher(script) as server:
        words = ["self-instruct", "--teacher", server.url, "--teacher_model", "m", "--teacher_licence", "mit"]
        assert said in refused(capsys, "synth", *words, "--out", "new", *flags)
    assert not Path("new").exists()


def test_what_dies_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between any two answers, the same command makes the same dataset, and no answer is asked for twice."""

    class Killed(BaseException):
        pass

    def dying(script: Callable[[str, int], Any], after: int) -> Callable[[str, int], Any]:
        return lambda text, n: script(text, n) if n < after else (500, {}, b"{}")

    monkeypatch.setattr("criadero.synth.teacher._sleep", lambda _: None)
    monkeypatch.setattr("criadero.synth.teacher.TRIES", 1)
    monkeypatch.setattr("criadero.synth.teacher.GIVE_UP", 1)
    data = write_tasks("What is a mill?", "What is a wheel?", "What is a river?")
    values = {**SERVED, "data": data, "rounds": 2, "concurrency": 1, "held_out": 0.0}
    state = {"after": 4}
    with scripted_teacher(lambda text, n: dying(evol_script, state["after"])(text, n)) as server:
        for after in (4, 9):
            state["after"] = after
            with pytest.raises(UserError, match="run the same again to go on"):
                make("evol_instruct", {"teacher": server.url, **values}, "evolved")
            assert not Path("evolved").exists()
        state["after"] = 10**6
        made = make("evol_instruct", {"teacher": server.url, **values}, "evolved")
        assert len(server.requests) == 3 * 3 * 2 + 2, "each once, and the two that failed"
    assert source(made, "evol_instruct")["documents_out"] == 6


def test_run_skips_what_an_endpoint_made() -> None:
    Path("recipes").mkdir()
    with scripted_teacher(tasks_script) as server:
        Path("recipes/01-tasks.toml").write_text(
            f'stage = "self_instruct"\nteacher = "{server.url}"\nteacher_model = "m"\nteacher_licence = "mit"\n'
            'tasks = 4\nper_request = 5\nlanguages = ["en"]\n'
        )
        said: list[str] = []
        run("recipes", out="out", say=said.append)
        run("recipes", out="out", say=said.append)
    assert "up to date" in said[-1]


@pytest.mark.slow
def test_learned_from_end_to_end() -> None:
    """What was made is tuned on, and the licence of the teacher is found along the lineage of the result."""
    from criadero.trust.licences import check

    with create(Path("student"), kind="base", config={}, licence="Apache-2.0") as draft:
        tiny.base(draft.path)
    with scripted_teacher(qa_script) as server:
        values = {
            **SERVED,
            "teacher_licence": "llama3.1",
            "documents": folder(shop_md=SHOP),
            "max_paragraph": 30,
            "held_out": 0.0,
        }
        make("document_questions", {"teacher": server.url, **values}, "asked")
    tuned = make(
        "sft", {"base": "student", "data": "asked", "epochs": 1.0, "dtype": "float32", "held_out_share": 0.0}, "tuned"
    )
    findings = check(tuned.path).findings
    assert any(one.rule == "name-prefix" and one.source == "scripted" for one in findings), (
        "answers of Llama 3.1 ask for its name"
    )
    assert open_artifact("tuned").lineage().count("scripted")
