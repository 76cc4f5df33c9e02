"""``LLM``: a model, its tokenizer and its template over one engine, for notebooks, scripts and the terminal."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from criadero.artifact import Artifact, resolve
from criadero.chat import Message, Template, render
from criadero.checkpoints import ADAPTER, load_config, template_of, tokenizer_of
from criadero.engine.adapters import Adapters
from criadero.engine.core import Engine
from criadero.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob, Usage, sampling_params
from criadero.engine.runner import Runner, make_runner
from criadero.engine.speculate import TOKENS, DraftModel, PromptLookup, Speculator, check_same_words
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # text, or token ids as they are
Chat = Sequence[Message]
Truncate = Literal["error", "oldest"]


@dataclass
class Sample:
    """One answer: its text and ids, why it ended (see `criadero.engine.request.Output`), and log-probabilities if asked for."""

    index: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stopped_by: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    end_logprob: TokenLogprob | None = None
    error: str | None = None


@dataclass
class Result:
    """What a request came to: ``n`` samples, counts of tokens, and how many of a chat's messages had to be left out."""

    samples: list[Sample]
    usage: Usage
    dropped_messages: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: np.ndarray | None = None

    @property
    def text(self) -> str:
        """Of the first sample."""
        return self.samples[0].text

    @property
    def ids(self) -> list[int]:
        """Of the first sample."""
        return self.samples[0].ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Of the first sample."""
        return self.samples[0].finish_reason


class Stream:
    """Pieces of an answer's text as they come: iterate over it. ``result`` is None until it is through; `close` cancels the
    rest, and so does letting go of it. `watch` sees each token; what it returns, unless that is false, ends the answer and is ``hit``."""

    def __init__(
        self, llm: LLM, request: Request, dropped: int, watch: Callable[[int], object] | None = None
    ) -> None:  # fmt: skip
        self._llm = llm
        self._watch = watch
        self.result: Result | None = None
        self.hit: object = None
        self._pieces: deque[str] = deque()
        self._building = Building(1, dropped)
        self._id: int | None = llm._begin(request)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        while True:
            if self._pieces:
                return self._pieces.popleft()
            id = self._id
            if id is None:
                raise StopIteration
            for output in self._llm._outputs(id):
                if output.text:
                    self._pieces.append(output.text)
                if output.done:
                    self._llm._forget(id)
                    self._id = None
                self._building.add(output)
                if output.error:
                    raise UserError(output.error)
                if self._watch is not None:
                    self.hit = next((hit for token in output.ids if (hit := self._watch(token))), None)
                if output.done or self.hit:
                    self.close()
                    self.result = self._building.result()
                    break

    def close(self) -> None:
        """Cancel what is not computed yet."""
        if self._id is not None:
            id, self._id = self._id, None
            self._llm.engine.cancel(id)
            self._llm._forget(id)

    def __del__(self) -> None:
        if getattr(self, "_id", None) is not None:
            self.close()


class Building:
    """A result in the making."""

    def __init__(self, n: int, dropped: int = 0) -> None:
        self.samples = [Sample(index) for index in range(n)]
        self.dropped = dropped
        self.usage = Usage()
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.embedding: np.ndarray | None = None

    def add(self, output: Output) -> None:
        sample = self.samples[output.index]
        sample.text += output.text
        sample.ids += output.ids
        if output.logprobs is not None:
            sample.logprobs = [*(sample.logprobs or ()), *output.logprobs]
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.embedding is not None:
            self.embedding = output.embedding
        if output.finish_reason is not None:
            sample.end_logprob = output.end_logprob
            sample.finish_reason, sample.stopped_by, sample.error = (
                output.finish_reason,
                output.stopped_by,
                output.error,
            )
        if output.usage is not None:
            self.usage = output.usage

    def result(self) -> Result:
        return Result(self.samples, self.usage, self.dropped, self.prompt_logprobs, self.embedding)


class LLM:
    """Talk to a model: ``for piece in LLM("cria").chat([{"role": "user", "content": "Hola"}]): print(piece, end="")``.

    Any number of threads may use one; what they ask for is computed together. Keywords of the methods are the fields of
    `SamplingParams`; ``adapter`` names a loaded adapter.
    """

    def __init__(
        self, ref: str | Path | Artifact, *, runner: Literal["auto", "native", "torch"] = "auto", weights: str = "auto",
        kv: str = "auto", kv_memory: int | None = None, threads: int | None = None, sequences: int = 16, chunk: int = 512,
        draft: str | Path | Artifact | None = None, draft_tokens: int = TOKENS, device: str = "cpu", compile: bool = False,
        require_passport: bool = False,
    ) -> None:  # fmt: skip
        """Load a bundled model, a folder or a GGUF file. All else has a default that suits the machine (`make_runner`).

        ``sequences`` are computed at once at most, ``chunk`` prompt tokens in a step. ``draft`` is a small model of the same
        vocabulary that guesses ahead, or "lookup": copy from what is there; each guesses ``draft_tokens`` a step. With
        ``require_passport`` every file of the model (its adapter's base, its draft) has to be as its passport says.
        """
        self.path = resolve(ref)
        self.tokenizer: Tokenizer = tokenizer_of(self.path)
        config = load_config(self.path)
        if self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{self.path}: its tokenizer has {self.tokenizer.vocab_size} tokens but the model {config.vocab_size} "
                "embeddings: the two do not belong together"
            )
        options: dict[str, Any] = {
            "runner": runner, "threads": threads, "device": device, "sequences": sequences, "require_passport": require_passport,
        }  # fmt: skip
        self.runner: Runner = make_runner(
            self.path, weights=weights, kv=kv, kv_memory=kv_memory, compile=compile, **options
        )
        self.config = self.runner.config
        speculator: Speculator | None = None
        if draft == "lookup":
            speculator = PromptLookup(draft_tokens)
        elif draft is not None:
            small = resolve(draft)
            guesser = make_runner(small, **options)
            check_same_words(self.tokenizer, tokenizer_of(small), self.config.vocab_size, guesser.config.vocab_size)
            speculator = DraftModel(guesser, draft_tokens)
        self._is_adapter = (self.path / ADAPTER).is_file()
        self.engine = Engine(
            self.runner, self.tokenizer, end_ids={*self.config.eos_ids, *self.tokenizer.end_ids}, sequences=sequences,
            chunk=chunk, speculator=speculator, adapters=Adapters(self.runner, self.path),
        )  # fmt: skip
        self._template: Template | None = None
        self._turn = threading.Condition()
        self._stepping = False
        self._boxes: dict[int, list[Output]] = {}

    @property
    def template(self) -> Template:
        """The chat template that travels with the weights; UserError when there is none."""
        if self._template is None:
            self._template = template_of(self.path)
        return self._template

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together at most."""
        return self.config.max_position_embeddings

    # --- one answer, piece by piece ---

    def generate(self, text: Prompt, *, adapter: str | None = None, **sampling: Any) -> Stream:
        """Go on from ``text``; pieces of text as they come. Keywords are those of `SamplingParams`."""
        return Stream(self, self.request(text, _single(sampling), adapter), 0)

    def chat(
        self, messages: Chat, *, truncate: Truncate = "error", adapter: str | None = None,
        watch: Callable[[int], object] | None = None, **sampling: Any,
    ) -> Stream:  # fmt: skip
        """Answer the last message; pieces of text as they come.

        A chat that fills the context is refused, or with ``truncate="oldest"`` loses whole turns, the oldest first, and the
        stream's ``result`` says how many messages. `watch` is called with each token of the answer and can end it: a guard's
        ``push`` (`criadero.trust.guard`).
        """
        params = _single(sampling)
        request, dropped = self.chat_request(messages, params, truncate, adapter)
        return Stream(self, request, dropped, watch)

    # --- whole answers, one or many ---

    @overload
    def complete(self, prompts: Prompt, **sampling: Any) -> Result: ...
    @overload
    def complete(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Result]: ...
    def complete(self, prompts: Any, **sampling: Any) -> Any:
        """Go on from a prompt, or from each of a list: a `Result`, or a list of them in the prompts' order.

        What fails alone (NaN logits) raises UserError for one prompt; in a list its result has ``finish_reason`` "error".
        """
        if isinstance(prompts, str) or (prompts and all(isinstance(one, int | np.integer) for one in prompts)):
            return _sound(self._all(self._prompts([prompts], sampling))[0])
        return self._all(self._prompts(prompts, sampling))

    def answer(self, chats: Any, *, truncate: Truncate = "error", **sampling: Any) -> Any:
        """Answer a chat (a list of messages), or each of a list of chats: a `Result`, or a list of them."""
        if chats and isinstance(chats[0], Mapping):
            return _sound(self._all(self._chats([chats], truncate, sampling))[0])
        return self._all(self._chats(chats, truncate, sampling))

    def each(
        self, prompts: Sequence[Prompt] | None = None, *, chats: Sequence[Chat] | None = None, truncate: Truncate = "error",
        **sampling: Any,
    ) -> Iterator[tuple[int, Result]]:  # fmt: skip
        """The results of many prompts or chats as they are ready, each with its number: for a progress bar, wrap this."""
        if (prompts is None) == (chats is None):
            raise UserError("each: give either prompts or chats")
        made = self._prompts(prompts, sampling) if prompts is not None else self._chats(chats or (), truncate, sampling)
        return self._results(made)

    def logprobs(
        self, prompts: Sequence[Prompt], *, top: int = 0, adapter: str | None = None
    ) -> list[list[TokenLogprob | None]]:
        """How likely each token of each prompt is after those before it; None for the first. ``top`` likeliest beside it."""
        made = self._prompts(prompts, {"prompt_logprobs": top, "max_tokens": 1, "adapter": adapter})
        return [_sound(result).prompt_logprobs or [] for result in self._all(made)]

    def embed(
        self, prompts: Sequence[Prompt], *, pooling: Literal["mean", "last"] = "mean", adapter: str | None = None
    ) -> np.ndarray:  # fmt: skip
        """A vector of length 1 for each prompt, float32 ``[n, D]``: the mean of the final normed hidden states, or the last."""
        if pooling not in ("mean", "last"):
            raise UserError(f"pooling is {pooling!r}; it can be 'mean' or 'last'")
        if isinstance(prompts, str):
            raise UserError("embed takes a list of texts: put the text in a list")
        made = [
            (Request(request.prompt, request.params, adapter, pooling=pooling), 0)
            for request, _ in self._prompts(prompts, {})
        ]  # fmt: skip
        vectors = [_sound(result).embedding for result in self._all(made)]
        return (
            np.stack([v for v in vectors if v is not None])
            if vectors
            else np.zeros((0, self.config.hidden_size), np.float32)
        )

    # --- adapters ---

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """Make the LoRA adapter in ``folder`` one that ``adapter=name`` uses. It must have been made on this base."""
        if self._is_adapter:
            raise UserError(
                f"{self.path} is an adapter merged on its base: load the base, and name the adapters beside it"
            )
        self.engine.load_adapter(name, str(folder))

    def unload_adapter(self, name: str, *, drain: bool = False) -> None:
        """Forget an adapter; refused while requests use it, unless ``drain``: then no new ones may, and it goes with the last."""
        self.engine.unload_adapter(name, drain=drain)

    # --- from words to requests ---

    def ids(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt: text gets BOS in front where the vocabulary has one; ids are taken as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.bos_id is not None)
        return list(prompt)

    def request(
        self, prompt: Prompt, params: SamplingParams, adapter: str | None = None, *, tenant: str = ""
    ) -> Request:  # fmt: skip
        """What `engine` takes to go on from a prompt: for who drives the engine, such as a server."""
        return Request(self.ids(prompt), params, adapter, tenant, continues=True)

    def chat_request(
        self, messages: Chat, params: SamplingParams, truncate: Truncate = "error", adapter: str | None = None, *, tenant: str = ""
    ) -> tuple[Request, int]:  # fmt: skip
        """What `engine` takes to answer a chat, and how many messages were left out of it (see `chat`)."""
        if truncate not in ("error", "oldest"):
            raise UserError(f"truncate is {truncate!r}; it can be 'error' or 'oldest'")
        kept, dropped = fit(self, list(messages), params.max_tokens) if truncate == "oldest" else (list(messages), 0)
        prompt = render(kept, self.tokenizer, self.template, add_generation_prompt=True)
        return Request(prompt.ids, params, adapter, tenant), dropped

    def _prompts(self, prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list[tuple[Request, int]]:
        adapter = sampling.pop("adapter", None)
        params = sampling_params(sampling)
        return [(self.request(prompt, params, adapter), 0) for prompt in prompts]

    def _chats(self, chats: Sequence[Chat], truncate: Truncate, sampling: dict[str, Any]) -> list[tuple[Request, int]]:
        adapter = sampling.pop("adapter", None)
        params = sampling_params(sampling)
        return [self.chat_request(messages, params, truncate, adapter) for messages in chats]

    # --- driving the engine ---

    def _all(self, made: list[tuple[Request, int]]) -> list[Result]:
        found = dict(self._results(made))
        return [found[number] for number in range(len(made))]

    def _results(self, made: list[tuple[Request, int]]) -> Iterator[tuple[int, Result]]:
        """Begin all at once, so that a bad one is refused before any is computed; those not through are cancelled at the end."""
        waiting: dict[int, tuple[int, Building]] = {}
        try:
            for number, (request, dropped) in enumerate(made):
                try:
                    id = self._begin(request)
                except UserError as error:
                    raise UserError(
                        f"prompt {number + 1} of {len(made)}: {error}" if len(made) > 1 else str(error)
                    ) from None
                waiting[id] = (number, Building(1 if request.pooling else request.params.n, dropped))
            while waiting:
                for id in list(waiting):
                    number, building = waiting[id]
                    for output in self._outputs(id, wait=id == next(iter(waiting))):
                        building.add(output)
                        if output.done:
                            del waiting[id]
                            self._forget(id)
                            yield number, building.result()
        finally:
            for id in waiting:
                self.engine.cancel(id)
                self._forget(id)

    def _begin(self, request: Request) -> int:
        with self._turn:  # nobody can see an output of it before its box is there
            id = self.engine.add(request)
            self._boxes[id] = []
        return id

    def _forget(self, id: int) -> None:
        with self._turn:
            self._boxes.pop(id, None)

    def _outputs(self, id: int, *, wait: bool = True) -> list[Output]:
        """What request ``id`` got since the last call. With ``wait`` at least one output: this thread steps the engine for
        everybody, or waits for the one that does."""
        while True:
            with self._turn:
                while wait and not self._boxes[id] and self._stepping:
                    self._turn.wait()
                if self._boxes[id] or not wait:
                    found, self._boxes[id] = self._boxes[id], []
                    return found
                self._stepping = True
            outputs: list[Output] = []
            try:
                outputs = self.engine.step()
            finally:
                with self._turn:
                    self._stepping = False
                    for output in outputs:
                        if output.id in self._boxes:
                            self._boxes[output.id].append(output)
                    self._turn.notify_all()


def fit(llm: LLM, messages: list[Message], answer_tokens: int) -> tuple[list[Message], int]:
    """The newest turns that leave room for an answer, and how many older messages had to be left out.

    A system message stays; whole question-and-answer turns go, oldest first. UserError when the last question alone is too long.
    """
    answer_tokens = min(answer_tokens, llm.context // 2)  # a long answer must not push out the whole conversation
    system = [m for m in messages[:1] if m["role"] == "system"]
    rest, dropped = messages[len(system) :], 0
    while True:
        used = len(render([*system, *rest], llm.tokenizer, llm.template, add_generation_prompt=True).ids)
        if used + answer_tokens <= llm.context:
            return [*system, *rest], dropped
        if len(rest) < 3:
            if used + 16 <= llm.context:
                return [*system, *rest], dropped
            raise UserError(f"this message takes {used} tokens and the model's context is {llm.context}; shorten it")
        rest, dropped = rest[2:], dropped + 2


def _single(sampling: dict[str, Any]) -> SamplingParams:
    params = sampling_params(sampling)
    if params.n != 1:
        raise UserError("n above 1 has no one stream of text: use complete or answer")
    return params


def _sound(result: Result) -> Result:
    for sample in result.samples:
        if sample.error:
            raise UserError(sample.error)
    return result
