"""lm-eval's `local-completions` against the running server, on a task of a local file: its scores have to be those computed in process.

``lm_eval_scores.py FILE`` (JSON lines with query, choices and gold) runs in lm-eval's environment; what it asked goes, as token ids, to
lm_eval_inprocess.py in ours, which computes each score with the engine alone, and some with transformers in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

TASK = """\
task: local_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{query}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
HERE = Path(__file__).resolve().parent
MODEL = HERE.parents[1] / "criadero" / "bundled" / "cria-chat"
QUESTIONS = 100


def main() -> None:
    file, work = Path(sys.argv[1]).resolve(), Path(os.environ["CRIADERO_WORK"])
    (work / "tasks").mkdir()
    (work / "tasks" / "local_choices.yaml").write_text(TASK.format(file=file), encoding="utf-8")
    began = time.time()
    model = get_model("local-completions")(
        base_url=os.environ["CRIADERO_URL"] + "/v1/completions", model="cria-chat", tokenizer=str(MODEL), tokenizer_backend="huggingface",
        num_concurrent=4, batch_size=1, max_length=512,
    )  # fmt: skip
    found: Any = simple_evaluate(
        model=model, tasks=["local_choices"], task_manager=TaskManager(include_path=str(work / "tasks")), limit=QUESTIONS,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    asked = []
    for sample in found["samples"]["local_choices"]:
        for words, answer in zip(arguments(sample), sample["filtered_resps"], strict=True):
            context, continuation = model._encode_pair(*words)
            asked.append({"context": context, "continuation": continuation, "score": answer[0], "greedy": answer[1]})
    (work / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    command = [os.environ["CRIADERO_PYTHON"], str(HERE / "lm_eval_inprocess.py"), str(MODEL), str(work / "asked.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": ""})
    told = json.loads(done.stdout)
    print(found["results"], told)
    accuracy = found["results"]["local_choices"]["acc,none"]
    tests = {
        "every score is the engine's own, to 1e-6": told["relative"] <= 1e-6,
        "what is greedy is greedy in process": told["greedy_differs"] == 0,
    }
    note = (
        f"{told['scores']} scores of {QUESTIONS} questions of {file.name}: largest relative difference to the engine in process "
        f"{told['relative']:.1e}; to transformers in float32, of {told['peer_scores']}, {told['peer_relative']:.1e} (mean "
        f"{told['peer_mean']:.1e}: bfloat16 here); accuracy {accuracy:.2f}"
    )
    with open(os.environ["CRIADERO_WATCH"], "a", encoding="utf-8") as out:
        for name, right in tests.items():
            outcome = "passed" if right else "failed"
            line = {
                "test": name,
                "outcome": outcome,
                "when": "call",
                "text": "" if right else json.dumps(told),
                "note": note,
            }
            out.write(json.dumps({**line, "began": began, "ended": time.time()}) + "\n")


def arguments(sample: Any) -> list[tuple[str, str]]:
    """(context, continuation) of each choice."""
    given = sample["arguments"]
    rows = given.values() if isinstance(given, dict) else given
    return [tuple(row.values())[:2] if isinstance(row, dict) else tuple(row)[:2] for row in rows]


if __name__ == "__main__":
    main()
