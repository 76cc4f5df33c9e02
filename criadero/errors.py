"""The one exception that is the user's to mend."""

from __future__ import annotations


class UserError(Exception):
    """A problem with what the user gave: one line that names the thing, the reason and what to do.

    The command line prints it as ``error: ...`` and exits with code 2; a server answers with HTTP 4xx.
    """
