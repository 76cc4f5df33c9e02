"""The verbs of the passport: verify, keygen, sign, export, prove, check-proof, remove."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from criadero.errors import UserError

Folder = Annotated[str, typer.Argument(metavar="DIR", help="a bundled model or a folder")]
PublicKey = Annotated[Path | None, typer.Option("--pubkey", help="the signer's public key: the signature must hold")]


def verify(
    folder: Folder,
    quick: Annotated[bool, typer.Option("--quick", help="read some chunks only, and say what that may miss")] = False,
    deep: Annotated[bool, typer.Option("--deep", help="also compute again what the passport claims")] = False,
    pubkey: PublicKey = None,
    samples: Annotated[int, typer.Option(help="chunks of 4 MiB that --quick reads")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Compare a folder with its passport: every file is hashed, and each difference named.

    Exit codes: 0 all is well; 2 no passport, or one that cannot be read or is of a newer format; 3 a file is changed,
    missing or extra; 4 the passport or its lineage is inconsistent; 5 the signature is bad or missing. Of several the largest.
    """
    from criadero.trust.verify import verify as check

    report = check(folder, quick=quick, deep=deep, pubkey=pubkey, samples=samples)
    if as_json:
        rows = [{"path": one.path, "what": one.what, "detail": one.detail, "code": one.code} for one in report.problems]
        about = {
            "path": str(report.folder),
            "ok": not rows,
            "code": report.code,
            "problems": rows,
            "notes": report.notes,
        }
        print(json.dumps(about, ensure_ascii=False, indent=2))
    else:
        for problem in report.problems:
            print(f"error: {problem}", file=sys.stderr)
        for note in report.notes:
            print(f"note: {note}", file=sys.stderr)
        if not report.problems:
            print(f"{report.folder}: " + ("what was read is" if quick else "every file is") + " as its passport says")
    raise typer.Exit(report.code)


def keygen(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the private key; the public one is FILE.pub")],
    curve: Annotated[str, typer.Option(help="P-256, P-384 or P-521")] = "P-256",
) -> None:
    """Make a key pair for signing. The private key is encrypted with CRIADERO_KEY_PASSWORD when that is set."""
    from criadero.trust.sign import keygen as make

    private, public = make(path, curve=curve, password=os.environ.get("CRIADERO_KEY_PASSWORD"))
    print(f"{private}: keep it to yourself\n{public}: give it to whoever verifies")


def sign(
    folder: Folder,
    key: Annotated[Path, typer.Option("--key", help="the private key (PEM, P-256, P-384 or P-521)")],
) -> None:
    """Sign an artifact, in the format of OpenSSF model signing: writes DIR/passport.sig, once the folder has been verified.

    A password of the key is taken from CRIADERO_KEY_PASSWORD. `model_signing verify key` accepts the signature.
    """
    from criadero.trust.sign import sign as write

    print(write(folder, key, password=os.environ.get("CRIADERO_KEY_PASSWORD")))


def export(
    folder: Folder,
    to: Annotated[
        str,
        typer.Option("--to", help="cyclonedx spdx3 croissant eu-summary model-doc hf-card in-toto openness"),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="a file; default: standard output")] = None,
    lang: Annotated[str, typer.Option(help="of eu-summary: en or es")] = "en",
) -> None:
    """Write a passport in another format. What the passport does not say is left out or named as missing, never made up."""
    from criadero.trust.export import export as write

    text = write(folder, to, lang=lang)
    if out is None:
        print(text, end="")
    else:
        out.write_text(text, encoding="utf-8")
        print(out)


def prove(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="a dataset")],
    doc: Annotated[
        Path,
        typer.Option("--doc", help="a text file with the document, exactly; of a chat, what was said, a turn a line"),
    ],
    out: Annotated[Path | None, typer.Option("--out", help="a file for the proof; default: standard output")] = None,
) -> None:
    """Prove that a document is, or is not, in the training data: anyone can check the proof who knows the data's root."""
    from criadero.trust import prove as proofs

    artifact, members = proofs.open_set(folder)
    proof = proofs.prove(members, proofs.read_document(doc))
    print(f"{artifact.name}: {proofs.check(proof, members.root)}\nroot {members.root}", file=sys.stderr)
    print(f"limit: {proofs.LIMIT}", file=sys.stderr)
    if out is None:
        print(proofs.dumps(proof))
    else:
        out.write_text(proofs.dumps(proof) + "\n", encoding="utf-8")
        print(out)


def check_proof(
    proof: Annotated[Path, typer.Argument(metavar="PROOF", help="a proof that `prove` wrote")],
    root: Annotated[str, typer.Option("--root", help="the data's root: doc_root in the dataset's passport")],
    doc: Annotated[Path | None, typer.Option("--doc", help="the document, to see that the proof speaks of it")] = None,
) -> None:
    """Check a proof of membership against a root, without the data. Exit 2 when it does not hold."""
    from criadero.trust import prove as proofs

    answer = proofs.check(proofs.read_proof(proof), root)
    if doc is not None:
        from criadero.data.docset import document_hash

        if document_hash(proofs.read_document(doc)).hex() != answer.document:
            raise UserError(f"{proof}: the proof holds, but it is about another document than {doc}")
    print(f"the proof holds: {answer}\nlimit: {proofs.LIMIT}")


def remove(
    doc: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="a text file with the document, exactly; of a chat, what was said, a turn a line"
        ),
    ],
    reason: Annotated[str, typer.Option("--reason", help="why it has to go")],
    by: Annotated[str, typer.Option("--by", help="who signs it off")],
    ledger: Annotated[Path, typer.Option("--ledger", help="the list it is added to")] = Path("removals.jsonl"),
) -> None:
    """Sign off a document's removal: add its hash to a ledger, which a data recipe names (removals = ...) to leave it out."""
    from datetime import UTC, datetime

    from criadero.data.docset import add_removal
    from criadero.trust.prove import read_document

    row = add_removal(ledger, read_document(doc), reason=reason, by=by, date=datetime.now(UTC).date().isoformat())
    print(f'{ledger}: {row["sha256"][:12]} listed; build the dataset again with removals = "{ledger}"')


def warn_before_sharing(ref: str) -> None:
    """What was written may be for this machine alone, so it is not refused; but who shares it should know what stands against it."""
    from criadero.artifact import read_passport, resolve
    from criadero.trust.licences import publishable

    path = resolve(ref)
    if not path.is_dir() or read_passport(path) is None:
        return
    try:
        against = publishable(ref)
    except UserError as error:
        print(f"note: what its licences ask cannot be told: {error}", file=sys.stderr)
        return
    if against:
        rules = ", ".join(dict.fromkeys(f"{one.severity}: {one.rule}" for one in against))
        print(f"note: before you share it, {rules}; see criadero licence check {ref} --distribute", file=sys.stderr)


def picture(ref: str, lineage: bool, svg: Path | None) -> None:
    """What `show --lineage` and `show --svg` print and draw."""
    from criadero.artifact import open_artifact
    from criadero.trust.lineage import write_picture

    if svg:
        print(write_picture(ref, svg), file=sys.stderr)
    if lineage:
        print(open_artifact(ref).lineage())


def add(passport_app: typer.Typer) -> None:
    """Register the verbs."""
    for name, verb in (
        ("verify", verify), ("keygen", keygen), ("sign", sign), ("export", export), ("prove", prove),
        ("check-proof", check_proof), ("remove", remove),
    ):  # fmt: skip
        passport_app.command(name)(verb)
