"""From ids to what may be shown: whole characters, and never a part of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from criadero.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Text of one answer as its ids come. `push` holds back what may turn out to begin a stop text."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, continues: bool = False, skip_special: bool = True
    ) -> None:
        self._decoder = StreamDecoder(tokenizer, continues=continues, skip_special=skip_special)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, id: int, *, may_stop: bool = True) -> tuple[str, str | None]:
        """The text to show, and the stop text that has been completed, if any: the earliest, then the longest."""
        piece = self._decoder.push(id)
        if not self._stop:
            return piece, None
        return self._shown(piece, may_stop)

    def _shown(self, piece: str, may_stop: bool) -> tuple[str, str | None]:
        held = self._held + piece
        if not may_stop:  # min_tokens is not reached: what stands here can end nothing, not even with what follows
            self._held = ""
            return held, None
        found = min(
            ((at, -len(text), text) for text in self._stop if (at := held.find(text)) >= 0), default=(0, 0, None)
        )
        if found[2] is not None:
            self._held = ""
            return held[: found[0]], found[2]
        keep = max(_overlap(held, text) for text in self._stop)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep], None

    def flush(self) -> tuple[str, str | None]:
        """What was held back, at the end; it may still complete a stop text (by U+FFFD for half a character)."""
        piece = self._decoder.flush()
        if not self._stop:
            return piece, None
        shown, stop = self._shown(piece, True)
        held, self._held = self._held, ""
        return (shown, stop) if stop is not None else (shown + held, None)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
