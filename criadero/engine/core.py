"""``Engine``: requests in, outputs out, one step at a time. schedule -> run -> postprocess, all in `Engine.step`.

Any thread may `add` and `cancel` at any time; one thread at a time steps. Nothing here starts a thread or prints.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from criadero.engine.adapters import Adapters
from criadero.engine.cache import Pages, salt
from criadero.engine.grammar import Grammars
from criadero.engine.request import FinishReason, Output, Request, SamplingParams, TokenLogprob, Usage
from criadero.engine.runner import NO_ADAPTER, Runner, StepBatch
from criadero.engine.sampler import BadLogits, Matcher, Sampler, logprob_of
from criadero.engine.scheduler import Scheduler, Sequence
from criadero.engine.speculate import Speculator, verify
from criadero.engine.text import TextStream
from criadero.errors import UserError
from criadero.tokenizer import Tokenizer


@dataclass(slots=True, eq=False)
class _Group:
    """A request under way and its samples."""

    request: Request
    usage: Usage
    sequences: list[Sequence]  # those that have not ended
    held: list[Sequence]  # samples that wait for the first one's prompt to be computed, to share it


class Engine:
    """Continuous batching over one `Runner`.

    ``end_ids`` end an answer; ``sequences`` run at once at most; ``chunk`` is a step's budget of prompt tokens. Without a
    ``tokenizer`` there is no text: no stop texts, no grammars.
    """

    def __init__(
        self, runner: Runner, tokenizer: Tokenizer | None = None, *, end_ids: Iterable[int] = (), sequences: int = 16,
        chunk: int = 512, speculator: Speculator | None = None, adapters: Adapters | None = None,
    ) -> None:  # fmt: skip
        if not 1 <= sequences <= 4096 or not 1 <= chunk <= 2**20:
            raise UserError(f"sequences (1 to 4,096) and chunk (1 to {2**20:,}) cannot be {sequences} and {chunk}")
        self.runner, self.tokenizer, self.speculator = runner, tokenizer, speculator
        self.config = runner.config
        self.end_ids = frozenset(end_ids)
        self.adapters = adapters or Adapters(runner)
        self.pages = Pages(runner.pages, runner.page)
        self.scheduler = Scheduler(self.pages, sequences=sequences, chunk=chunk)
        self.steps = 0
        self._grammars: Grammars | None = None
        self._grammars_lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._groups: dict[int, _Group] = {}
        self._lock = threading.RLock()
        self._inbox: deque[Callable[[], None]] = deque()  # what other threads want done between two steps
        self._ready: list[Output] = []  # outputs that no step's batch gives: cancellations

    # --- from any thread ---

    def add(self, request: Request) -> int:
        """Check ``request`` and put it in line; its id. UserError says what is wrong with it."""
        number = next(self._numbers)
        sequences = self._sequences(number, request)
        group = _Group(request, Usage(prompt=len(request.prompt)), list(sequences), list(sequences[1:]))

        def begin() -> None:
            self._groups[number] = group
            self.scheduler.add(sequences[0])

        self._do(begin)
        return number

    def cancel(self, id: int) -> None:
        """End request ``id``; its pages are free at once, or when the step that is being computed is over. Its last outputs
        say "cancelled". An id that has ended, or never was, is no error."""

        def end() -> None:
            group = self._groups.get(id)
            for sequence in list(group.sequences) if group else []:
                self._ready.append(self._end(sequence, Output(id, sequence.index), "cancelled"))

        self._do(end)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._inbox or self._ready or self._groups)

    def load_adapter(self, name: str, folder: str) -> None:
        """Make the LoRA adapter in ``folder`` one that requests may name; waits for the step that is being computed."""
        with self._lock:
            self.adapters.load(name, folder)

    def unload_adapter(self, name: str, *, drain: bool = False) -> None:
        """Forget an adapter. While requests use it, it is refused, or with ``drain`` done when they have ended."""
        with self._lock:
            self.adapters.unload(name, drain=drain)

    def stats(self) -> dict[str, int]:
        """Counters and gauges for whoever watches."""
        scheduler, pages = self.scheduler, self.pages
        return {
            "running": len(scheduler.running), "waiting": len(scheduler.waiting), "steps": self.steps,
            "preemptions": scheduler.preemptions, "pages": pages.count, "pages_used": pages.used(), "pages_evicted": pages.evicted,
        }  # fmt: skip

    def _do(self, what: Callable[[], None]) -> None:
        """Now, if no step is being computed; else between two steps."""
        self._inbox.append(what)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    # --- a request's check ---

    def _sequences(self, number: int, request: Request) -> list[Sequence]:
        """The samples of a request, checked. Holds its adapter, as the last thing that can fail."""
        config, params, prompt = self.config, request.params, request.prompt
        context = config.max_position_embeddings
        if len(prompt) == 0:
            raise UserError("the prompt is empty; give at least one token")
        for token in prompt:
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise UserError(f"the prompt holds {token!r:.40}, which is no token id")
        tokens = list(map(int, prompt))
        if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
            bad = next(id for id in tokens if not 0 <= id < config.vocab_size)
            raise UserError(f"the prompt has the token id {bad}, but the vocabulary's are 0 to {config.vocab_size - 1}")
        if len(tokens) > context or (len(tokens) == context and request.pooling is None):
            raise UserError(f"the prompt has {len(tokens)} tokens and the model's context is {context}; shorten it")
        for what, ids in (("logit_bias", params.logit_bias), ("stop_ids", params.stop_ids)):
            if ids and max(ids) >= config.vocab_size:
                raise UserError(
                    f"{what} names the token id {max(ids)}, but the vocabulary's are 0 to {config.vocab_size - 1}"
                )
        if self.tokenizer is None and (params.stop or params.structure):
            raise UserError("stop texts and grammars need a tokenizer, and this engine has none")
        limit = len(tokens) if request.pooling else min(context, len(tokens) + params.max_tokens)
        room = self.pages.count * self.pages.page
        if limit > room:
            raise UserError(
                f"a prompt of {len(tokens)} and an answer of at most {limit - len(tokens)} tokens do not fit the cache of {room} "
                "tokens; lower max_tokens, or give the cache more memory"
            )
        matchers = self._matchers(params) if params.structure else [None] * params.n
        ends = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else self.end_ids)
        banned = ends if params.min_tokens else ()
        adapter, identity = self.adapters.hold(request.adapter)
        start = salt(request.tenant, identity)
        made: list[Sequence] = []
        for index in range(1 if request.pooling else params.n):
            sampler = Sampler(
                params, tokens, vocab=config.vocab_size, ends=banned, index=index, matcher=matchers[index]
            )
            text = None
            if self.tokenizer is not None:
                text = TextStream(
                    self.tokenizer, params.stop, continues=request.continues, skip_special=request.skip_special
                )
            whole = request.pooling == "mean" or (params.prompt_logprobs is not None and index == 0)
            one = Sequence(number, index, request, list(tokens), len(tokens), limit, start, adapter, ends, whole)
            one.sampler, one.text = (None, None) if request.pooling else (sampler, text)
            made.append(one)
        return made

    def _matchers(self, params: SamplingParams) -> list[Matcher | None]:
        assert self.tokenizer is not None
        assert params.structure is not None
        with self._grammars_lock:
            if self._grammars is None:
                self._grammars = Grammars(self.tokenizer, self.config.vocab_size, self.end_ids)
        return [self._grammars.matcher(*params.structure) for _ in range(params.n)]

    # --- a step ---

    def step(self) -> list[Output]:
        """Compute one step for whoever is in line; what it gave to each. Empty when there was nothing to do."""
        with self._lock:
            self._drain()
            if self.speculator is not None:
                self.speculator.propose([one for one in self.scheduler.running if one.left == 1 and one.sampler])
            outputs: list[Output] = []
            work = self.scheduler.plan()
            if work:
                self.steps += 1
                batch, rows = self._batch(work)
                try:
                    logits, hidden = self.runner.step(batch)
                except Exception:
                    for sequence, _ in work:
                        self._ready.append(self._fail(sequence, Output(sequence.id, sequence.index), "the step failed"))
                    raise
                # tables may have rows beyond the vocabulary: no text belongs to them
                if logits is not None and self.tokenizer is not None:
                    logits[:, self.tokenizer.vocab_size :] = -np.inf
                first = 0
                for (sequence, count), wanted in zip(work, rows, strict=True):
                    last = first + wanted
                    output = Output(sequence.id, sequence.index)
                    if sequence.sampler is None:
                        self._pool(sequence, count, None if hidden is None else hidden[first:last], output)
                    elif wanted:
                        assert logits is not None
                        self._decode(sequence, count, logits[first:last], output)
                    else:
                        self.scheduler.commit(sequence, sequence.computed + count)
                    first = last
                    if output.ids or output.text or output.done or output.finish_reason or output.prompt_logprobs:
                        outputs.append(output)
            self._drain()
            outputs = self._ready + outputs
            self._ready = []
            return outputs

    def _batch(self, work: list[tuple[Sequence, int]]) -> tuple[StepBatch, list[int]]:
        """The step's arrays, and how many rows of logits or hidden states each sequence gets of it."""
        ids: list[int] = []
        positions: list[int] = []
        starts, rows = [0], []
        lengths: list[int] = []
        wanted: list[int] = []
        width, adapted, hidden, logits = 1, False, False, False
        for sequence, count in work:
            start, begin = sequence.computed, len(ids)
            if sequence.draft:
                ids.append(sequence.tokens[start])
                ids += sequence.draft
            else:
                ids += sequence.tokens[start : start + count]
            positions += range(start, start + count)
            starts.append(begin + count)
            lengths.append(start + count)
            width = max(width, len(sequence.pages))
            adapted |= sequence.adapter != NO_ADAPTER
            whole = sequence.whole and start < sequence.prompt
            if whole or sequence.draft:
                mine = range(begin, begin + count)
            else:
                mine = range(begin + count - 1, begin + count) if start + count >= len(sequence.tokens) else range(0)
            if mine:
                hidden |= sequence.sampler is None
                logits |= sequence.sampler is not None
            wanted += mine
            rows.append(len(mine))
        tables = np.zeros((len(work), width), np.int32)
        for table, (sequence, _) in zip(tables, work, strict=True):
            table[: len(sequence.pages)] = sequence.table[: len(sequence.pages)]
        batch = StepBatch(
            np.array(ids, np.int32), np.array(positions, np.int32), np.array(starts, np.int32), np.array(lengths, np.int32),
            tables, np.array([one.adapter for one, _ in work], np.int32) if adapted else None, np.array(wanted, np.int32),
            logits, hidden,
        )  # fmt: skip
        return batch, rows

    def _decode(self, sequence: Sequence, count: int, logits: np.ndarray, output: Output) -> None:
        """Take what ``logits`` [rows, V] say: log-probabilities of the prompt, the next token, or what of a draft is right."""
        start, draft = sequence.computed, sequence.draft
        if not draft:
            self.scheduler.commit(sequence, start + count)
        try:
            if sequence.whole and start < sequence.prompt:
                self._collect(sequence, start, logits, output)
            if sequence.computed < len(sequence.tokens) and not draft:
                return
            reason: FinishReason | None = None
            if draft:
                reason = self._verify(sequence, logits, output)
            else:
                token, logprob = self._choose(sequence, logits[-1])
                reason = self._give(sequence, token, logprob, output)
        except BadLogits as error:
            self._fail(sequence, output, str(error))
            return
        if sequence.index == 0:
            self._release_samples(sequence.id)
        if reason is not None:
            self._end(sequence, output, reason)

    def _collect(self, sequence: Sequence, start: int, logits: np.ndarray, output: Output) -> None:
        """Row j of the prompt says how likely token j + 1 was."""
        top, known = sequence.request.params.prompt_logprobs, sequence.collected
        assert top is not None
        if not known:
            known.append(None)  # nothing comes before the first token
        for row, place in zip(logits, range(start + 1, sequence.prompt), strict=False):
            if place == len(known):  # else it is known from before a preemption
                if not np.isfinite(row.max()):
                    raise BadLogits("the model gave NaN or an infinite logit for the prompt")
                known.append(logprob_of(row, sequence.tokens[place], top))
        if len(known) == sequence.prompt and sequence.computed >= sequence.prompt:
            output.prompt_logprobs = known
            sequence.whole = False

    def _choose(self, sequence: Sequence, row: np.ndarray) -> tuple[int, TokenLogprob | None]:
        assert sequence.sampler is not None
        top = sequence.request.params.logprobs
        if top is None:
            return sequence.sampler.choose(row), None
        model = row.copy()  # choosing changes the row
        token = sequence.sampler.choose(row)
        return token, logprob_of(model, token, top)

    def _verify(self, sequence: Sequence, logits: np.ndarray, output: Output) -> FinishReason | None:
        """Go through the rows of a draft: each token that agrees makes the next row valid."""
        assert sequence.sampler is not None
        draft, distributions = sequence.draft, sequence.draft_distributions
        sequence.draft, sequence.draft_distributions = [], []
        usage = self._groups[sequence.id].usage
        usage.drafted += len(draft)
        start = sequence.computed
        reason: FinishReason | None = None
        right = 0
        for number, row in enumerate(logits):
            if number < len(draft) and distributions:
                model = row.copy() if sequence.request.params.logprobs is not None else row
                token = verify(sequence.sampler, row, draft[number], distributions[number])
                top = sequence.request.params.logprobs
                logprob = None if top is None else logprob_of(model, token, top)
            else:
                token, logprob = self._choose(sequence, row)
            reason = self._give(sequence, token, logprob, output)
            if reason is not None or number == len(draft) or token != draft[number]:
                break
            right += 1
        usage.accepted += right
        # the last token has no keys yet; a token that ended the answer may not even be among the tokens
        self.scheduler.commit(sequence, min(start + 1 + right, len(sequence.tokens)))
        return reason

    def _give(
        self, sequence: Sequence, token: int, logprob: TokenLogprob | None, output: Output
    ) -> FinishReason | None:
        """``token`` is the next one; why the answer ends with it, if it does."""
        sampler, params = sequence.sampler, sequence.request.params
        assert sampler is not None
        if token in sequence.ends and sampler.place >= params.min_tokens:
            output.stopped_by, output.end_logprob = token, logprob
            return "stop"
        sampler.accept(token)
        sequence.tokens.append(token)
        output.ids.append(token)
        if logprob is not None:
            output.logprobs = [*(output.logprobs or ()), logprob]
        if sequence.text is not None:
            text, stopped = sequence.text.push(token, may_stop=sampler.place >= params.min_tokens)
            output.text += text
            if stopped is not None:
                output.stopped_by = stopped
                return "stop"
        if sampler.matcher is not None and sampler.matcher.complete:
            return "stop"
        if len(sequence.tokens) >= sequence.limit:
            return "length" if sampler.place >= params.max_tokens else "context"
        return None

    def _pool(self, sequence: Sequence, count: int, hidden: np.ndarray | None, output: Output) -> None:
        """Sum hidden states [rows, D]; when the prompt is through, the vector: their mean, or the last, of length 1."""
        start = sequence.computed
        self.scheduler.commit(sequence, start + count)
        if hidden is not None and len(hidden):
            new = hidden[max(0, sequence.pooled_rows - start) :] if sequence.whole else hidden
            total = new.sum(axis=0, dtype=np.float64)
            sequence.pooled = total if sequence.pooled is None or not sequence.whole else sequence.pooled + total
            sequence.pooled_rows = max(sequence.pooled_rows, start + count)
        if sequence.computed < len(sequence.tokens):
            return
        assert sequence.pooled is not None
        size = float(np.linalg.norm(sequence.pooled))
        if not np.isfinite(size) or size == 0.0:
            self._fail(sequence, output, "the model gave NaN, infinity or zeros for the hidden states")
            return
        output.embedding = (sequence.pooled / size).astype(np.float32)
        self._end(sequence, output, "stop")

    # --- the end ---

    def _release_samples(self, id: int) -> None:
        """The first sample's prompt is computed: the others find it in the cache."""
        group = self._groups[id]
        for sequence in group.held:
            self.scheduler.add(sequence)
        group.held = []

    def _fail(self, sequence: Sequence, output: Output, why: str) -> Output:
        """End one sample with an error; what it has put in the cache may be spoilt, so nobody shall find it."""
        if sequence.index == 0:
            self._release_samples(sequence.id)
        self.pages.forget(sequence.pages)
        place = len(sequence.tokens) - sequence.prompt
        output.error = f"request {sequence.id}, sample {sequence.index}, token {place} of the answer: {why}"
        return self._end(sequence, output, "error")

    def _end(self, sequence: Sequence, output: Output, reason: FinishReason) -> Output:
        """Give everything back and complete the sample's last output."""
        group = self._groups[sequence.id]
        output.finish_reason = reason
        if sequence.text is not None and not isinstance(output.stopped_by, str):
            text, stopped = sequence.text.flush()
            output.text += text
            if stopped is not None and reason in ("length", "context"):
                output.finish_reason, output.stopped_by = "stop", stopped
        self.scheduler.remove(sequence)
        if self.speculator is not None:
            self.speculator.drop(sequence)
        group.sequences.remove(sequence)
        if sequence in group.held:
            group.held.remove(sequence)
        usage = group.usage
        usage.completion += len(sequence.tokens) - sequence.prompt
        if sequence.index == 0:
            usage.cached = max(0, sequence.cached)
        if not group.sequences:
            output.done, output.usage = True, usage
            del self._groups[sequence.id]
            self.adapters.release(group.request.adapter)
        return output


def run(engine: Engine, requests: Iterable[Request]) -> list[list[Output]]:
    """Compute all ``requests`` to their ends; the outputs of each, in order. For tests and small scripts."""
    ids = [engine.add(request) for request in requests]
    found: dict[int, list[Output]] = {id: [] for id in ids}
    while engine.busy:
        for output in engine.step():
            if output.id in found:
                found[output.id].append(output)
    return [found[id] for id in ids]
