"""Who owns which page of the cache: counts of users, reuse of what was computed before, and eviction. Knows no tensors.

Keys and values of tokens 0 .. 31, 32 .. 63, ... lie in pages. A full page is named by a hash that chains the hash of the
page before it, so that one name means one whole prefix; a new request takes the pages whose names it finds (as vLLM's
automatic prefix caching, and in effect RadixAttention, arXiv 2312.07104, in units of a page). The chain starts from a salt
of tenant and adapter: neither can reach another's. The hash is cryptographic: nobody can make two prefixes meet.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from criadero.errors import UserError

Name = bytes


def salt(*parts: str) -> Name:
    """Where a chain of names starts."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        hasher.update(len(data).to_bytes(8, "little") + data)
    return hasher.digest()


def extend(names: list[Name], start: Name, tokens: Sequence[int], page: int, upto: int) -> None:
    """Add to a chain the names of the full pages of ``tokens[:upto]`` that it has not yet; ``start`` is its salt."""
    for number in range(len(names), upto // page):
        data = np.array(tokens[number * page : (number + 1) * page], np.int32).tobytes()
        names.append(hashlib.blake2b((names[-1] if names else start) + data, digest_size=16).digest())


class Pages:
    """The pages ``0 .. count - 1``. Each is free, used by one or more (counted), or kept: used by nobody, but named."""

    def __init__(self, count: int, page: int) -> None:
        if count < 1 or page < 1:
            raise UserError(f"the cache needs at least one page of at least one token, not {count} of {page}")
        self.count, self.page = count, page
        self._free = list(range(count - 1, -1, -1))  # taken from the end
        self._users = [0] * count
        self._name: list[Name | None] = [None] * count
        self._of_name: dict[Name, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # the longest unused first
        self.evicted = 0

    def available(self) -> int:
        """How many pages could be taken now."""
        return len(self._free) + len(self._kept)

    def used(self) -> int:
        """How many pages somebody uses."""
        return self.count - self.available()

    def take(self, count: int) -> list[int] | None:
        """``count`` pages for one user, evicting what nobody has used for the longest; None when there are not so many."""
        if count > self.available():
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                self._unname(page)
                self.evicted += 1
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(self, names: Sequence[Name]) -> list[int]:
        """The pages that hold the longest known prefix of a chain of names, each with one user more."""
        found: list[int] = []
        for name in names:
            page = self._of_name.get(name)
            if page is None:
                break
            if self._users[page] == 0:
                del self._kept[page]
            self._users[page] += 1
            found.append(page)
        return found

    def publish(self, page: int, name: Name) -> None:
        """``page`` is full and computed: others may find it by its name. The first page of a name stays the one that is found."""
        if name not in self._of_name and self._name[page] is None:
            self._of_name[name] = page
            self._name[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """One user fewer for each of a sequence's pages, given in its order: of a chain, the end is evicted before the start."""
        for page in reversed(pages):
            users = self._users[page] = self._users[page] - 1
            if users < 0:
                raise AssertionError(f"page {page} was released more often than taken")
            if users == 0:
                if self._name[page] is None:
                    self._free.append(page)
                else:
                    self._kept[page] = None

    def forget(self, pages: Sequence[int]) -> None:
        """Nobody shall find these pages again (their numbers are spoilt, or nobody may)."""
        for page in pages:
            self._unname(page)
            if page in self._kept:
                del self._kept[page]
                self._free.append(page)

    def clear(self) -> None:
        """Forget every page that nobody uses."""
        self.forget(list(self._kept))

    def _unname(self, page: int) -> None:
        name = self._name[page]
        if name is not None:
            del self._of_name[name]
            self._name[page] = None

    def check(self) -> None:
        """AssertionError unless every page is exactly one of free, used and kept; for tests."""
        used = [page for page in range(self.count) if self._users[page] > 0]
        everything = sorted([*self._free, *self._kept, *used])
        assert everything == list(range(self.count)), "pages are lost or stand in two places"
        assert all(self._name[page] is not None for page in self._kept)
        assert all(self._name[page] is None for page in self._free)
        assert {page: name for name, page in self._of_name.items()} == {
            page: name for page, name in enumerate(self._name) if name is not None
        }
