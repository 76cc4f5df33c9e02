"""The scores that lm_eval_scores.py got over HTTP, computed with the engine alone, and some with transformers: MODEL FILE -> JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from criadero.engine.llm import LLM

PEER = 60  # scores that transformers computes too


def main() -> None:
    model, asked = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    llm = LLM(model, threads=1)
    whole = [one["context"] + one["continuation"] for one in asked]
    relative = 0.0
    differs = 0
    for one, found in zip(asked, llm.logprobs(whole, top=1), strict=True):
        tokens = [token for token in found[len(one["context"]) :] if token is not None]
        score = sum(token.logprob for token in tokens)
        relative = max(relative, abs(score - one["score"]) / abs(score))
        differs += one["greedy"] != all(token.logprob >= max(value for _, value in token.top) for token in tokens)
    torch.set_num_threads(1)
    peer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    differences = []
    for one, ids in list(zip(asked, whole, strict=True))[:PEER]:
        with torch.no_grad():
            logprobs = peer(torch.tensor([ids])).logits[0].log_softmax(-1)
        at = range(len(one["context"]), len(ids))
        score = sum(float(logprobs[place - 1, ids[place]]) for place in at)
        differences.append(abs(score - one["score"]) / abs(score))
    told = {
        "scores": len(asked), "relative": relative, "greedy_differs": differs, "peer_scores": len(differences),
        "peer_relative": max(differences), "peer_mean": sum(differences) / len(differences),
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
