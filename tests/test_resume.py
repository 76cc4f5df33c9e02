"""Exact resume: a run that was killed and gone on with ends bit for bit where an unbroken one ends."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import resume_worker
import torch
from safetensors.torch import load_file

from criadero.errors import UserError
from criadero.train import checkpoint

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    resume_worker.work(folder)
    return folder


def start(folder: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    return subprocess.Popen(
        [sys.executable, str(HERE / "resume_worker.py"), str(folder)], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_step(folder: Path, step: int, process: subprocess.Popen) -> None:
    while not any(int(path.name[5:]) >= step for path in (folder / "resume").glob("step-????????")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def assert_same_end(folder: Path, unbroken: Path) -> None:
    ours, theirs = load_file(folder / "final.safetensors"), load_file(unbroken / "final.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, two = (
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second")}
            for line in (place / "metrics.jsonl").read_text().splitlines()
        ]
        for place in (folder, unbroken)
    )
    assert one == two
    assert [line["step"] for line in one] == list(range(1, resume_worker.STEPS + 1))


def test_kill_9_at_a_random_step_and_again(tmp_path: Path, unbroken: Path) -> None:
    first = random.Random(os.getpid()).randint(2, 10)  # another step in every run of the tests
    process = start(tmp_path)
    wait_for_step(tmp_path, first, process)
    process.kill()
    process.wait()
    process.stderr.close()
    assert not (tmp_path / "final.safetensors").exists()
    found = checkpoint.latest(tmp_path / "resume")
    assert found is not None
    assert first <= found[0]["step"] < resume_worker.STEPS
    # and a kill while saving, and one while logging: what is half there is not there
    half = tmp_path / "resume" / f"step-{found[0]['step'] + 1:08d}.partial"
    half.mkdir(exist_ok=True)
    (half / "state.safetensors").write_bytes(b"half")
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 9999, "loss"')
    resume_worker.work(tmp_path)
    assert_same_end(tmp_path, unbroken)
    assert not list((tmp_path / "resume").glob("*.partial"))
    assert len(list((tmp_path / "resume").iterdir())) == 2


def test_moments_matter_to_how_a_run_goes_on(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: gone on with cold, with the weights and without the moments, a run ends elsewhere."""
    interrupted(tmp_path, unbroken, 12, monkeypatch)
    original = checkpoint.load

    def cold(path: Path) -> dict[str, torch.Tensor]:
        kept = ("master", "best")
        return {n: t if n.startswith(kept) else torch.zeros_like(t) for n, t in original(path).items()}

    monkeypatch.setattr(checkpoint, "load", cold)
    resume_worker.work(tmp_path)
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_step_saves_and_can_be_gone_on_with(
    tmp_path: Path, unbroken: Path, number: signal.Signals
) -> None:
    process = start(tmp_path)
    wait_for_step(tmp_path, 3, process)
    process.send_signal(number)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130
    found = checkpoint.latest(tmp_path / "resume")
    assert found is not None
    assert f"stopped after step {found[0]['step']} of {resume_worker.STEPS}; the same command goes on from here" in said
    resume_worker.work(tmp_path)
    assert_same_end(tmp_path, unbroken)


def interrupted(folder: Path, unbroken: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process that Ctrl-C ends after step ``at``."""
    original = resume_worker.noisy_loss
    calls = []

    def loss(*args: object) -> object:
        calls.append(1)
        if len(calls) == 2 * at:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(resume_worker, "noisy_loss", loss)
    with pytest.raises(KeyboardInterrupt):
        resume_worker.work(folder)
    monkeypatch.setattr(resume_worker, "noisy_loss", original)


def test_ctrl_c_in_the_last_step_loses_nothing(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, unbroken, resume_worker.STEPS, monkeypatch)
    monkeypatch.setattr(resume_worker, "noisy_loss", None)  # there is nothing left to compute
    resume_worker.work(tmp_path)
    assert_same_end(tmp_path, unbroken)


def test_a_second_ctrl_c_is_immediate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(resume_worker, "noisy_loss", loss)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        resume_worker.work(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_damaged_newest_point_falls_back_to_the_older(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, unbroken, 9, monkeypatch)
    older, newest = sorted((tmp_path / "resume").iterdir())
    assert (older.name, newest.name) == ("step-00000008", "step-00000009")
    state = newest / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    found = checkpoint.latest(tmp_path / "resume")
    assert found is not None
    assert found[0]["step"] == 8
    resume_worker.work(tmp_path)
    assert_same_end(tmp_path, unbroken)


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"step": 3}'])
def test_a_state_without_a_whole_description_is_not_there(tmp_path: Path, content: bytes | None) -> None:
    checkpoint.save(tmp_path, 2, {"a": torch.ones(3)}, {})
    path = checkpoint.save(tmp_path, 3, {"a": torch.zeros(3)}, {})
    if content is None:
        (path / "state.json").unlink()
    else:
        (path / "state.json").write_bytes(content)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[0]["step"] == 2
    assert torch.equal(checkpoint.load(found[1])["a"], torch.ones(3))
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_other_settings_are_refused_by_name(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, unbroken, 4, monkeypatch)
    with pytest.raises(UserError, match=r"an unfinished run with other settings is here \(dtype changed\)"):
        resume_worker.work(tmp_path, about={"dtype": "float32"})
    resume_worker.work(tmp_path)
    assert_same_end(tmp_path, unbroken)


def test_other_threads_are_said(
    tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sums are then made in another order, and the end is not the same to the bit."""
    interrupted(tmp_path, unbroken, 3, monkeypatch)
    threads = torch.get_num_threads()
    capfd.readouterr()
    torch.set_num_threads(threads + 1)
    try:
        resume_worker.work(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert f"goes on with threads {threads + 1} (before: {threads}): it will end close to" in capfd.readouterr().err


def test_the_dtype_of_an_unfinished_run_is_kept(tmp_path: Path) -> None:
    assert checkpoint.resumed_dtype(tmp_path, "auto") == "auto"
    checkpoint.save(tmp_path, 2, {}, {"about": {"dtype": "torch.bfloat16"}})
    assert checkpoint.resumed_dtype(tmp_path, "auto") == "bfloat16"
    assert checkpoint.resumed_dtype(tmp_path, "float32") == "float32"  # asked for: the change is refused elsewhere


def test_old_points_go_when_the_new_one_is_whole(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100):
        checkpoint.save(tmp_path, step, {"a": torch.ones(3)}, {"x": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000100"]


def test_a_full_disk_leaves_the_earlier_point_whole(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"a": torch.ones(1000)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(Exception, match="File too large"):
            checkpoint.save(tmp_path, 2, {"a": torch.ones(1000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # and the half of it takes no room


def test_a_copied_folder_goes_on_elsewhere(tmp_path: Path, unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path / "here", unbroken, 6, monkeypatch)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    resume_worker.work(tmp_path / "there")
    assert_same_end(tmp_path / "there", unbroken)
