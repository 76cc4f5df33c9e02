"""Guessing ahead changes speed only: greedy tokens stay, samples keep their distribution, the cache is rolled back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engine_cases import PAGE, RUNNERS, engine, ids, model, nothing_is_left, requests, samples
from hypothesis import given, settings
from hypothesis import strategies as st

from criadero.engine.core import run
from criadero.engine.llm import LLM
from criadero.engine.request import Request, SamplingParams
from criadero.engine.sampler import Sampler, draw, uniform
from criadero.engine.speculate import DraftModel, PromptLookup, check_same_words, verify
from criadero.engine.torch_runner import TorchRunner
from criadero.errors import UserError


def draft(seed: int = 0, pages: int = 20, tokens: int = 4, noise: float = 0.0) -> DraftModel:
    """The same model, another, or the same with a little noise: it is right always, never, or often."""
    guesser = tiny.model(seed=seed, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in guesser.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return DraftModel(TorchRunner(guesser, pages=pages, page=PAGE), tokens, chunk=20)


@pytest.mark.parametrize("kind", RUNNERS)
def test_copied_guesses_change_no_token_not_even_a_drawn_one(kind: str) -> None:
    asked = requests(24, 11)
    wanted = [samples(r, o) for r, o in zip(asked, run(engine(kind, pages=100), asked), strict=True)]
    for pages, tokens in ((100, 4), (9, 7)):
        one = engine(kind, pages, speculator=PromptLookup(tokens), chunk=30)
        found = run(one, asked)
        assert [samples(r, o) for r, o in zip(asked, found, strict=True)] == wanted
        usage = [o.usage for outputs in found for o in outputs if o.usage]
        assert sum(u.drafted for u in usage) > sum(u.accepted for u in usage) > 0
        nothing_is_left(one)


@pytest.mark.parametrize(("seed", "noise"), [(0, 0.0), (0, 0.02), (5, 0.0)])
def test_a_draft_models_guesses_change_no_greedy_token(seed: int, noise: float) -> None:
    asked = [r for r in requests(16, 12) if r.params.temperature == 0]
    wanted = [samples(r, o) for r, o in zip(asked, run(engine(pages=100), asked), strict=True)]
    for pages in (100, 8):
        guesser = draft(seed, pages=12 if pages == 8 else 60, noise=noise)
        one = engine(pages=pages, speculator=guesser, chunk=30)
        found = run(one, asked)
        assert [samples(r, o) for r, o in zip(asked, found, strict=True)] == wanted
        usage = [o.usage for outputs in found for o in outputs if o.usage]
        drafted, accepted = sum(u.drafted for u in usage), sum(u.accepted for u in usage)
        assert drafted > 0
        if seed == 0 and not noise:
            assert accepted >= 0.9 * drafted  # an end is guessed too, and not counted
        elif noise:
            assert 0 < accepted < drafted
        nothing_is_left(one)
        guesser.pages.check()
        assert guesser.pages.used() == 0


def test_drawn_answers_of_a_draft_model_repeat_in_any_batch() -> None:
    asked = [
        Request(r.prompt, SamplingParams(temperature=1.0, seed=n, max_tokens=20), tenant=r.tenant)
        for n, r in enumerate(requests(8, 13))
    ]
    alone = [ids(run(engine(speculator=draft(noise=0.02)), [r])[0]) for r in asked]
    one = engine(pages=100, speculator=draft(pages=60, noise=0.02))
    assert [ids(o) for o in run(one, asked)] == alone


# --- the distribution ---


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.8]), st.sampled_from([0, 3]), st.floats(0.2, 3.0))
def test_the_rule_is_exact(seed: int, top_p: float, top_k: int, temperature: float) -> None:
    """P(guess) P(accept) + P(reject) P(instead), summed over all guesses, is p: worked out, not drawn (section 2.3, appendix A.1)."""
    rng = np.random.default_rng(seed)
    main, small = (rng.standard_normal((2, 6)) * 2).astype(np.float32)
    one = Sampler(SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed), [], vocab=6)

    def dense(logits: np.ndarray) -> np.ndarray:
        found, weights = one.distribution(logits.copy())
        out = np.zeros(6)
        out[slice(None) if found is None else found] = weights / weights.sum()
        return out

    p, q = dense(main), dense(small)
    got = np.zeros(6)
    for guess in range(6):
        if q[guess]:
            accept = min(1.0, p[guess] / q[guess])
            rest = np.maximum(p - q, 0)
            got[guess] += q[guess] * accept
            if accept < 1:
                got += q[guess] * (1 - accept) * rest / rest.sum()
    np.testing.assert_allclose(got, p, atol=1e-12)
    # and the code does that: the share of numbers in [0, 1) for which it takes the guess
    guess = draw(one.distribution(small.copy()), 0.5)
    taken = 0
    for place in range(400):
        one.place = place
        token = verify(one, main.copy(), guess, one.distribution(small.copy()))
        taken += token == guess
        assert p[token] > 0
    assert abs(taken / 400 - min(1.0, p[guess] / q[guess])) < 0.11  # 4.4 standard deviations


@pytest.mark.parametrize("settings_", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 10}], ids=str)
def test_samples_keep_their_distribution(settings_: dict[str, Any]) -> None:
    """The second and third token of many answers, with and without guesses, on a vocabulary of eight: chi-square."""
    small = tiny.model(
        seed=3, scale=0.7, vocab_size=8, eos_token_id=None, bos_token_id=None, pad_token_id=None, dtype=torch.float64
    )
    other = tiny.model(
        seed=4, scale=0.7, vocab_size=8, eos_token_id=None, bos_token_id=None, pad_token_id=None, dtype=torch.float64
    )
    count, prompt = 1500, [1, 2]

    def pairs(speculator: Any, first: int) -> np.ndarray:
        from criadero.engine.core import Engine

        one = Engine(TorchRunner(small, pages=600, page=PAGE), sequences=300, speculator=speculator)
        asked = [Request(prompt, SamplingParams(seed=first + n, max_tokens=4, **settings_)) for n in range(count)]
        counts = np.zeros((8, 8))
        for outputs in run(one, asked):
            tokens = ids(outputs)
            counts[tokens[1], tokens[2]] += 1
        return counts

    plain = pairs(None, 0)
    guessed = pairs(DraftModel(TorchRunner(other, pages=600, page=PAGE), 3), 10**6)
    both = plain + guessed
    seen = both > 10
    statistic = ((plain - guessed)[seen] ** 2 / both[seen]).sum()
    freedom = seen.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)  # about four standard deviations; the seeds are fixed
    assert freedom > 8


def test_uniform_streams_differ() -> None:
    assert len({uniform(7, place, stream) for place in range(10) for stream in range(4)}) == 40


# --- what is refused ---


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    words = tiny.tokenizer()
    from criadero.tokenizer import train_bpe

    other = train_bpe(["something else entirely"] * 20, 280)
    with pytest.raises(UserError, match="the draft model has 280 tokens and the model 300"):
        check_same_words(words, other, 300, 280)
    with pytest.raises(UserError, match="not the model's: a draft needs the same tokens"):
        check_same_words(words, other, 300, 300)
    check_same_words(words, words, 300, 300)
    for tokens in (0, 17):
        with pytest.raises(UserError, match="1 to 16 tokens a step can be guessed"):
            PromptLookup(tokens)
        with pytest.raises(UserError, match="1 to 16 tokens a step can be guessed"):
            DraftModel(TorchRunner(model(), pages=2), tokens)


def test_an_llm_with_a_draft(tmp_path: Any) -> None:
    folder = tiny.base(tmp_path / "base")
    plain = LLM(folder, runner="torch", weights="float64").complete("The shop opens", max_tokens=40)
    for guesser in (folder, "lookup"):
        llm = LLM(folder, runner="torch", weights="float64", draft=guesser)
        guessed = llm.complete("The shop opens", max_tokens=40)
        assert guessed.ids == plain.ids
        if guesser != "lookup":
            assert guessed.usage.accepted > 0
    request = Request([1, 2, 3], SamplingParams(max_tokens=20, ignore_eos=True), draft_tokens=0)
    usage = run(engine(speculator=PromptLookup()), [request])[0][-1].usage
    assert usage is not None
    assert usage.drafted == 0
