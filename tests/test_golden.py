"""A small model that others trained says what its authors' program says, on every road through this package.

stories260K (MIT, karpathy/llama2.c): greedy, 200 tokens; the expected text is the output of llama2.c's run.c.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import llama2c
import pytest
import torch

from criadero.checkpoints import load_model, read_gguf_tokenizer, save_hf, write_gguf
from criadero.checkpoints.states import build
from criadero.model import KVCache, Llama
from criadero.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_vocab


@pytest.fixture(scope="module")
def stories(shared: Path) -> tuple[Llama, Tokenizer, str]:
    folder = shared / "weights" / "stories260K"
    config, state = llama2c.read_model(folder / "stories260K.bin")
    pieces = llama2c.read_vocabulary(folder / "tok512.bin", config.vocab_size)
    tokens, types = [], []
    for id, (piece, _) in enumerate(pieces):
        text = piece.decode()
        if id < 3:
            tokens.append(("<unk>", "<s>", "</s>")[id])
            types.append((2, 3, 3)[id])
        elif id < 259:
            tokens.append(text)
            types.append(6)
        else:
            tokens.append(text.replace(" ", "▁"))
            types.append(1)
    scores = [score for _, score in pieces]
    tokenizer = tokenizer_from_vocab("spm", tokens, scores=scores, types=types, bos_id=1, eos_id=2)
    return build(config, state), tokenizer, (folder / "expected_greedy_200.txt").read_text()


@torch.no_grad()
def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    """``count`` further ids, through the cache, one at a time."""
    cache = KVCache(model.config, 1, len(ids) + count, torch.float32)
    logits = model(torch.tensor([ids]), attend=cache)
    out: list[int] = []
    for _ in range(count):
        out.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([out[-1:]]), attend=cache)
    return out


def words(tokenizer: Tokenizer, ids: list[int], expected: str) -> None:
    """The program ends its text with a line feed."""
    assert tokenizer.decode(ids).rstrip("\n") == expected.rstrip("\n")


def test_golden_200_tokens(stories: tuple[Llama, Tokenizer, str]) -> None:
    model, tokenizer, expected = stories
    words(tokenizer, greedy(model, [1], 200), expected)


@torch.no_grad()
def test_the_full_forward_agrees_at_every_step(stories: tuple[Llama, Tokenizer, str]) -> None:
    model, _, _ = stories
    ids = [1, *greedy(model, [1], 200)]
    assert model(torch.tensor([ids]))[0, :-1].argmax(-1).tolist() == ids[1:]


def test_golden_through_a_folder_and_transformers(stories: tuple[Llama, Tokenizer, str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer, expected = stories
    save_hf(model, model.config, tmp_path)
    tokenizer.save(tmp_path)
    words(load_tokenizer(tmp_path), greedy(load_model(tmp_path), [1], 200), expected)
    twin = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    ids = twin.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False, pad_token_id=0)[0]
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = reader.decode(ids, skip_special_tokens=True)
    assert text.strip() == expected.strip()


def test_golden_through_gguf(stories: tuple[Llama, Tokenizer, str], tmp_path: Path) -> None:
    model, tokenizer, expected = stories
    path = tmp_path / "stories.gguf"
    write_gguf(model, tokenizer, path, type="F32")
    again = read_gguf_tokenizer(path)
    assert again is not None
    assert again.encode(expected) == tokenizer.encode(expected)
    words(again, greedy(load_model(path), again.encode("", bos=True), 200), expected)


def test_prompts_are_cut_as_llama2c_cuts_them(stories: tuple[Llama, Tokenizer, str], shared: Path) -> None:
    """Again and again the neighbours whose joint piece has the best score, the leftmost of equals."""
    _, tokenizer, expected = stories
    pieces = llama2c.read_vocabulary(shared / "weights" / "stories260K" / "tok512.bin", 512)
    known = {piece: id for id, (piece, _) in enumerate(pieces) if id >= 259}
    for text in (expected, "Zoë sagt: “¡hola!”", "a  b\tc", "Lilyyyyy", "    "):
        ids: list[int] = []
        for character in " " + text:
            data = character.encode()
            ids += [known[data]] if data in known else [byte + 3 for byte in data]
        while True:
            joint = [known.get(pieces[a][0] + pieces[b][0]) for a, b in pairwise(ids)]
            found = [(-pieces[id][1], at, id) for at, id in enumerate(joint) if id is not None]
            if not found:
                break
            _, at, id = min(found)
            ids[at : at + 2] = [id]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
