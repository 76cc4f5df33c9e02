"""Signatures: who vouches for a passport, and with it for every file that it lists.

The format is that of OpenSSF model signing (https://github.com/ossf/model-signing-spec): a Sigstore bundle with a DSSE envelope
around an in-toto statement that names every file by its sha256, signed with an elliptic-curve key (P-256, P-384 or P-521).
`model_signing verify key` accepts ours, and its own are accepted here. ``passport.json`` must be among the signed files: its id
covers the rest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from criadero.artifact import require, resolve
from criadero.errors import UserError
from criadero.merkle import sha256_file
from criadero.passport import (
    BAD_SIGNATURE,
    LARGEST,
    PASSPORT,
    SIGNATURE,
    Problem,
    parse_json,
    read_limited,
    read_passport,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey

PAYLOAD = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
CURVES = ("P-256", "P-384", "P-521")


# -- keys -------------------------------------------------------------------------------------------------------------


def keygen(path: str | Path, *, curve: str = "P-256", password: str | None = None) -> tuple[Path, Path]:
    """Make a key pair: `path` holds the private key (PKCS 8, readable by its owner only), ``path.pub`` the public one.

    UserError: a file that exists, a folder that is an artifact (a private key must not travel with it), an unknown curve.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, public = Path(path), Path(f"{path}.pub")
    if curve not in CURVES:
        raise UserError(f"unknown curve {curve!r}: it is one of {', '.join(CURVES)} (what model_signing reads too)")
    for file in (private, public):
        if file.exists():
            raise UserError(f"{file} exists: a key is never overwritten; choose another name")
    if not private.parent.is_dir():
        raise UserError(f"{private.parent} is not a folder: make it first")
    if any((above / PASSPORT).exists() for above in [private.absolute().parent, *private.absolute().parents]):
        raise UserError(f"{private} would lie in an artifact: keep a private key where it is not published")
    curves: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
    key = ec.generate_private_key(curves[curve])
    lock = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    with open(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(text)
    public.write_bytes(_pem(key.public_key()))
    return private, public


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _read_private(path: str | Path, password: str | None) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization

    try:
        data = read_limited(Path(path), 1 << 16)
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a private key: {_reason(error)}") from None
    return _checked(key, path)


def read_public(path: str | Path) -> EllipticCurvePublicKey:
    """An elliptic-curve public key from a PEM file; UserError for anything else."""
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(read_limited(Path(path), 1 << 16))
    except (OSError, ValueError) as error:
        more = " (a private key does not verify; give the .pub file)" if "PRIVATE" in _peek(path) else ""
        raise UserError(f"{path}: cannot be read as a public key: {_reason(error)}{more}") from None
    return _checked(key, path)


def _peek(path: str | Path) -> str:
    try:
        return read_limited(Path(path), 1 << 16)[:100].decode(errors="replace")
    except (OSError, ValueError):
        return ""


def _reason(error: Exception) -> str:
    text = " ".join((getattr(error, "strerror", None) or str(error)).split())
    return text if len(text) < 100 else text[:97] + "..."


def _checked(key: Any, path: str | Path) -> Any:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        what = curve or type(key).__name__.lstrip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
        raise UserError(f"{path}: a key of kind {what} is not used here: make one with criadero passport keygen")
    return key


def _algorithm(key: EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    sizes: dict[int, hashes.HashAlgorithm] = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
    return ec.ECDSA(sizes[key.curve.key_size])


# -- signing ----------------------------------------------------------------------------------------------------------


def sign(ref: str | Path, key: str | Path, *, password: str | None = None) -> Path:
    """Sign an artifact: writes ``passport.sig`` into it, which `verify` does not count as extra. Returns its path.

    The folder is verified first: UserError when it is not as its passport says, or the key cannot be read.
    """
    private = _read_private(key, password)
    folder = require(ref)
    passport = read_passport(folder)
    assert passport is not None
    bundle = envelope(statement(folder, passport), private)
    file = folder / SIGNATURE
    temporary = folder.with_name(f".{folder.name}.{SIGNATURE}.tmp")
    temporary.write_bytes(_compact(bundle))
    os.replace(temporary, file)
    return file


def statement(folder: Path, passport: Mapping[str, Any]) -> dict[str, Any]:
    """The in-toto statement over a verified folder: the passport's files, and the passport itself."""
    hashes = {row["path"]: row["sha256"] for row in passport["files"]}
    hashes[PASSPORT] = sha256_file(folder / PASSPORT).removeprefix("sha256:")
    rows = [{"name": name, "algorithm": "sha256", "digest": hashes[name]} for name in sorted(hashes, key=PurePosixPath)]
    ignored = sorted({SIGNATURE, "model.sig"} | ({"resume"} if (folder / "resume").exists() else set()))
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored}
    return {
        "_type": STATEMENT,
        "subject": [{"name": folder.resolve().name, "digest": {"sha256": _subject(rows)}}],
        "predicateType": PREDICATE,
        "predicate": {"resources": rows, "serialization": serialization},
    }


def _subject(rows: Sequence[Mapping[str, str]]) -> str:
    """The digest of all digests, in their order."""
    return hashlib.sha256(b"".join(bytes.fromhex(row["digest"]) for row in rows)).hexdigest()


def envelope(content: Mapping[str, Any], key: EllipticCurvePrivateKey) -> dict[str, Any]:
    """A Sigstore bundle (v0.3) with the signed statement in a DSSE envelope."""
    payload = json.dumps(content, indent=2, ensure_ascii=False).encode()
    signed = key.sign(_pae(payload), _algorithm(key.public_key()))
    public = key.public_key()
    hint = hashlib.sha256(_pem(public)).hexdigest()
    return _bundle(base64.b64encode(payload).decode(), base64.b64encode(signed).decode(), hint)


def _bundle(payload: str, signed: str, hint: str | None) -> dict[str, Any]:
    return {
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": hint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": payload,
            "payloadType": PAYLOAD,
            "signatures": [{"sig": signed, "keyid": ""}],
        },
    }


def _compact(bundle: Mapping[str, Any]) -> bytes:
    return json.dumps(bundle, separators=(",", ":"), ensure_ascii=False).encode()


def _decode(text: str) -> bytes:
    """Base64 in the one way that it is written: no other letters, no bits left over."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("its base64 has bits left over")
    return data


def _pae(payload: bytes) -> bytes:
    """What is signed: DSSE's pre-authentication encoding (secure-systems-lab/dsse, protocol.md)."""
    return f"DSSEv1 {len(PAYLOAD)} {PAYLOAD} {len(payload)} ".encode() + payload


# -- checking ---------------------------------------------------------------------------------------------------------


def signature_of(folder: Path) -> Path | None:
    """The signature file beside a passport: ours, or the name that model_signing gives by default."""
    return next((folder / name for name in (SIGNATURE, "model.sig") if (folder / name).exists()), None)


def signature_problems(folder: Path, passport: Mapping[str, Any], public: EllipticCurvePublicKey) -> list[Problem]:
    """What is wrong with the signature of a folder; the files' hashes are taken from the passport, which `verify` compares."""
    file = signature_of(resolve(folder))
    if file is None:
        return [Problem(SIGNATURE, "missing", "not signed, and a public key was given", BAD_SIGNATURE)]
    try:
        signed = _open_bundle(read_limited(file, 4 * LARGEST), public)
        rows = {row["name"]: row["digest"] for row in signed["predicate"]["resources"]}
        if len(rows) != len(signed["predicate"]["resources"]):
            raise ValueError("it names a file twice")
        here = {row["path"]: row["sha256"] for row in passport["files"]}
        here[PASSPORT] = sha256_file(folder / PASSPORT).removeprefix("sha256:")
        if PASSPORT not in rows:
            raise ValueError(f"it does not cover {PASSPORT}")
        if rows[PASSPORT] != here[PASSPORT]:
            raise ValueError("it was made for another passport: the folder is not what was signed")
        ignored = [str(one) for one in signed["predicate"]["serialization"].get("ignore_paths") or []]
        for name in sorted(here.keys() | rows.keys()):
            skipped = any(PurePosixPath(name).is_relative_to(one) for one in ignored)
            if here.get(name) != rows.get(name) and not (skipped and name not in rows):
                raise ValueError(f"it was made for another {name}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        detail = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else _reason(error)
        return [Problem(file.name, "inconsistent", detail, BAD_SIGNATURE)]
    return []


def _open_bundle(data: bytes, public: EllipticCurvePublicKey) -> dict[str, Any]:
    """The statement in a bundle, its signature checked with the key. ValueError in words when it does not hold."""
    from cryptography.exceptions import InvalidSignature

    bundle = parse_json(data)
    wrapped = bundle["dsseEnvelope"]
    if bundle["mediaType"] != BUNDLE:
        raise ValueError(f"it is not a Sigstore bundle of the kind {BUNDLE}")
    hint = (bundle.get("verificationMaterial", {}).get("publicKey") or {}).get("hint")
    if hint and hint != hashlib.sha256(_pem(public)).hexdigest():
        raise ValueError("it was made with another key")
    payload = _decode(wrapped["payload"])
    if wrapped["payloadType"] != PAYLOAD or len(wrapped["signatures"]) != 1:
        raise ValueError("it is not one signature over an in-toto statement")
    try:
        public.verify(_decode(wrapped["signatures"][0]["sig"]), _pae(payload), _algorithm(public))
    except InvalidSignature:
        raise ValueError("the signature does not hold for this key") from None
    # Nothing but what is signed may differ from one bundle to the next: else its other parts could be changed unseen.
    if bundle != _bundle(wrapped["payload"], wrapped["signatures"][0]["sig"], hint) or _compact(bundle) != data:
        raise ValueError("it holds more than a signature, or is written in another way")
    signed = parse_json(payload)
    if signed["_type"] != STATEMENT or signed["predicateType"] != PREDICATE or len(signed["subject"]) != 1:
        raise ValueError("it does not say what model signing v1.0 says")
    how, rows = signed["predicate"]["serialization"], signed["predicate"]["resources"]
    if how["method"] != "files" or any(row["algorithm"] != "sha256" for row in rows):
        raise ValueError("its files are hashed in another way than by sha256 of each file")
    if signed["subject"][0]["digest"]["sha256"] != _subject(rows):
        raise ValueError("its digest is not that of its files")
    return signed
