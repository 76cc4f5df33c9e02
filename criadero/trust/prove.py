"""Was this document in the training data? A proof either way, which anyone can check who knows the data's root.

The root stands in the dataset's passport (``data.doc_root``), and so in the lineage of every model made of it. Inclusion is an audit
path of RFC 6962 to the document's hash; non-inclusion is one path to the two neighbours between which it would stand in the sorted
set. Either is under 2 kB for a million documents.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from criadero.artifact import Artifact, open_artifact
from criadero.data.docset import NORMAL_FORM, SET, DocumentSet, document_hash
from criadero.errors import UserError
from criadero.merkle import EMPTY, WIDTH, leaf_hash, path_from, sorted_root, split_hashes
from criadero.passport import parse_json, read_limited

FORMAT = "criadero/membership/1"
LIMIT = (
    "exact copies only, up to blanks, line ends, quotes and Unicode composition: a shortened, edited or translated copy has "
    "another hash (criadero trace looks for those); and it holds for the data that this root stands for, as its makers sorted it"
)


@dataclass(frozen=True)
class Answer:
    """What a proof shows: whether the document with this sha256 is among `documents` different ones."""

    included: bool
    document: str
    documents: int

    def __str__(self) -> str:
        verdict = "is" if self.included else "is not"
        return f"document {self.document[:12]} {verdict} one of the {self.documents:,} different training documents"


def open_set(ref: str | Path | Artifact) -> tuple[Artifact, DocumentSet]:
    """A dataset and its sorted document hashes, found to be those of its passport.

    UserError for other artifacts: it names the dataset that has them, where the lineage knows one.
    """
    artifact = open_artifact(ref)
    root = (artifact.passport.get("data") or {}).get("doc_root")
    if not root or not (artifact.path / SET).is_file():
        behind = [one for one in artifact.ancestors() if (one.get("data") or {}).get("doc_root")]
        if behind:
            names = ", ".join(f"{one['name']} ({one['id']}, root {one['data']['doc_root']})" for one in behind)
            raise UserError(
                f"{artifact.path} was made of {names}: give that dataset's folder, which lists the documents"
            )
        raise UserError(
            f"{artifact.path} has no table of documents ({SET}): only a dataset built by this version or later has one"
        )
    found = DocumentSet(artifact.path / SET)
    if found.root != root:
        raise UserError(f"{artifact.path / SET}: its root is not the passport's doc_root: verify the folder")
    form = artifact.passport["data"].get("normal_form")
    if form != NORMAL_FORM:
        raise UserError(
            f"{artifact.path}: its documents were hashed in the form {form!r}, which this version does not know"
        )
    return artifact, found


def prove(members: DocumentSet, text: str) -> dict[str, Any]:
    """The proof that a text is, or is not, in the set: plain JSON, checked by :func:`check` with the set's root alone."""
    hashed = document_hash(text)
    place = members.place(hashed)
    included = place < members.count and members[place] == hashed
    positions = [place] if included else [n for n in (place - 1, place) if 0 <= n < members.count]
    neighbours = [] if included else [members[n] for n in positions]
    packed = b"".join([*neighbours, *members.siblings(positions)])
    return {
        "proof": FORMAT,
        "document": hashed.hex(),
        "included": included,
        "documents": members.count,
        "position": place,
        "hashes": base64.b64encode(packed).decode(),
    }


def check(proof: Mapping[str, Any], root: str) -> Answer:
    """What a proof shows against a root. UserError when it shows nothing: it is malformed, or does not lead to this root."""
    try:
        if proof["proof"] != FORMAT:
            raise ValueError(f"its format is {str(proof['proof'])[:40]!r}, this version reads {FORMAT!r}")
        included, count, place = proof["included"], proof["documents"], proof["position"]
        if not isinstance(included, bool) or type(count) is not int or type(place) is not int:
            raise ValueError("a field is of the wrong type")
        if not 0 <= place <= count < 2**62:
            raise ValueError("its position is out of range")
        if included and place == count:
            raise ValueError("its position is out of range")
        hashed = bytes.fromhex(proof["document"])
        packed = base64.b64decode(proof["hashes"], validate=True)
        if len(hashed) != WIDTH or len(packed) % WIDTH or len(packed) > 128 * WIDTH:
            raise ValueError("its hashes are not whole")
        hashes = split_hashes(packed)
        positions = [place] if included else [n for n in (place - 1, place) if 0 <= n < count]
        taken = 0 if included else len(positions)
        if len(hashes) < taken:
            raise ValueError("too few hashes")
        leaves = [hashed] if included else hashes[:taken]
        if not included:
            before = leaves[0] if place > 0 else None
            after = leaves[-1] if place < count else None
            if (before is not None and before >= hashed) or (after is not None and after <= hashed):
                raise ValueError("its neighbours do not enclose the document")
        tree = EMPTY
        if count:
            named = [(n, leaf_hash(one)) for n, one in zip(positions, leaves, strict=True)]
            tree = path_from(positions[0], named, count, hashes[taken:])
        elif hashes[taken:]:
            raise ValueError("too many siblings")
        if sorted_root(count, tree) != root:
            raise ValueError("it does not lead to this root")
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UserError(f"the proof does not hold: {what}") from None
    return Answer(included, hashed.hex(), count)


def read_proof(path: str | Path) -> dict[str, Any]:
    """A proof from a file; UserError when it is no JSON object or larger than any proof."""
    try:
        found = parse_json(read_limited(Path(path), 1 << 16))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a proof: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is not a proof")
    return found


def read_document(path: str | Path) -> str:
    """The text of a file, as UTF-8; UserError when it is not, or is empty."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    if not text.strip():
        raise UserError(f"{path}: is empty")
    return text


def dumps(proof: Mapping[str, Any]) -> str:
    """A proof as one line of JSON."""
    return json.dumps(proof, separators=(",", ":"))
