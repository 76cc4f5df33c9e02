"""Shared by every test: few threads, no network at run time, and where the public data lies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as criadero/__init__.py does: tests import torch before it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="criadero-state-")  # not the developer's own last answer

import pytest

SHARED = Path(os.environ.get("CRIADERO_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public test data (tokenizer files, small trained weights, corpora); see docs."""
    if not SHARED.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"CI must not run without the public test data: {SHARED} is missing")
        pytest.skip(f"the public test data is not here: {SHARED}")
    return SHARED


@pytest.fixture(scope="module")
def one_torch_thread() -> Iterator[None]:
    """For twins so small that PyTorch's threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The URL of a real PostgreSQL, where its programs are installed."""
    import postgres

    if postgres.programs() is None:
        pytest.skip("PostgreSQL (initdb, postgres) is not installed")
    with postgres.server() as url:
        yield url
