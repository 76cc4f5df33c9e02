"""Chats: ids against transformers, masks against hand-made ones, templates that misbehave."""

from __future__ import annotations

import itertools
import json
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_tokenizer import read

from criadero.chat import BUILTIN, Example, Message, Template, builtin_template, load_template, render
from criadero.errors import UserError
from criadero.tokenizer import SPECIAL, Tokenizer, load_tokenizer, train_bpe

TEXTS = [
    "The llama walks up the hill, and the little llama walks behind her.",
    "La llama sube al cerro; ¿quién sube con ella? ¡El niño, mañana!",
] * 3
SYSTEM, QUESTION, ANSWER = "You are kind.", "¿Qué es una llama?", "A llama 🦙 is an animal."
SECOND, LAST = "And 2+2?", "It is 4."


def say(*contents: str, system: str | None = SYSTEM) -> list[Message]:
    roles: Any = itertools.cycle(["user", "assistant"])
    chat: list[Message] = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system is not None else []) + chat


CHATS = [
    say("Hola", "Hola.", system=None),
    say(QUESTION, ANSWER),
    say(QUESTION, ANSWER, SECOND, LAST),
    say("  spaces around \n", " (yes) ", "\n\ntwo\n\n\nlines\n", "3 apples\tand  12345 pears"),
    say(
        "日本語 👩‍👩‍👧 cafe\u0301",
        "¡Sí!",
        "مرحبا",
        "“quoted”",
        "x",
        "- a\n- b\n\n```\ncode\n```",
        system="  Sé breve.  ",
    ),
]


@cache
def own() -> Tokenizer:
    return train_bpe(TEXTS, 320, (*SPECIAL, "<|im_start|>", "<|im_end|>"))


@pytest.fixture(scope="session")
def llama2(shared: Path) -> Tokenizer:
    return read(shared / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="session")
def llama3(shared: Path) -> Tokenizer:
    return read(shared / "tokenizers/llama3/models__llama3__tokenizer.model")


PAIRS = [
    *((name, "own") for name in BUILTIN if name != "llama3"),
    *((name, "llama2") for name in ("llama2", "alpaca", "vicuna")),
    *((name, "llama3") for name in ("llama3", "llama2", "alpaca", "vicuna")),
]


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return own() if request.param == "own" else request.getfixturevalue(request.param)


pairs = pytest.mark.parametrize(("name", "tokenizer"), PAIRS, indirect=["tokenizer"])


def learned(example: Example, tokenizer: Tokenizer) -> list[str]:
    """The text of each run of learned tokens."""
    runs = itertools.groupby(zip(example.ids, example.loss_mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([id for id, _ in run], skip_special=False, continues=True) for mask, run in runs if mask]


def whole(example: Example, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(example.ids, skip_special=False, continues=True)


# --- what the templates write ---

GOLDEN = {
    "criadero": "<|bos|><|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|><|user|>V<|end|><|assistant|>B<|end|>",
    "chatml": "<|bos|><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    # Meta's llama/generation.py, chat_completion
    "llama2": "<|bos|>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A <|eos|><|bos|>[INST] V [/INST] B <|eos|>",
    # FastChat's conversation.py, vicuna_v1.1
    "vicuna": "<|bos|>S USER: U ASSISTANT: A<|eos|>USER: V ASSISTANT: B<|eos|>",
    "alpaca": "<|bos|>S\n\n### Instruction:\nU\n\n### Response:\nA<|eos|>\n\n### Instruction:\nV\n\n### Response:\nB<|eos|>",
}
ENDS = {"criadero": "<|end|>", "chatml": "<|im_end|>", "llama2": " <|eos|>", "vicuna": "<|eos|>", "alpaca": "<|eos|>"}
LEADS = {"llama2": " ", "vicuna": " "}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text_and_mask(name):
    chat = say("U", "A", "V", "B", system="S")
    example = render(chat, own(), builtin_template(name))
    assert whole(example, own()) == GOLDEN[name]
    lead, end = LEADS.get(name, ""), ENDS[name]
    assert learned(example, own()) == [f"{lead}A{end}", f"{lead}B{end}"]
    assert learned(render(chat, own(), builtin_template(name), train_on="last"), own()) == [f"{lead}B{end}"]
    assert example.bos == "template"
    prompt = render(chat[:-1], own(), builtin_template(name), add_generation_prompt=True)
    assert whole(prompt, own()) == GOLDEN[name][: GOLDEN[name].rindex(f"{lead}B{end}")]


def test_golden_ids_and_mask_of_our_own_template():
    special = own().special
    one, two = own().encode("Hola?"), own().encode("Sí.")
    example = render(say("Hola?", "Sí.", system=None), own(), builtin_template("criadero"))
    head = [special["<|bos|>"], special["<|user|>"], *one, special["<|end|>"], special["<|assistant|>"]]
    assert example.ids == [*head, *two, special["<|end|>"]]
    assert example.loss_mask == [False] * len(head) + [True] * (len(two) + 1)


def test_llama3_as_meta_documents_it(llama3, shared):
    page = (shared / "tokenizers/llama3_prompt_format/models__llama3_1__prompt_format.md").read_text()
    section = page[page.index("## User and assistant conversation") :]
    prompt, answer = (part.split("```")[0].lstrip("\n") for part in section.split("```\n")[1:4:2])
    chat = say("Answer who are you in the form of jeopardy?", system="You are a helpful assistant")
    ours = render(chat, llama3, builtin_template("llama3"), add_generation_prompt=True)
    assert whole(ours, llama3) == prompt.rstrip("\n") + "\n\n"
    chat.append({"role": "assistant", "content": answer.strip().removesuffix("<|eot_id|>")})
    example = render(chat, llama3, builtin_template("llama3"))
    assert learned(example, llama3) == [answer.strip()]
    assert example.ids[-1] == llama3.special["<|eot_id|>"]
    assert example.ids[: len(ours.ids)] == ours.ids


def test_llama2_encodes_each_turn_as_meta_does(llama2, shared):
    """Meta's generation.py encodes each exchange by itself and joins the ids."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(shared / "tokenizers/llama2/tokenizer.model"))
    example = render(say(QUESTION, ANSWER, SECOND, LAST), llama2, builtin_template("llama2"))
    first = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST] {ANSWER} "
    assert example.ids == [1, *reference.encode(first), 2, 1, *reference.encode(f"[INST] {SECOND} [/INST] {LAST} "), 2]


# --- equal to transformers ---


@cache
def theirs_of(tokenizer: Tokenizer) -> Any:
    """The same tokenizer in transformers."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        return AutoTokenizer.from_pretrained(folder)


@pairs
def test_ids_are_those_of_transformers(name, tokenizer):
    template, theirs = builtin_template(name), theirs_of(tokenizer)
    how = {"chat_template": template.source, "return_dict": False}
    for chat in CHATS:
        assert render(chat, tokenizer, template).ids == theirs.apply_chat_template(chat, **how)
        expected = theirs.apply_chat_template(chat[:-1], add_generation_prompt=True, **how)
        assert render(chat[:-1], tokenizer, template, add_generation_prompt=True).ids == expected


@pytest.mark.parametrize(
    "file",
    [
        "meta-llama-Llama-3.1-8B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct",
        "meta-llama-Llama-3.3-70B-Instruct",
    ],
)
def test_metas_own_templates(llama3, shared, file):
    """Programs of others, so they run in the helper process."""
    source = (shared / f"tokenizers/llama_cpp_vocab_tests/{file}.jinja").read_text()
    template, theirs = Template(source, file), theirs_of(llama3)
    for chat in CHATS:
        example = render(chat, llama3, template)
        assert example.ids == theirs.apply_chat_template(chat, chat_template=source, return_dict=False)
        answers = [message["content"].strip() + "<|eot_id|>" for message in chat if message["role"] == "assistant"]
        assert learned(example, llama3) == answers


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_metaspace_tokenizers(llama2, tmp_path, scheme):
    """Newer files of Llama 2 put the space only before the whole text, not after special tokens."""
    from transformers import PreTrainedTokenizerFast

    llama2.save(tmp_path, chat_template=builtin_template("llama2").source)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_text()) | {"normalizer": None}
    description["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    file.write_text(json.dumps(description))
    theirs, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for chat in CHATS:
        expected = theirs.apply_chat_template(chat, return_dict=False)
        assert render(chat, ours, load_template(tmp_path)).ids == expected


def test_tokens_that_swallow_white_space(tmp_path):
    """Added tokens with rstrip and lstrip, as Phi 3 has them."""
    from transformers import AutoTokenizer

    own().save(tmp_path, chat_template=builtin_template("chatml").source)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_text())
    for token in description["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_end|>"
        token["lstrip"] = token["content"] == "<|im_start|>"
    file.write_text(json.dumps(description))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for chat in CHATS:
        example = render(chat, ours, load_template(tmp_path))
        assert example.ids == theirs.apply_chat_template(chat, return_dict=False)


def test_generation_tags_decide(tmp_path):
    from transformers import AutoTokenizer

    source = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|end|>' }}{% endif %}{% endfor %}"
    )
    own().save(tmp_path, chat_template=source)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for chat in CHATS:
        example = render(chat, own(), load_template(tmp_path))
        expected = theirs.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
        assert example.ids == expected["input_ids"]
        assert example.loss_mask == [mask == 1 for mask in expected["assistant_masks"]]
        assert example == render(chat, own(), builtin_template("criadero"))
    last = render(CHATS[2], own(), load_template(tmp_path), train_on="last")
    assert learned(last, own()) == [LAST + "<|end|>"]


# --- properties ---


@pairs
def test_prompts_are_prefixes_and_masks_are_answers(name, tokenizer):
    template = builtin_template(name)
    for chat in CHATS:
        example = render(chat, tokenizer, template)
        prompt = render(chat[:-1], tokenizer, template, add_generation_prompt=True)
        assert example.ids[: len(prompt.ids)] == prompt.ids
        assert all(example.loss_mask[len(prompt.ids) :]) or name == "chatml"  # its last newline is not learned
        assert not any(render(chat, tokenizer, template, train_on="last").loss_mask[: len(prompt.ids)])
        strip = name != "criadero"
        answers = [m["content"].strip() if strip else m["content"] for m in chat if m["role"] == "assistant"]
        runs = learned(example, tokenizer)
        ends = {tokenizer.special[e] for e in ("<|end|>", "<|im_end|>", "<|eot_id|>") if e in tokenizer.special}
        ends.add(tokenizer.eos_id)
        assert len(runs) == len(answers)
        for run, answer in zip(runs, answers, strict=True):
            body, end = next((run.removesuffix(e), e) for e in tokenizer.special if run.endswith(e))
            assert body.strip() == answer.strip()
            assert tokenizer.special[end] in ends
        if tokenizer.bos_id is not None and name != "llama2":
            assert example.ids.count(tokenizer.bos_id) == 1


plain = st.one_of(
    st.text(min_size=1, max_size=20),
    st.lists(
        st.sampled_from([*SPECIAL, "</s>", "<s>", "<|eot_id|>", "ll", " ", "\n", "ñ", "🦙", "\x00"]), min_size=1
    ).map("".join),
).filter(
    lambda content: content.strip() and not any(tag in content for tag in ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"))
)


@pairs
def test_any_content_is_text(name, tokenizer):
    template = builtin_template(name)
    count = {
        id: render(say("U", "A", "V", "B"), tokenizer, template).ids.count(id) for id in tokenizer.special.values()
    }
    unknown = tokenizer.special.get("<unk>")

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(plain, min_size=4, max_size=4), plain)
    def check(contents: list[str], system: str) -> None:
        example = render(say(*contents, system=system), tokenizer, template)
        assert {id: example.ids.count(id) for id in count if id != unknown} == {
            id: n for id, n in count.items() if id != unknown
        }
        text = tokenizer.decode(example.ids, skip_special=False, continues=True)
        for content in [system, *contents]:
            assert content.strip().replace("▁", " ") in text
        prompt = render(say(*contents, system=system)[:-1], tokenizer, template, add_generation_prompt=True)
        if contents[-1].strip()[:1].isalnum() or name in ("criadero", "llama3", "chatml", "alpaca"):
            assert example.ids[: len(prompt.ids)] == prompt.ids

    check()


def test_content_that_holds_the_marks():
    strange = "\U000f5ff0\U000f5ff00\U000f5ff1\U000f5ff1"
    example = render(say(strange, strange), own(), builtin_template("criadero"))
    assert learned(example, own()) == [strange + "<|end|>"]
    example = render(say("\U000f5ffa", "\U000f5ffb\U000f5ffa"), own(), builtin_template("criadero"))
    assert learned(example, own()) == ["\U000f5ffb\U000f5ffa<|end|>"]
    tags = Template(builtin_template("criadero").source + "{% generation %}{% endgeneration %}", "tags")
    refuses(say("\U000f5ffa"), tags, r"U\+F5FFA")


def test_surrogates_are_mended():
    example = render(say("a\ud83d", "\ud83d\ude00 b"), own(), builtin_template("criadero"))
    assert learned(example, own()) == ["😀 b<|end|>"]


# --- BOS ---


def test_bos_is_there_once(tmp_path):
    template = builtin_template("criadero")
    expected = render(CHATS[1], own(), template)
    without = Template(template.source.replace("bos_token", "''", 1), "without")
    example = render(CHATS[1], own(), without)
    assert (example.ids, example.loss_mask, example.bos) == (expected.ids, expected.loss_mask, "added")
    twice = Template(template.source.replace("bos_token", "bos_token + bos_token", 1), "twice")
    example = render(CHATS[1], own(), twice)
    assert (example.ids, example.loss_mask, example.bos) == (expected.ids, expected.loss_mask, "doubled")
    own().save(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    example = render(CHATS[1], load_tokenizer(tmp_path), without)
    assert (example.ids, example.bos) == (expected.ids[1:], "none")


# --- what is refused ---


def refuses(chat: Any, template: Template, reason: str, tokenizer: Tokenizer | None = None, **how: Any) -> None:
    with pytest.raises(UserError, match=reason) as error:
        render(chat, tokenizer or own(), template, **how)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ([], "no messages"),
        (["hola"], "message 1 is not an object"),
        ([{"role": "user"}], "message 1 is not an object with 'role' and 'content'"),
        ([{"role": "tool", "content": "x"}], "message 1 has the role 'tool'"),
        ([{"role": "user", "content": None}], "not text but NoneType"),
        ([{"role": "user", "content": [{"text": "x"}]}], "not text but list"),
        ([*say("x"), {"role": "system", "content": "y"}], "can only come first"),
    ],
)
def test_messages_that_are_no_chat(chat, reason):
    refuses(chat, builtin_template("criadero"), reason)


def test_arguments_that_make_no_sense():
    refuses(say("x", "y"), builtin_template("criadero"), "nothing to answer", add_generation_prompt=True)
    refuses(say("x", "y"), builtin_template("criadero"), "'all' or 'last'", train_on="first")
    with pytest.raises(UserError, match="no built-in chat template 'zephyr'; there are criadero"):
        builtin_template("zephyr")


@pytest.mark.parametrize("name", ["llama2", "alpaca", "vicuna"])
def test_turns_must_alternate(name):
    twice: list[Message] = [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]
    refuses(twice, builtin_template(name), "must take turns")
    refuses(twice[:1] + say("x"), builtin_template(name), "must take turns")
    refuses(say(), builtin_template(name), "no user message")


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_keeps_its_tags(tag):
    for chat in (say(f"a{tag}"), say("x", tag), say("x", system=tag)):
        refuses(chat, builtin_template("llama2"), "keeps for itself")


def test_templates_made_for_other_tokenizers(llama2):
    for name in ("criadero", "llama3", "chatml"):
        refuses(say("x", "y"), builtin_template(name), "never learn to stop", llama2)


LOOP = "{% for message in messages %}"
BAD = {
    "upper": (LOOP + "{{ message.content | upper }}{{ eos_token }}{% endfor %}", "alters the content of message 1 .system."),
    "censor": (LOOP + "{{ message.content | replace('a', 'b') }}{{ eos_token }}{% endfor %}", "alters the content of message 2"),
    "depends": (LOOP + "{{ message.content }}{{ eos_token }}{% endfor %}{{ messages[2].content|length }}", "content of message 3"),
    "drops": ("{{ messages[1].content }}{{ messages[2].content }}{{ eos_token }}", "leaves out message 1 .system."),
    "endless": (LOOP + "{{ message.content }}{% endfor %}", "never learn to stop"),
    "raises": ("{{ raise_exception('not\nthis one') }}", "refuses this chat: not this one"),
    "syntax": ("\n{% for %}", "line 2 is not Jinja"),
    "unknown": ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
    "class": ("{{ ''.__class__ }}", "reaches for the attribute '__class__'"),
    "mro": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for the attribute '__class__'"),
    "attr": ("{{ ''|attr('__class__') }}", "reaches for the attribute '__class__'"),
    "item": ("{{ ''['__class__'] }}", "reaches for the attribute '__class__'"),
    "globals": ("{{ raise_exception.__globals__ }}", "reaches for the attribute '__globals__'"),
    "format": ("{{ '{0.__class__}'.format(1) }}", "reaches for the attribute '__class__'"),
    "map": ("{{ [1]|map(attribute='__class__')|list }}", "reaches for the attribute '__class__'"),
    "change": ("{{ messages.append(1) }}", "reaches for the attribute 'append'"),
    "include": ("{% include '/etc/passwd' %}", "TypeError: no loader"),
    "long": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "writes more than 16,000,000 characters"),
    "memory": ("{{ 'x' * 10**10 }}", "memory"),
    "range": ("{{ range(10**9) | list }}", "OverflowError"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_templates_that_misbehave(name):
    source, reason = BAD[name]
    refuses(say("banana", "a cabana", system="x"), Template(source, "bad"), reason)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{% for i in range(99999) %}{{ f() if i > 1 }}{% endfor %}{% endmacro %}{{ 9**(9**9) }}",
    ],
)
def test_templates_that_loop_are_stopped(source, monkeypatch):
    monkeypatch.setattr("criadero.template_sandbox._ask.__defaults__", (0.5,))
    refuses(say("x", "y"), Template(source, "loops"), "runs for more than 0.5 seconds")
    good = Template(builtin_template("criadero").source + "{# not built in #}", "good")
    assert render(say("x", "y"), own(), good) == render(say("x", "y"), own(), builtin_template("criadero"))


def test_threads_share_the_helper():
    good = Template(builtin_template("criadero").source + "{# not built in #}", "good")
    chats = [say(f"question {n}", f"answer {n}" * n) for n in range(1, 40)]
    results: dict[int, Example] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: render(chats[n], own(), good)}))
        for n in range(len(chats))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, chat in enumerate(chats):
        assert results[n] == render(chat, own(), builtin_template("criadero"))


def test_helpers_of_hugging_face():
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 2 %}{% break %}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{{ {'a': 'ñ<'} | tojson }}{{ strftime_now('%Y') | length }}"
        "{{ tools is none }}{{ pad_token }}"
    )
    example = render(say("x", "y", system=None), own(), Template(source, "helpers"))
    assert whole(example, own()) == '<|bos|>x<|eos|>y<|eos|>{"a": "ñ<"}4True<|pad|>'


# --- files ---


def test_load_template(tmp_path):
    with pytest.raises(UserError, match=r"has no chat template: it is a base model.* tune it with a template") as error:
        load_template(tmp_path)
    assert "\n" not in str(error.value)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    with pytest.raises(UserError, match="has no chat template"):
        load_template(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(tmp_path)
    config.write_text('{"chat_template": "one"}')
    assert load_template(tmp_path).source == "one"
    config.write_text(
        '{"chat_template": [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]}'
    )
    assert load_template(tmp_path).source == "b"
    own().save(tmp_path, chat_template=builtin_template("criadero").source)
    assert load_template(tmp_path).source == builtin_template("criadero").source
    config.write_text("{}")
    assert load_template(tmp_path).source == builtin_template("criadero").source
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="cannot be read"):
        load_template(tmp_path)
