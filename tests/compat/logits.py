"""Run with PYTHONPATH=.compat: loads model folders with transformers 4.51.3 and stores what they compute.

``python logits.py IDS.npy FOLDER...`` writes ``FOLDER/logits-4.51.3.npy`` for each folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

assert transformers.__version__ == "4.51.3", transformers.__version__
ids = torch.from_numpy(np.load(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not info[problem], (problem, info[problem])
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == next(model.parameters()).dtype
    np.save(folder / "logits-4.51.3.npy", logits.float().numpy())
