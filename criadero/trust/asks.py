"""What a licence asks of somebody who copies a passage, in a few words; a first reading, not legal advice.

The facts are those of terms.toml; here stands what each term means for a few lines of text.
"""

from __future__ import annotations

from criadero.trust.licence_names import Reading, read_licence, table

# In the order in which they are told. Terms that speak of whole works, of names, or of numbers of users are left out.
_WORDS = {
    "no_permission": "nothing is allowed beyond what the law allows",
    "no_sharing": "not to be handed on",
    "non_commercial": "not for commercial use",
    "no_derivatives": "only whole and unchanged",
    "output_ban": "not for improving other models",
    "no_compete": "not for models that compete with the service's owner",
    "restrictions": "its limits on use handed on",
    "attribution": "its authors named",
    "keep_text": "the copyright notice and the licence kept",
    "share_alike": "the same licence for what it becomes part of",
    "weak_share_alike": "the same licence for the file it becomes part of",
}
_REFUSED = {"no_permission", "no_sharing", "non_commercial", "no_derivatives"}


def asks(licence: str) -> str:
    """What a licence asks for a copied passage, in words; of several ("Apache-2.0 / PSF-2.0") what they ask together."""
    reading = read_licence(licence)
    terms = _terms(reading)
    words = [text for term, text in _WORDS.items() if term in terms]
    if not _known(reading):
        rest = ", ".join(word for word, _, _ in reading.unknown) or reading.text or "no licence given"
        words.append(f"not known ({rest}): ask before use")
    return ", ".join(words) or "nothing"


def forbids(licence: str) -> bool:
    """Whether a licence does not allow a passage to be copied into any answer: non-commercial, no derivatives, all rights
    reserved, or unknown. Attribution is not counted: it can be given."""
    reading = read_licence(licence)
    return not _known(reading) or not _REFUSED.isdisjoint(_terms(reading))


def _known(reading: Reading) -> bool:
    return bool(reading.choices) and not reading.unknown


def _terms(reading: Reading) -> set[str]:
    keys = reading.choices[0] if reading.choices else ()  # of alternatives the one that asks least
    return {term["id"] for key in keys for term in table()[key].get("terms", ())}
