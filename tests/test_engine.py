"""The engine: whatever is computed together, each request gets what it gets alone, and nothing leaks."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
from engine_cases import PAGE, RUNNERS, engine, ids, model, nothing_is_left, requests, runner, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from criadero.engine.cache import Pages, extend, salt
from criadero.engine.core import Engine, run
from criadero.engine.generate import generate
from criadero.engine.request import Output, Request, SamplingParams
from criadero.engine.runner import StepBatch
from criadero.errors import UserError

PROMPT = [5, 80, 199, 20]


def alone(asked: list[Request], kind: str = "torch") -> list[list[list[int]]]:
    """Each request by itself: with the plain model, or, where rounding differs, through a fresh engine."""
    if kind == "torch":
        return [[list(generate(model(), r.prompt, r.params, i)) for i in range(r.params.n)] for r in asked]
    return [samples(r, run(engine(kind), [r])[0]) for r in asked]


# --- the same tokens ---


@pytest.mark.parametrize("kind", RUNNERS)
def test_each_gets_what_it_gets_alone(kind: str) -> None:
    asked = requests(30, 1)
    wanted = alone(asked, kind)
    for pages, chunk, sequences in ((200, 512, 16), (9, 7, 5), (14, 33, 30)):
        one = engine(kind, pages, chunk=chunk, sequences=sequences)
        found = run(one, asked)
        assert [samples(r, outputs) for r, outputs in zip(asked, found, strict=True)] == wanted
        nothing_is_left(one)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNNERS)
@pytest.mark.parametrize("seed", range(5))
def test_each_gets_what_it_gets_alone_many_times(kind: str, seed: int) -> None:
    asked = requests(120, 100 + seed, longest=100, answer=28)
    wanted = alone(asked, kind)
    rng = random.Random(seed)
    for _ in range(3):
        one = engine(kind, rng.randrange(8, 60), chunk=rng.randrange(1, 200), sequences=rng.randrange(1, 40))
        order = list(range(len(asked)))
        rng.shuffle(order)
        found = run(one, [asked[n] for n in order])
        for n, outputs in zip(order, found, strict=True):
            assert samples(asked[n], outputs) == wanted[n]
        nothing_is_left(one)


def test_the_native_runner_agrees_with_its_twin() -> None:
    pytest.importorskip("criadero.kernels._native")
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 300, 40).astype(np.int32)
    batch = StepBatch(
        rows, np.concatenate((np.arange(30), np.arange(10))).astype(np.int32), np.array([0, 30, 40], np.int32),
        np.array([30, 10], np.int32), np.array([[3, 1], [0, 0]], np.int32), None, np.arange(40, dtype=np.int32),
    )  # fmt: skip
    (ours, _), (theirs, _) = runner("native", 4).step(batch), runner("torch", 4).step(batch)
    assert ours is not None
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_decoding_at_fixed_shapes_is_the_same() -> None:
    """What a CUDA graph would capture, run plainly: padded, with whole tables, and masked."""
    from criadero.engine.torch_runner import TorchRunner, _GraphDecode

    asked = requests(12, 14)
    one = engine(pages=40)
    assert isinstance(one.runner, TorchRunner)
    one.runner._decode = _GraphDecode(one.runner)
    found = run(one, asked)
    assert [samples(r, outputs) for r, outputs in zip(asked, found, strict=True)] == alone(asked)
    assert one.runner._decode.graphs
    with pytest.raises(UserError, match="compile captures CUDA graphs"):
        TorchRunner.load("cria", pages=1, compile=True)


# --- soak ---


def soak(kind: str, count: int, seed: int, **options: Any) -> None:
    """Requests arrive and are cancelled while others run, in a cache that is too small for them all."""
    rng = random.Random(seed)
    asked = requests(count, seed, longest=50, answer=30)
    wanted = alone(asked, kind)
    one = engine(kind, 12, chunk=48, sequences=9, **options)
    found: dict[int, list[Output]] = {}
    number: dict[int, int] = {}
    doomed: set[int] = set()
    todo = list(range(count))
    while todo or one.busy:
        for _ in range(rng.randrange(3)):
            if todo:
                n = todo.pop(0)
                id = one.add(asked[n])
                number[id], found[id] = n, []
        if number and rng.random() < 0.1:
            id = rng.choice(list(number))
            if not any(output.done for output in found[id]):
                doomed.add(id)
                one.cancel(id)
        for output in one.step():
            found[output.id].append(output)
        one.pages.check()
    nothing_is_left(one)
    assert len(doomed) >= count // 50
    assert one.scheduler.preemptions > 0
    for id, outputs in found.items():
        got, whole = samples(asked[number[id]], outputs), wanted[number[id]]
        ends = [output for output in outputs if output.finish_reason]
        assert sorted(output.index for output in ends) == list(range(len(whole)))
        assert [output.done for output in outputs].count(True) == 1
        for sample, all_of_it, end in zip(got, whole, sorted(ends, key=lambda o: o.index), strict=True):
            if end.finish_reason == "cancelled":
                assert id in doomed
                assert sample == all_of_it[: len(sample)]
            else:
                assert sample == all_of_it


@pytest.mark.parametrize("kind", RUNNERS)
def test_soak(kind: str) -> None:
    soak(kind, 150, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNNERS)
def test_soak_for_long(kind: str) -> None:
    soak(kind, 2500, 4)


def test_threads_add_and_cancel_while_another_steps() -> None:
    asked = requests(30, 8)
    wanted = alone(asked)
    one = engine(pages=40)
    number: dict[int, int] = {}
    found: dict[int, list[Output]] = {}

    def client(first: int) -> None:
        for n in range(first, len(asked), 3):
            number[one.add(asked[n])] = n
            one.cancel(one.add(Request(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True))))

    clients = [threading.Thread(target=client, args=(n,)) for n in range(3)]
    for client_thread in clients:
        client_thread.start()
    while any(c.is_alive() for c in clients) or one.busy:
        for output in one.step():
            found.setdefault(output.id, []).append(output)
    nothing_is_left(one)
    assert len(number) == len(asked)
    for id, n in number.items():
        assert samples(asked[n], found[id]) == wanted[n]


# --- the scheduler's rules ---


def free(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"ignore_eos": True, "max_tokens": 20, **fields})


def test_decoding_goes_on_while_a_long_prompt_is_computed() -> None:
    one = engine(chunk=16)
    first = one.add(Request(PROMPT, free(max_tokens=100)))
    one.step()
    second = one.add(Request(list(range(100)), free(max_tokens=2)))
    steps = 0
    while True:
        outputs = one.step()
        assert outputs[0].id == first
        assert len(outputs[0].ids) == 1
        steps += 1
        if any(o.id == second for o in outputs):
            break
    assert steps == 50  # 100 tokens in chunks of 16 / 8
    one.cancel(first)
    one.cancel(second)


def test_first_come_first_served_and_the_youngest_gives_way() -> None:
    one = engine(pages=8, sequences=8)
    asked = [Request([n] * 33, free(max_tokens=60)) for n in range(1, 6)]
    order = []
    numbers = [one.add(request) for request in asked]
    while one.busy:
        order += [output.id for output in one.step() if output.done]
        ages = [sequence.order for sequence in one.scheduler.running]
        assert ages == sorted(ages)
        if one.scheduler.waiting and ages:
            assert ages[-1] < one.scheduler.waiting[0].order  # nobody overtakes
    assert order == numbers
    assert one.scheduler.preemptions > 0
    nothing_is_left(one)


def test_a_cancelled_prefill_frees_its_pages_at_once() -> None:
    one = engine(chunk=10)
    id = one.add(Request(list(range(100)), free()))
    one.step()
    assert one.pages.used() == -(-100 // PAGE)
    one.cancel(id)
    assert one.pages.used() == 0
    assert [(o.id, o.finish_reason, o.done) for o in one.step()] == [(id, "cancelled", True)]
    one.cancel(id)  # again, and one that never was
    one.cancel(10**9)
    assert one.step() == []
    nothing_is_left(one)


def test_the_same_requests_give_the_same_steps() -> None:
    def steps() -> list[list[tuple[int, list[int]]]]:
        one = engine(pages=10, chunk=20, sequences=6)
        for request in requests(12, 5):
            one.add(request)
        found = []
        while one.busy:
            found.append([(output.id, output.ids) for output in one.step()])
        return found

    assert steps() == steps()


# --- prefixes ---


def test_a_prefix_is_computed_once_and_only_for_whom_it_may_be() -> None:
    one = engine(pages=60)
    prompt = list(range(1, 71))

    def cached(prompt: list[int], **fields: Any) -> int:
        usage = run(one, [Request(prompt, free(max_tokens=3), **fields)])[0][-1].usage
        assert usage is not None
        return usage.cached

    assert cached(prompt) == 0
    assert cached(prompt) == 64
    assert cached(prompt[:64]) == 48  # one token at least is computed
    assert cached([*prompt[:40], 7, 7]) == 32
    assert cached([9, *prompt]) == 0
    assert cached(prompt, tenant="other") == 0
    assert cached(prompt, tenant="other") == 64
    one.pages.clear()
    assert cached(prompt) == 0


def test_a_spoilt_step_ends_its_own_request_and_is_not_reused() -> None:
    one = engine(pages=60)
    real = one.runner.step
    bad = list(range(1, 40))

    def spoilt(batch: StepBatch) -> Any:
        logits, hidden = real(batch)
        for row, at in enumerate(batch.logit_rows):
            if batch.ids[at] == 39:  # the end of the bad prompt
                logits[row, 5] = np.nan
        return logits, hidden

    one.runner.step = spoilt  # type: ignore[method-assign]
    good = [Request([n, 7, 7], free(max_tokens=5)) for n in range(3)]
    found = run(one, [good[0], Request(bad, free()), *good[1:]])
    (end,) = found[1]
    assert (end.finish_reason, end.done, end.ids) == ("error", True, [])
    assert end.error == f"request {end.id}, sample 0, token 0 of the answer: the model gave NaN for a logit"
    assert [ids(found[n]) for n in (0, 2, 3)] == [one for [one] in alone(good)]
    one.runner.step = real  # type: ignore[method-assign]
    usage = run(one, [Request(bad, free(max_tokens=2))])[0][-1].usage
    assert usage is not None
    assert usage.cached == 0
    nothing_is_left(one)


def test_a_step_that_fails_ends_those_in_it_and_the_engine_goes_on() -> None:
    one = engine()
    real = one.runner.step

    def broken(batch: StepBatch) -> Any:
        raise MemoryError("no memory for this step")

    one.runner.step = broken  # type: ignore[method-assign]
    id = one.add(Request(PROMPT, free()))
    with pytest.raises(MemoryError):
        one.step()
    one.runner.step = real  # type: ignore[method-assign]
    assert [(o.id, o.finish_reason) for o in one.step()] == [(id, "error")]
    nothing_is_left(one)
    assert len(ids(run(one, [Request(PROMPT, free())])[0])) == 20


# --- how it ends, and what is refused ---


def test_why_it_ended() -> None:
    one = engine()
    tokens = list(generate(model(), PROMPT, free(max_tokens=20)))
    reasons = {
        "length": Request(PROMPT, free(max_tokens=5)),
        "context": Request([1] * 120, free(max_tokens=500)),
        "stop": Request(PROMPT, free(stop_ids=[tokens[6]])),
    }
    found = dict(zip(reasons, run(one, list(reasons.values())), strict=True))
    assert {name: outputs[-1].finish_reason for name, outputs in found.items()} == {name: name for name in reasons}
    assert len(ids(found["context"])) == 8
    assert ids(found["stop"]) == tokens[: tokens.index(tokens[6])]
    assert found["stop"][-1].stopped_by == tokens[6]
    usage = found["length"][-1].usage
    assert usage is not None
    assert (usage.prompt, usage.completion, usage.cached) == (4, 5, 0)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([]), "the prompt is empty; give at least one token"),
        (Request([1] * 128), "the prompt has 128 tokens and the model's context is 128; shorten it"),
        (Request([1] * 129, pooling="mean"), "the prompt has 129 tokens and the model's context is 128"),
        (Request([1, -1]), "the prompt has the token id -1, but the vocabulary's are 0 to 299"),
        (Request([1, 300]), "the prompt has the token id 300"),
        (Request([1, 2.5]), "the prompt holds 2.5, which is no token id"),  # type: ignore[list-item]
        (Request(["a"]), "the prompt holds 'a', which is no token id"),  # type: ignore[list-item]
        (Request([1], SamplingParams(stop_ids=[300])), "stop_ids names the token id 300"),
        (Request([1], SamplingParams(max_tokens=2), adapter="x"), "there is no adapter 'x'; loaded: none"),
        (Request([1] * 60, SamplingParams(max_tokens=60)), "do not fit the cache of 80 tokens; lower max_tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(request_: Request, message: str) -> None:
    one = engine(pages=5)
    with pytest.raises(UserError, match=message):
        one.add(request_)
    nothing_is_left(one)
    with pytest.raises(UserError, match="need a tokenizer"):
        Engine(one.runner).add(Request([1], SamplingParams(stop="x")))


def test_prompts_whose_every_row_is_wanted_in_small_chunks() -> None:
    big, small = engine(chunk=512), engine(pages=9, chunk=5)
    asked = [
        Request(list(range(90)), SamplingParams(prompt_logprobs=1, max_tokens=3)),
        Request(list(range(90)), pooling="mean"),
        Request(list(range(50, 120)), pooling="last"),
        Request(PROMPT, free(max_tokens=30)),
    ]
    ours, theirs = run(small, asked), run(big, asked)
    whole = next(o.prompt_logprobs for o in ours[0] if o.prompt_logprobs)
    other = next(o.prompt_logprobs for o in theirs[0] if o.prompt_logprobs)
    assert len(whole) == len(other) == 90
    for one, two in zip(whole[1:], other[1:], strict=True):
        assert one is not None
        assert two is not None
        assert (one.id, one.rank) == (two.id, two.rank)
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)
    for n in (1, 2):
        assert ours[n][-1].embedding is not None
        np.testing.assert_allclose(ours[n][-1].embedding, theirs[n][-1].embedding, atol=1e-6)  # type: ignore[arg-type]
    nothing_is_left(small)


# --- pages ---


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.integers(1, 5)), max_size=80), st.integers(1, 12))
def test_pages_are_never_lost(actions: list[tuple[int, int, int]], count: int) -> None:
    pages = Pages(count, 4)
    held: list[list[int]] = []
    for action, which, size in actions:
        if action == 0 and (taken := pages.take(size)) is not None:
            assert len(set(taken)) == size
            assert not {page for one in held for page in one} & set(taken)
            held.append(taken)
        elif action == 1 and held:
            pages.release(held.pop(which % len(held)))
        elif action == 2 and held:
            one = held[which % len(held)]
            pages.publish(one[0], salt(str(which)))
        elif action == 3:
            if found := pages.find([salt(str(which))]):
                held.append(found)
        elif held:
            pages.forget(held[which % len(held)])
        pages.check()
        assert pages.used() == len({page for one in held for page in one})
    for one in held:
        pages.release(one)
    pages.check()
    assert pages.used() == 0
    with pytest.raises(UserError):
        Pages(0, 4)


def test_names_chain_and_the_longest_unused_goes_first() -> None:
    names: list[bytes] = []
    extend(names, salt("a"), [1, 2, 3, 4, 5], 2, 5)
    others: list[bytes] = []
    extend(others, salt("a"), [9, 2, 3, 4], 2, 4)
    assert len(names) == 2
    assert not set(names) & set(others)
    assert salt("ab", "c") != salt("a", "bc")
    pages = Pages(4, 2)
    taken = pages.take(4)
    assert taken is not None
    for page, name in zip(taken, [*names, *others], strict=True):
        pages.publish(page, name)
    pages.release(taken[:2])
    pages.release(taken[2:])
    pages.take(1)
    assert pages.find(names) == taken[:1]  # the end of the older chain went first, its beginning stays
    pages.take(1)
    assert len(pages.find(others)) == 1
