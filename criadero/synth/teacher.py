"""Teachers: who answers when a dataset is made. An OpenAI-compatible endpoint, a model of our own, or a file of recorded answers.

Every answer is kept on disk by the hash of its request, so a request is paid for once: a stage that was killed or that ran out
of budget starts again from the beginning, finds its earlier answers, and goes on where it was. A key comes from the environment
only and is written nowhere. What an answer costs is counted before it is asked for, with the largest cost it may have, so that the
budget holds also with many requests under way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from criadero.artifact import Draft, Input, input_of, resolve
from criadero.errors import UserError
from criadero.recipe import digest
from criadero.synth.endpoint import Failed, is_local, post, redact

if TYPE_CHECKING:
    from criadero.chat import Message

FORMAT = "criadero-teacher/1"
TRIES = 5  # of one request
GIVE_UP = 6  # requests in a row without an answer
_sleep = time.sleep


def described(text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TeacherFields:
    """What every stage with a teacher asks for; the recipes of such stages extend it."""

    teacher: str = described(
        "who answers: the URL of an OpenAI-compatible endpoint (http://localhost:11434/v1), a bundled model or a folder, or a .jsonl of "
        "recorded answers"
    )
    teacher_model: str = described("the model's name at the endpoint", "")
    teacher_licence: str = described("licence or terms of its answers; default: what its passport declares", "")
    student: str = described(
        "the model that will learn from the answers, or its licence: some terms allow only their own family", ""
    )
    use: Literal["shared", "private"] = described(
        "what becomes of models trained on the answers; some terms forbid to share or sell them", "shared"
    )
    key_variable: str = described("the environment variable that holds the endpoint's key", "CRIADERO_TEACHER_KEY")
    price_in: float | None = described(
        "price of a million tokens of question; must be given for an endpoint elsewhere (0: free)", None
    )
    price_out: float | None = described("price of a million tokens of answer", None)
    budget: float = described("largest total cost, in the currency of the prices", 1.0)
    concurrency: int = described("requests at once to an endpoint", 4)
    timeout: float = described("seconds to wait for one answer", 120.0)


@dataclass(frozen=True, kw_only=True)
class TaughtFields(TeacherFields):
    """What the stages ask for whose dataset a teacher writes."""

    held_out: float = described("share of the chats held out; what comes from one task stays together", 0.1)
    licence: str = described("licence you give the dataset", "")
    seed: int = described("of the draws", 0)


@dataclass(frozen=True)
class Ask:
    """One request: the turns so far, and how to sample. ``seed`` lets the same question be asked for another answer."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0

    @property
    def key(self) -> str:
        """The name of the request, in 64 hexadecimal digits: equal for equal requests, whoever answers."""
        return digest([FORMAT, [list(turn) for turn in self.messages], *dataclasses.astuple(self)[1:]])[7:]

    def turns(self) -> list[Message]:
        return [{"role": role, "content": content} for role, content in self.messages]  # type: ignore[typeddict-item]

    @property
    def most_prompt_tokens(self) -> int:
        """An upper bound: a token has at least one byte, and a turn some tokens of its own."""
        return sum(len(content.encode()) + 16 for _, content in self.messages)


def ask(prompt: str, **sampling: Any) -> Ask:
    """A request of one turn."""
    return Ask((("user", prompt),), **sampling)


@dataclass(frozen=True)
class Answer:
    """What came back. `problem` says in a word why there is no text; `finish` is "stop", or "length" when it was cut off."""

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""


Send = Callable[[Ask], Answer]  # raises Failed
SendAll = Callable[
    [dict[str, Ask]], Iterator[tuple[str, Answer]]
]  # a batch by key; answers in the order they are ready


class Teacher:
    """Answers batches of requests, from the cache where it can. Made by :func:`open_teacher`."""

    def __init__(
        self, name: str, licence: str, made_by: Input, send: Send | None, cache: Path | None, *, prices: tuple[float, float] = (0.0, 0.0),
        budget: float = 0.0, concurrency: int = 1, known: dict[str, Answer] | None = None, extra_inputs: Sequence[Input] = (),
        send_all: SendAll | None = None,
    ) -> None:  # fmt: skip
        self.name, self.licence, self.made_by, self.extra_inputs = name, licence, made_by, tuple(extra_inputs)
        self._send, self._send_all, self._cache = send, send_all, cache
        self.prices, self.budget, self.concurrency = prices, budget, concurrency
        self._known: dict[str, Answer] = dict(known or {})
        self._lost: dict[str, list[Answer]] = {}  # attempts that failed and may have been charged, by request
        if cache is not None:
            self._known, self._lost = _read_cache(cache)
        self.counts: Counter[str] = Counter()
        self.cost = 0.0  # of all answers used, also of those that were paid for in an earlier run
        self.paid = 0.0  # in this run
        self._used: dict[str, Answer] = {}
        self._change = threading.Condition()
        self._told: set[str] = set()  # why requests were tried again
        self._written = False

    @property
    def inputs(self) -> list[Input]:
        return [self.made_by, *self.extra_inputs]

    # -- money ------------------------------------------------------------------------------------------------------

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prices[0] + completion_tokens * self.prices[1]) / 1e6

    def _count(self, key: str, answer: Answer, *, cached: bool) -> None:
        cost = self._price(answer.prompt_tokens, answer.completion_tokens)
        self.cost += cost
        self.paid += 0.0 if cached else cost
        self.counts["prompt_tokens"] += answer.prompt_tokens
        self.counts["completion_tokens"] += answer.completion_tokens
        if answer.problem:
            self.counts["unanswered"] += 1
        else:
            self.counts["cached" if cached else "answered"] += 1
            self._used[key] = answer

    # -- asking -----------------------------------------------------------------------------------------------------

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """The answers, in the order of the requests. One without an answer has its `problem` said.

        UserError: the budget is spent, the endpoint refuses us, or it does not answer at all. What was answered is kept.
        """
        waiting: dict[str, Ask] = {}
        for one in asks:
            key = one.key
            self.counts["requests"] += 1
            if key in self._used or key in waiting:
                continue
            for lost in self._lost.pop(key, ()):
                self._count(key, lost, cached=True)
            if key in self._known:
                self._count(key, self._known[key], cached=True)
            else:
                waiting[key] = one
        failed = self._ask_all(waiting) if waiting else {}
        return [self._used.get(one.key) or failed[one.key] for one in asks]

    def _ask_all(self, waiting: dict[str, Ask]) -> dict[str, Answer]:
        if self._send_all is not None:
            failed = {}
            for key, answer in self._send_all(waiting):
                if answer.problem:
                    failed[key] = answer
                    continue
                self._count(key, answer, cached=False)
                self._write(key, answer)
            return failed
        if self._send is None:
            raise UserError(
                f"{self.name}: {len(waiting)} of these requests have no recorded answer: it was recorded with other settings; "
                "set them back, or name a teacher that answers"
            )
        work = _Work(self, waiting)
        threads = [
            threading.Thread(target=work.run, daemon=True) for _ in range(min(self.concurrency, len(waiting)) - 1)
        ]
        for thread in threads:
            thread.start()
        try:
            work.run()  # with one at a time everything stays in this thread
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            work.stop = work.stop or KeyboardInterrupt()
            if threads:
                say(
                    "stopping: waiting for the answers that are under way, so that they are not lost; Ctrl-C again to leave them"
                )
                for thread in threads:
                    thread.join()
            raise
        if isinstance(work.stop, UserError):
            raise work.stop
        return work.failed

    def _attempt(self, key: str, one: Ask) -> Answer:
        """Ask until there is an answer, or a reason not to go on; write it down."""
        assert self._send is not None
        for attempt in range(TRIES):
            try:
                answer = self._send(one)
                break
            except Failed as error:
                if error.fatal:
                    raise
                if error.charged:  # it may have been answered and charged: counted at the most it can be
                    lost = Answer("", "", one.most_prompt_tokens, one.max_tokens, error.reason)
                    with self._change:
                        self._count(key, lost, cached=False)
                        self._write(key, lost)
                        over = self.cost > self.budget and any(self.prices)
                    if over:
                        raise Failed(f"{error}; what it may have cost is more than the budget", fatal=True) from None
                if attempt + 1 == TRIES or not error.again:
                    return Answer("", problem=error.reason)
                with self._change:
                    self.counts["tried_again"] += 1
                    told, self._told = error.reason in self._told, self._told | {error.reason}
                if not told:  # once of a kind: tries with long waits between them would look like a run that hangs
                    say(f"{self.name}: {error}; tried again, at most {TRIES} times a request")
                # twice as long each time, and never two clients in step
                _sleep(error.wait if error.wait is not None else min(2.0**attempt, 30) * (0.5 + random.random()))
        with self._change:
            self._count(key, answer, cached=False)
            self._write(key, answer)
        return answer

    # -- the record -------------------------------------------------------------------------------------------------

    def _write(self, key: str, answer: Answer) -> None:
        if self._cache is None:
            return
        self._cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        head = ""
        if not self._written:  # a line that a kill cut short must not spoil the next one
            head = "\n" if self._cache.exists() and self._cache.stat().st_size else _line(self._header())
        self._written = True
        # one write, so that a kill leaves at most a last line cut short, which reading leaves out
        data = (head + _line({"key": key, **dataclasses.asdict(answer)})).encode()
        handle = os.open(self._cache, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _header(self) -> dict[str, Any]:
        where = self.made_by.locator or ""
        return {
            "format": FORMAT, "teacher": self.made_by.name, "licence": self.licence, "id": self.made_by.id,
            "locator": where if "://" in where else f"recorded://{self.made_by.name}",
        }  # fmt: skip

    def write_recording(self, path: Path) -> None:
        """The answers that were used, with their requests' hashes: a teacher for whoever makes the dataset again."""
        rows = [{"key": key, **dataclasses.asdict(answer)} for key, answer in self._used.items()]
        path.write_text(_line(self._header()) + "".join(map(_line, rows)), encoding="utf-8")

    def record(self, draft: Draft, terms: Sequence[str]) -> None:
        """Put into the dataset to be what was asked, what came back, what it cost, and under which terms; say it in a line."""
        self.write_recording(draft.path / "answers.jsonl")
        draft.step["teacher"] = self.report() | {"terms": list(terms)}
        say(self.summary())

    def report(self) -> dict[str, Any]:
        """Counts and costs, for the passport."""
        return {
            "teacher": self.made_by.name, "licence": self.licence, **dict(sorted(self.counts.items())),
            "cost": round(self.cost, 6), "paid_in_this_run": round(self.paid, 6), "price_in": self.prices[0], "price_out": self.prices[1],
        }  # fmt: skip

    def summary(self) -> str:
        """Counts and cost in a line."""
        c = self.counts
        parts = [f"{c['requests']} requests", f"{c['answered']} answered now", f"{c['cached']} from the cache"]
        parts += [f"{c['unanswered']} unanswered"] if c["unanswered"] else []
        parts += [f"{c['tried_again']} tried again"] if c["tried_again"] else []
        parts += [f"cost {self.cost:.4f} ({self.paid:.4f} now)"] if any(self.prices) else []
        return f"{self.name}: " + ", ".join(parts)


class _Work:
    """The requests of one batch, shared by the threads that ask."""

    def __init__(self, teacher: Teacher, waiting: dict[str, Ask]) -> None:
        self.teacher = teacher
        self.todo = deque(waiting.items())
        self.failed: dict[str, Answer] = {}
        self.reserved = 0.0
        self.stop: BaseException | None = None

    def run(self) -> None:
        teacher, change = self.teacher, self.teacher._change
        while (taken := self._take()) is not None:
            key, one, reserved = taken
            answer = Answer("", problem="stopped")
            try:
                answer = teacher._attempt(key, one)
            except Failed as error:
                self.stop = self.stop or UserError(f"{teacher.name}: {error}; {self._kept()}")
            except UserError as error:
                self.stop = self.stop or error
            except BaseException as error:
                self.stop = self.stop or error
                raise
            finally:
                with change:
                    self.reserved -= reserved
                    if answer.problem and answer.problem != "stopped":
                        self.failed[key] = answer
                        teacher.counts["in_a_row"] += 1
                        if teacher.counts["in_a_row"] >= GIVE_UP and not self.stop:
                            self.stop = UserError(
                                f"{teacher.name}: {GIVE_UP} requests in a row had no answer (the last: {answer.problem}); {self._kept()}"
                            )
                    elif not answer.problem:
                        del teacher.counts["in_a_row"]
                    change.notify_all()

    def _take(self) -> tuple[str, Ask, float] | None:
        teacher, change = self.teacher, self.teacher._change
        with change:
            while self.todo and self.stop is None:
                key, one = self.todo[0]
                most = teacher._price(one.most_prompt_tokens, one.max_tokens)
                if not any(teacher.prices) or teacher.cost + self.reserved + most <= teacher.budget:
                    self.todo.popleft()
                    self.reserved += most
                    return key, one, most
                if self.reserved:
                    change.wait()  # an answer may turn out cheaper than what was set aside for it
                    continue
                self.stop = UserError(
                    f"{teacher.name}: the budget of {teacher.budget:g} does not cover another request: {teacher.cost:.4f} is spent, and "
                    f"the next may cost {most:.4f}; {self._kept()}, with a larger --budget"
                )
            return None

    def _kept(self) -> str:
        c = self.teacher.counts
        return f"the {c['answered'] + c['cached']} answers so far are kept: run the same again to go on"


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def say(text: str) -> None:
    """A line on stderr, in the way of the stages that train."""
    from criadero.train import progress

    progress.say(text)


# -- opening ----------------------------------------------------------------------------------------------------------


def open_teacher(recipe: TeacherFields) -> Teacher:
    """The teacher that a recipe names, its terms not yet looked at: see :func:`criadero.synth.terms.check_terms`."""
    if recipe.concurrency < 1 or recipe.concurrency > 256:
        raise UserError(f"concurrency must be from 1 to 256, not {recipe.concurrency}")
    if not recipe.timeout > 0:
        raise UserError(f"timeout must be positive, not {recipe.timeout:g}")
    if recipe.budget < 0 or (recipe.price_in or 0) < 0 or (recipe.price_out or 0) < 0:
        raise UserError("budget, price_in and price_out must not be negative")
    if "://" in recipe.teacher:
        return _endpoint_teacher(recipe)
    if recipe.teacher.endswith(".jsonl"):
        return _recorded_teacher(recipe)
    return _local_teacher(recipe)


def _endpoint_teacher(recipe: TeacherFields) -> Teacher:
    url = recipe.teacher.rstrip("/").removesuffix("/chat/completions")
    key = os.environ.get(recipe.key_variable, "").strip()
    local = is_local(url, with_key=bool(key))
    if not recipe.teacher_model:
        raise UserError(f"{url}: teacher_model must be given: the model's name at this endpoint")
    if not recipe.teacher_licence:
        raise UserError(
            f"{url}: teacher_licence must be given: under which licence or terms its answers come (apache-2.0, llama3.1, openai-terms, ...)"
        )
    if not local and (recipe.price_in is None or recipe.price_out is None):
        raise UserError(
            f"{url}: price_in and price_out must be given, per million tokens (0 when it is free), so that the "
            f"budget of {recipe.budget:g} holds"
        )
    id = digest({"endpoint": url, "model": recipe.teacher_model})
    made_by = Input("outputs_of", id, recipe.teacher_model, recipe.teacher_licence, url)

    def send(one: Ask) -> Answer:
        body = {
            "model": recipe.teacher_model, "messages": one.turns(), "max_tokens": one.max_tokens,
            "temperature": one.temperature, "top_p": one.top_p, "seed": one.seed, "stream": False,
        }  # fmt: skip
        reply = post(f"{url}/chat/completions", body, key=key, timeout=recipe.timeout)
        return _read_reply(reply, one)

    return Teacher(
        redact(f"{recipe.teacher_model} at {url}", key), recipe.teacher_licence, made_by, send, _cache_file(made_by.id),
        prices=(recipe.price_in or 0.0, recipe.price_out or 0.0), budget=recipe.budget, concurrency=recipe.concurrency,
    )  # fmt: skip


def _read_reply(reply: Any, one: Ask) -> Answer:
    """The first choice's text. Failed when the reply is not a chat completion; where it has no usage, upper bounds are counted."""
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        finish = choice.get("finish_reason") or "stop"
    except (KeyError, IndexError, TypeError):
        raise Failed("the reply is no chat completion", "malformed", charged=True) from None
    usage = reply.get("usage")
    said: list[Any] = (
        [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    )
    if len(said) == 2 and all(type(n) is int and 0 <= n < 10**9 for n in said):
        read, written = said[0], said[1]
    else:
        size = len(text.encode()) if isinstance(text, str) else one.max_tokens
        read, written = one.most_prompt_tokens, max(1, min(size, one.max_tokens))
    if not isinstance(text, str):
        text = ""  # paid for: an empty answer is an answer
    return Answer(text, "length" if finish == "length" else "stop", read, written)


def _local_teacher(recipe: TeacherFields) -> Teacher:
    made_by = input_of("outputs_of", recipe.teacher, licence=recipe.teacher_licence or None)
    if not made_by.licence:
        raise UserError(f"{recipe.teacher}: teacher_licence must be given: its passport declares none for the weights")
    return _local(recipe.teacher, made_by)


def _local(ref: str, made_by: Input) -> Teacher:
    """A model of our own: a batch's requests are computed together (a seed gives the same answer in any company)."""
    path = resolve(ref)
    llm: list[Any] = []  # loaded when there is something that the cache does not know

    def send_all(waiting: dict[str, Ask]) -> Iterator[tuple[str, Answer]]:
        from criadero.engine.llm import LLM
        from criadero.engine.request import SamplingParams

        if not llm:
            llm.append(LLM(path))
        engine, keys, texts = llm[0].engine, {}, {}
        for key, one in waiting.items():
            params = SamplingParams(
                max_tokens=one.max_tokens, temperature=one.temperature, top_p=one.top_p, seed=one.seed
            )
            request, _ = llm[0].chat_request(one.turns(), params)
            if len(request.prompt) >= llm[0].context:  # this request's own fault
                yield key, Answer("", problem="too_long")
                continue
            id = engine.add(request)
            keys[id], texts[id] = key, ""
        try:
            while keys:
                for output in engine.step():
                    if output.id not in keys:
                        continue
                    texts[output.id] += output.text
                    if not output.done:
                        continue
                    key, text, used = keys.pop(output.id), texts.pop(output.id), output.usage
                    if output.error:
                        yield key, Answer("", problem="failed")
                        continue
                    finish = "stop" if output.finish_reason == "stop" else "length"
                    read, written = (used.prompt, used.completion) if used else (0, 0)
                    yield key, Answer(text, finish, read, written)
        finally:
            for id in keys:
                engine.cancel(id)

    return Teacher(path.name, made_by.licence or "unknown", made_by, None, _cache_file(made_by.id), send_all=send_all)


def local_answers(ref: str, questions: Sequence[Sequence[str]], *, max_tokens: int) -> list[tuple[str, ...]]:
    """What a model of our own answers, greedily, to each turn of each question; "" where the chat outgrew its context."""
    teacher = _local(ref, input_of("outputs_of", ref))
    chats: list[list[tuple[str, str]]] = [[] for _ in questions]
    for turn in range(max(map(len, questions), default=0)):  # the same turn of all questions together
        here = [n for n, turns in enumerate(questions) if turn < len(turns)]
        for n in here:
            chats[n].append(("user", questions[n][turn]))
        asked = [Ask(tuple(chats[n]), max_tokens=max_tokens, temperature=0.0) for n in here]
        for n, answer in zip(here, teacher.answer(asked), strict=True):
            chats[n].append(("assistant", answer.text))
    return [tuple(text.strip() for role, text in chat if role == "assistant") for chat in chats]


def _recorded_teacher(recipe: TeacherFields) -> Teacher:
    path = Path(recipe.teacher)
    if not path.is_file():
        raise UserError(f"{path}: no such file of recorded answers")
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
        if head["format"] != FORMAT:
            raise ValueError
        made_by = Input("outputs_of", head["id"], head["teacher"], recipe.teacher_licence or head["licence"], head["locator"])  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: is not a file of recorded answers ({FORMAT}): a dataset made by a teacher holds one, answers.jsonl"
        ) from None
    known, _ = _read_cache(path)
    file_input = input_of("contains", path, licence=made_by.licence)
    return Teacher(path.name, str(made_by.licence), made_by, None, None, known=known, extra_inputs=[file_input])


def _cache_file(id: str) -> Path:
    root = Path(os.environ.get("CRIADERO_CACHE") or Path.home() / ".cache" / "criadero")
    return root / "teachers" / f"{id.removeprefix('sha256:')[:32]}.jsonl"


def _read_cache(path: Path) -> tuple[dict[str, Answer], dict[str, list[Answer]]]:
    """Answers by request, and failed attempts; a line that was cut off by a kill is left out."""
    known: dict[str, Answer] = {}
    lost: dict[str, list[Answer]] = {}
    if not path.is_file():
        return known, lost
    for row in _rows(path):
        with contextlib.suppress(KeyError, TypeError):
            key = row.pop("key")
            answer = Answer(**row)
            if answer.problem:
                lost.setdefault(key, []).append(answer)
            else:
                known[key] = answer
    return known, lost


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "key" in row:
                    yield row
