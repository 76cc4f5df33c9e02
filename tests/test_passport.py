"""Passports that were tampered with, signed, or written to deceive: `criadero.trust.verify`, `sign`, `prove`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from criadero import artifact, merkle, passport
from criadero.artifact import create, open_artifact
from criadero.data.docset import DocumentSet, document_hash, write_set
from criadero.errors import UserError
from criadero.passport import passport_id, read_passport
from criadero.recipe import canonical_json
from criadero.trust import prove as proofs
from criadero.trust import sign as signing
from criadero.trust.verify import missed, require, verify

CHUNK = 1 << 10


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 1 KiB, so that small files have several."""
    monkeypatch.setattr(artifact, "CHUNK", CHUNK)
    monkeypatch.setattr(artifact, "hash_file", lambda path: merkle.hash_file(path, CHUNK))


def make(out: Path, *, size: int = 10_000, kind: str = "base", **inputs: Path) -> Path:
    with create(out, kind=kind, config={"lr": 0.1}, licence="MIT") as draft:
        for relation, ref in inputs.items():
            draft.add_input(relation, ref)
        (draft.path / "model.bin").write_bytes(bytes(n % 251 for n in range(size)))
        (draft.path / "config.json").write_text("{}")
        line = {"step": 3, "tokens": 9, "held_out": {"en": {"loss": 1.5}}}
        (draft.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        draft.metrics.append({"suite": "held_out", "metric": "loss", "slice": "en", "value": 1.5, "n": 4})
        draft.step.update({"steps": 3, "tokens": 9})
    return out


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any], *, reseal: bool = True) -> None:
    """Change a passport, and (as a forger would) give it the id and the bytes that belong to it."""
    file = folder / "passport.json"
    one = json.loads(file.read_text())
    change(one)
    if reseal:
        one["id"] = passport_id(one)
    file.write_bytes(canonical_json(one) + b"\n")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "keys").mkdir()
    return signing.keygen(tmp_path / "keys" / "k")


# -- the tree -----------------------------------------------------------------------------------------------------------


def test_one_pass_gives_both_hashes(tmp_path: Path) -> None:
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 7 * CHUNK + 3):
        data = os.urandom(size)
        (tmp_path / "f").write_bytes(data)
        one = merkle.hash_file(tmp_path / "f", CHUNK)
        assert (one.size, "sha256:" + one.sha256) == (size, merkle.sha256_file(tmp_path / "f"))
        leaves = [merkle.leaf_hash(data[at : at + CHUNK]) for at in range(0, size, CHUNK)]
        assert merkle.split_hashes(one.leaves) == leaves
        assert [merkle.chunk_leaf(tmp_path / "f", n, CHUNK) for n in range(len(leaves))] == leaves


def test_a_small_artifact_has_a_root_and_no_file_of_chunks(tmp_path: Path) -> None:
    one = open_artifact(make(tmp_path / "m"))
    files = [(name, merkle.hash_file(path)) for name, path in passport.walk(one.path) if name != "passport.json"]
    assert one.passport["merkle"] == {
        "alg": "sha256", "chunk": 1 << 22, "root": merkle.folder_root((n, h.size, h.leaves) for n, h in files),
    }  # fmt: skip
    assert "every" not in str(verify(one.path, quick=True).notes)


@pytest.mark.usefixtures("small_chunks")
def test_quick_reads_some_chunks_and_says_what_it_may_miss(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", size=200 * CHUNK)
    assert (folder / "passport.chunks").stat().st_size == 32 * 202
    report = verify(folder, quick=True, samples=101)
    assert report.problems == []
    assert "101 of 202 chunks" in report.notes[0]
    assert "missed with probability 50.0%" in report.notes[0]
    data = bytearray((folder / "model.bin").read_bytes())
    data[77 * CHUNK] ^= 1
    (folder / "model.bin").write_bytes(data)
    found = verify(folder, quick=True, samples=202)
    assert [(str(p), p.code) for p in found.problems] == [("model.bin: changed (chunk 77)", 3)]
    caught = sum(bool(verify(folder, quick=True, samples=101).problems) for _ in range(40))
    assert 5 <= caught <= 35  # half of them; outside by chance once in ten million
    assert [p.path for p in verify(folder).problems] == ["model.bin"]


def test_the_chance_of_a_miss_by_counting() -> None:
    from itertools import combinations

    chunks, read, changed = 8, 3, 2
    draws = list(combinations(range(chunks), read))
    assert missed(chunks, read, changed) == pytest.approx(sum(not {0, 1} & {*d} for d in draws) / len(draws))
    assert (missed(5, 5), missed(5, 4, 2), missed(4, 1)) == (0, 0, 0.75)


# -- exit codes by kind -------------------------------------------------------------------------------------------------


def lines(folder: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the lines of lineage.jsonl, and give the passport the hash of the new file and a new id."""
    file = folder / "lineage.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    change(rows)
    file.write_bytes(b"".join(canonical_json(row) + b"\n" for row in rows))

    def hashes(one: dict[str, Any]) -> None:
        row = next(row for row in one["files"] if row["path"] == "lineage.jsonl")
        row |= {"size": file.stat().st_size, "sha256": merkle.sha256_file(file)[7:]}

    rewrite(folder, hashes)


def forged(row: dict[str, Any]) -> dict[str, Any]:
    row["licence"] = {"declared": "CC0-1.0"}
    row["id"] = passport_id(row)
    return row


HARMS: list[tuple[str, int, Callable[[Path], Any]]] = [
    ("a file changed", 3, lambda m: (m / "model.bin").write_bytes(b"x")),
    ("a file missing", 3, lambda m: (m / "model.bin").unlink()),
    ("a file added", 3, lambda m: (m / "more.py").write_text("")),
    ("a file is a folder", 3, lambda m: ((m / "config.json").unlink(), (m / "config.json").mkdir())),
    ("a metric edited", 4, lambda m: rewrite(m, lambda p: p["metrics"][0].update(value="0.1"), reseal=False)),
    ("a fraction", 2, lambda m: (m / "passport.json").write_text('{"passport": "criadero/1", "n": 0.5}')),
    ("blanks added", 4, lambda m: (m / "passport.json").write_text((m / "passport.json").read_text() + " ")),
    ("no JSON", 2, lambda m: (m / "passport.json").write_text("{")),
    ("a key twice", 2, lambda m: (m / "passport.json").write_text('{"passport": "criadero/1", "id": "", "id": "x"}')),
    ("a newer format", 2, lambda m: rewrite(m, lambda p: p.update(passport="criadero/2", files={}))),
    ("no passport", 2, lambda m: (m / "passport.json").unlink()),
    ("a file listed twice", 4, lambda m: rewrite(m, lambda p: p["files"].append(p["files"][0]))),
    ("no lineage", 4, lambda m: lines(m, lambda rows: rows.clear())),
    ("an ancestor edited", 4, lambda m: lines(m, lambda rows: rows[0].update(name="other"))),
    ("an ancestor replaced", 4, lambda m: lines(m, lambda rows: rows.append(forged(rows.pop(0))))),
    ("a foreign ancestor", 4, lambda m: lines(m, lambda rows: rows.append(forged(dict(rows[0]))))),
    ("an ancestor of a newer format", 4, lambda m: lines(m, lambda rows: rows[0].update(passport="criadero/7"))),
]  # fmt: skip


@pytest.mark.parametrize(("code", "harm"), [pytest.param(c, h, id=name.replace(" ", "-")) for name, c, h in HARMS])
def test_each_kind_of_failure_has_its_exit_code(tmp_path: Path, code: int, harm: Callable[[Path], Any]) -> None:
    make(tmp_path / "base")
    folder = make(tmp_path / "m", finetune_of=tmp_path / "base")
    assert verify(folder, deep=True).code == 0
    harm(folder)
    for way in ({}, {"quick": True}, {"deep": True}):
        if code == 2:
            with pytest.raises(UserError, match=r"passport\.json"):
                verify(folder, **way)
        else:
            assert verify(folder, **way).code == code, way


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p["metrics"][0].update(value="0.1"), "loss of en is 0.1, metrics.jsonl says 1.5"),
        (lambda p: p["metrics"][0].update(ci=["2.0", "3.0"]), "outside its own interval"),
        (lambda p: p["metrics"][0].update(n=-1), "no count"),
        (lambda p: p["step"].update(tokens=8), "metrics.jsonl: inconsistent (it ends at tokens 9"),
        (lambda p: p["merkle"].update(root="sha256:" + "0" * 64), "root of its hash tree"),
        (lambda p: p.update(created="2001-01-01T00:00:00Z"), "created comes before ended"),
        (lambda p: p["inputs"][0].update(relation="friend_of"), "unknown relation 'friend_of'"),
        (lambda p: p["metrics"][0].update(value="good"), "cannot be checked"),
    ],
)
def test_deep_finds_what_was_sealed_untrue(tmp_path: Path, change: Callable[[dict[str, Any]], Any], words: str) -> None:
    make(tmp_path / "base")
    folder = make(tmp_path / "m", finetune_of=tmp_path / "base")
    rewrite(folder, change)
    assert verify(folder).problems == []  # nothing but the claims is wrong: a signature or deep check is what finds it
    report = verify(folder, deep=True)
    assert words in "\n".join(map(str, report.problems))
    assert report.code == 4


@pytest.mark.parametrize(("later", "code"), [(0.5, 0), (30, 4)])
def test_clocks_may_differ_by_less_than_a_day(tmp_path: Path, later: float, code: int) -> None:
    """What something was made of may say that it is younger, when it was sealed on another machine."""
    make(tmp_path / "base")
    moment = datetime.now(UTC) + timedelta(days=later)
    rewrite(tmp_path / "base", lambda p: p.update(created=moment.isoformat()))
    folder = make(tmp_path / "m", finetune_of=tmp_path / "base")
    assert verify(folder, deep=True).code == code


def test_the_command_line_gives_the_codes(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    run = [sys.executable, "-m", "criadero.cli", "passport", "verify", str(folder)]
    (folder / "config.json").write_text("[]")
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "error: config.json: changed\n")
    done = subprocess.run([*run, "--json", "--quick"], capture_output=True, text=True)
    assert (done.returncode, json.loads(done.stdout)["problems"][0]["what"]) == (3, "changed")


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_a_passport_that_is_nothing_but_nesting_or_endless_costs_little(tmp_path: Path) -> None:
    file = tmp_path / "passport.json"
    file.write_bytes(b"[" * (passport.LARGEST - 1))
    began = time.process_time()
    with pytest.raises(UserError, match="nested too deeply"):
        read_passport(tmp_path)
    with file.open("wb") as stream:
        stream.truncate(1 << 30)  # a file of 1 GiB that takes no room
    with pytest.raises(UserError, match="1,073,741,824 bytes"):
        read_passport(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a regular file"):
        read_passport(tmp_path)
    assert time.process_time() - began < 20


def test_a_lineage_that_loops_or_is_very_long(tmp_path: Path) -> None:
    make(tmp_path / "base")
    folder = make(tmp_path / "m", finetune_of=tmp_path / "base")

    def loop(rows: list[dict[str, Any]]) -> None:
        rows[0]["inputs"] = [{"relation": "finetune_of", "id": rows[0]["id"], "name": "itself", "verified": True}]

    lines(folder, loop)
    assert verify(folder).code == 4
    assert open_artifact(folder).lineage().count("(above)") == 1  # it ends
    (folder / "lineage.jsonl").write_text("{}\n" * (passport.MOST_ANCESTORS + 1))
    with pytest.raises(UserError, match="10,000 ancestors"):
        open_artifact(folder).ancestors()
    (folder / "lineage.jsonl").write_text('{"id": "x", "inputs": 5}\n')
    with pytest.raises(UserError, match=r"lineage\.jsonl, line 1: is not a passport"):
        open_artifact(folder).lineage()


def test_a_model_is_not_opened_when_its_passport_is_required(tmp_path: Path) -> None:
    folder = make(tmp_path / "m")
    assert artifact.require(folder) == require(folder) == open_artifact(folder, require_passport=True).path == folder
    (folder / "config.json").write_text("[]")
    for call in (artifact.require, require, partial(open_artifact, require_passport=True)):
        with pytest.raises(UserError, match=r"m is not opened, a passport is required: config\.json: changed"):
            call(folder)


# -- signatures ---------------------------------------------------------------------------------------------------------


def test_a_signature_holds_and_is_no_extra_file(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make(tmp_path / "m")
    signing.sign(folder, keys[0])
    assert artifact.verify(folder) == []
    report = verify(folder, pubkey=keys[1])
    assert (report.code, report.notes) == (0, [f"signed with the key {keys[1]}"])
    assert "not checked" in verify(folder).notes[0]
    assert (keys[0].stat().st_mode & 0o777) == 0o600
    moved = shutil.copytree(folder, tmp_path / "other name")
    assert verify(moved, pubkey=keys[1]).code == 0


def test_signatures_that_do_not_hold(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    folder = make(tmp_path / "m")
    assert verify(folder, pubkey=keys[1]).code == 5  # not signed
    signing.sign(folder, keys[0])
    old = (folder / "passport.sig").read_bytes()
    other = signing.keygen(tmp_path / "keys" / "other")
    assert "another key" in str(verify(folder, pubkey=other[1]).problems[0])
    # sealed anew with another metric: every hash is right, only the signature is not
    rewrite(folder, lambda p: p["metrics"][0].update(value="1.49999"))
    assert verify(folder).code == 0
    assert [(p.path, p.code) for p in verify(folder, pubkey=keys[1]).problems] == [("passport.sig", 5)]
    make(tmp_path / "new", size=20_000)
    (tmp_path / "new" / "passport.sig").write_bytes(old)  # an old signature on another folder
    assert "another passport" in str(verify(tmp_path / "new", pubkey=keys[1]).problems[0])
    bundle = json.loads(old)
    for spoil in (
        lambda b: b["dsseEnvelope"]["signatures"].clear(),
        lambda b: b["dsseEnvelope"].update(payload=b["dsseEnvelope"]["payload"][:-8]),
        lambda b: b.update(mediaType="text/plain"),
        lambda b: b.pop("dsseEnvelope"),
        lambda b: b["dsseEnvelope"]["signatures"][0].update(sig="AAAA"),
    ):
        bad = json.loads(json.dumps(bundle))
        spoil(bad)
        (folder / "passport.sig").write_text(json.dumps(bad))
        assert verify(folder, pubkey=keys[1]).code == 5
    (folder / "passport.sig").write_bytes(b"\x00[")
    assert verify(folder, pubkey=keys[1]).code == 5


def test_keys_that_are_refused(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    folder = make(tmp_path / "m")
    with pytest.raises(UserError, match="would lie in an artifact"):
        signing.keygen(folder / "k")
    with pytest.raises(UserError, match="never overwritten"):
        signing.keygen(keys[0])
    with pytest.raises(UserError, match="unknown curve 'rsa'"):
        signing.keygen(tmp_path / "x", curve="rsa")
    with pytest.raises(UserError, match=r"give the \.pub file"):
        verify(folder, pubkey=keys[0])
    with pytest.raises(UserError, match="cannot be read as a private key"):
        signing.sign(folder, keys[1])
    locked = signing.keygen(tmp_path / "keys" / "locked", password="secret")
    with pytest.raises(UserError, match="cannot be read as a private key"):
        signing.sign(folder, locked[0])
    signing.sign(folder, locked[0], password="secret")
    assert verify(folder, pubkey=locked[1]).code == 0
    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ed").write_bytes(pem)
    with pytest.raises(UserError, match="kind Ed25519 is not used"):
        signing.sign(folder, tmp_path / "ed")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not opened"):
        signing.sign(folder, keys[0])


@pytest.mark.parametrize("curve", signing.CURVES)
def test_the_openssf_tool_reads_ours_and_we_read_its(tmp_path: Path, curve: str) -> None:
    model_signing = pytest.importorskip("model_signing", reason="model-signing is not installed (extra: sign)")
    pytest.importorskip("model_signing.signing", reason="model-signing cannot be imported")
    (tmp_path / "keys").mkdir()
    private, public = signing.keygen(tmp_path / "keys" / "k", curve=curve)
    folder = make(tmp_path / "m")
    (folder / "resume").mkdir()
    (folder / "resume" / "state").write_text("x")

    def theirs(model: Path, signature: Path) -> None:
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
        config.verify(model, signature)

    theirs(folder, signing.sign(folder, private))
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"Hash mismatch for 'config\.json'"):
        theirs(folder, folder / "passport.sig")
    other = make(tmp_path / "n")
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=private)
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"])
    signer.set_hashing_config(hashing).sign(other, other / "model.sig")
    assert verify(other, pubkey=public).code == 0
    theirs(other, other / "model.sig")
    rewrite(other, lambda p: p.update(version="2"))
    assert verify(other, pubkey=public).code == 5


# -- proofs of membership -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 255, 256, 257, 1000])
def test_proofs_either_way(tmp_path: Path, count: int) -> None:
    texts = [f"Document {n}." for n in range(count)]
    root = write_set(tmp_path / "set", sorted(map(document_hash, texts)))
    members = DocumentSet(tmp_path / "set")
    for n in {0, 1, count // 2, count - 1} & set(range(count)):
        proof = json.loads(proofs.dumps(proofs.prove(members, texts[n] + "\n\n")))
        assert proofs.check(proof, root).included
        with pytest.raises(UserError, match="does not hold"):
            proofs.check({**proof, "included": False}, root)
    for n in range(60):
        proof = proofs.prove(members, f"No such text {n}.")
        assert not proofs.check(proof, root).included
        with pytest.raises(UserError, match="does not hold"):
            proofs.check({**proof, "included": True}, root)


def test_a_proof_cannot_be_bent(tmp_path: Path) -> None:
    texts = [f"Document {n}." for n in range(300)]
    root = write_set(tmp_path / "set", sorted(map(document_hash, texts)))
    members = DocumentSet(tmp_path / "set")
    inside, outside = proofs.prove(members, texts[5]), proofs.prove(members, "absent")
    # that an included document were absent: the neighbours of another place do not enclose it, nor does a gap of two
    with pytest.raises(UserError, match="enclose"):
        proofs.check({**outside, "document": inside["document"]}, root)
    changes: list[dict[str, Any]] = [
        {"documents": 299}, {"documents": 301}, {"position": inside["position"] + 1}, {"position": -1},
        {"document": "00" * 32}, {"document": "zz"}, {"hashes": inside["hashes"][:-44]}, {"hashes": "!"},
        {"hashes": inside["hashes"] + "A" * 44}, {"proof": "criadero/membership/9"}, {"position": True}, {"documents": 2**70},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(UserError, match="does not hold"):
            proofs.check({**inside, **change}, root)
    with pytest.raises(UserError, match="'hashes' is missing"):
        proofs.check({key: value for key, value in inside.items() if key != "hashes"}, root)
    with pytest.raises(UserError, match="does not lead to this root"):
        proofs.check(inside, "sha256:" + "0" * 64)


def test_an_adapter_is_opened_only_on_a_base_that_is_whole(tmp_path: Path) -> None:
    make(tmp_path / "base")
    with create(tmp_path / "shop", kind="adapter", config={}) as draft:
        draft.add_input("finetune_of", tmp_path / "base")
        (draft.path / "adapter_config.json").write_text('{"base_model_name_or_path": "../base"}')
    assert require(tmp_path / "shop") == tmp_path / "shop"
    (tmp_path / "base" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"base is not opened, a passport is required: config\.json: changed"):
        require(tmp_path / "shop")


def test_load_asks_for_the_passport(tmp_path: Path) -> None:
    from criadero.checkpoints import load_model

    folder = shutil.copytree(artifact.BUNDLED / "cria", tmp_path / "cria")
    assert load_model(folder, require_passport=True)
    (folder / "README.md").write_text("nothing of the kind")
    with pytest.raises(UserError, match=r"is not opened, a passport is required: README\.md: changed"):
        load_model(folder, require_passport=True)


def test_no_bit_of_a_signature_can_be_changed(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    """Not even of those parts that are not signed: names of keys, empty fields, the bits that base64 leaves over."""
    folder = make(tmp_path / "m", size=10)
    data = signing.sign(folder, keys[0]).read_bytes()
    payload = range(
        data.index(b'"payload":"') + 11, data.index(b'","payloadType"') - 8
    )  # its middle is signed: a few are enough
    for at in [*range(payload.start), *payload[::97], *range(payload.stop, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        (folder / "passport.sig").write_bytes(changed)
        assert verify(folder, pubkey=keys[1]).code == 5, changed[max(0, at - 20) : at + 20]
