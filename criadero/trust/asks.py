"""What a licence asks of somebody who copies a passage, in a few words; a first reading, not legal advice.

Licences of data come as free words ("CC BY-SA 4.0", "public domain in the US"), so they are read by what they say.
"""

from __future__ import annotations

import re

# (pattern on the lower-case name, blanks for punctuation; what copying asks; whether copying as it stands is refused)
_RULES = (
    (r"\bn ?c\b|non ?commercial", "not for commercial use, and with attribution", True),
    (r"\bn ?d\b|no ?deriv", "only whole and unchanged, with attribution", True),
    (r"all rights reserved|proprietary|no licen[cs]e", "nothing is allowed beyond what the law allows", True),
    (r"\bcc ?0\b|public domain|\bpd\b|unlicen[cs]e", "nothing", False),
    (r"\bby ?sa\b|share ?alike|\bcdla sharing\b|\bgfdl\b", "attribution, and the same licence for what it becomes part of", False),
    (r"\ba?l?gpl\b", "the licence and the notices kept, and the same licence for what it becomes part of", False),
    (r"\bcc by\b|attribution|\bodc by\b", "attribution", False),
    (r"\bmit\b|\bbsd\b|apache|\bpsf\b|\bisc\b|cdla permissive", "the copyright notice and the licence kept", False),
)  # fmt: skip


def asks(licence: str) -> str:
    """What a licence asks for a copied passage, in words; of several ("Apache-2.0 / PSF-2.0") what each asks."""
    found = [_rule(part)[0] for part in _parts(licence)]
    return "; ".join(dict.fromkeys(found))


def forbids(licence: str) -> bool:
    """Whether a licence does not allow a passage to be copied into any answer: non-commercial, no derivatives, all rights
    reserved, or unknown. Attribution is not counted: it can be given."""
    return any(_rule(part)[1] for part in _parts(licence))


def _parts(licence: str) -> list[str]:
    return [part for part in re.split(r"\s*(?:/|;|,| and | AND )\s*", licence) if part] or [""]


def _rule(licence: str) -> tuple[str, bool]:
    text = re.sub(r"[^a-z0-9]+", " ", licence.lower())
    for pattern, words, refused in _RULES:
        if re.search(pattern, text):
            return words, refused
    return f"not known ({licence or 'no licence given'}): ask before use", True
