"""Files of chats: the shape is detected, said in a sentence, and never guessed.

Shapes (each with the names of fields that are met in the wild):

========== ==========================================================================================================
messages   ``messages``: list of ``{"role", "content"}`` (OpenAI)
sharegpt   ``conversations`` or ``conversation``: list of ``{"from", "value"}`` (Vicuna's ShareGPT)
alpaca     ``instruction``, ``output`` or ``response``, and perhaps ``input`` or ``context``, ``system``, ``history``
           (Stanford Alpaca; Dolly's names are the second ones)
prompt     ``prompt``/``completion``, ``prompt``/``response``, ``question``/``answer``, and perhaps ``system``
========== ==========================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criadero.data.documents import Row, read_rows
from criadero.errors import UserError

if TYPE_CHECKING:
    from criadero.chat import Message

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
ROLES = ("system", "user", "assistant")
FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
KNOWN = "messages [{role, content}], conversations [{from, value}], instruction/input/output, prompt/completion or question/answer"


@dataclass(frozen=True)
class Shape:
    """How a file's rows hold a chat. ``fields`` maps our names (``user``, ``assistant``, ``turns``...) to the file's."""

    name: str
    fields: tuple[tuple[str, str], ...]

    @property
    def sentence(self) -> str:
        """What was detected and how the fields map, in words."""
        names = dict(self.fields)
        if self.name == "messages":
            return f"OpenAI messages: each row's {names['turns']!r} is a list of turns with 'role' and 'content'"
        if self.name == "sharegpt":
            return f"ShareGPT: each row's {names['turns']!r} is a list of turns with 'from' (human, gpt, system) and 'value'"
        extra = f" (followed by {names['input']!r} where there is one)" if "input" in names else ""
        more = "; 'system' opens the chat" if "system" in names else ""
        more += "; 'history' holds the turns before" if "history" in names else ""
        title = "Alpaca" if self.name == "alpaca" else "prompt and completion"
        return f"{title}: {names['user']!r}{extra} is what the user says, {names['assistant']!r} what the assistant answers{more}"


@dataclass
class ChatFile:
    """``chats[i]`` are the turns of one chat; ``places[i]`` is its file and line; ``bad`` the complaints about skipped rows."""

    chats: list[list[Message]]
    shape: Shape
    counts: dict[str, int]
    bad: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


def shapes_of(row: Mapping[str, Any]) -> list[Shape]:
    """Every shape that fits the row's field names: one, unless it is ambiguous."""
    found = []
    system = (("system", "system"),) if "system" in row else ()
    if isinstance(row.get("messages"), list):
        found.append(Shape("messages", (("turns", "messages"),)))
    for name in ("conversations", "conversation"):
        turns = row.get(name)
        if isinstance(turns, list):
            # some files call the list "conversations" and write OpenAI's turns into it
            openai = all(isinstance(t, dict) and "role" in t and "from" not in t for t in turns) and bool(turns)
            found.append(Shape("messages" if openai else "sharegpt", (("turns", name),)))
    if "instruction" in row:
        answers = [name for name in ("output", "response") if name in row]
        inputs = [name for name in ("input", "context") if name in row]
        history = (("history", "history"),) if "history" in row else ()
        for answer in answers:
            middle = (("input", inputs[0]),) if inputs else ()
            found.append(Shape("alpaca", (("user", "instruction"), *middle, ("assistant", answer), *system, *history)))
    for user, assistant in PAIRS:
        if user in row and assistant in row:
            found.append(Shape("prompt", (("user", user), ("assistant", assistant), *system)))
    return found


def detect(
    rows: Sequence[Mapping[str, Any]], *, places: Sequence[str] | None = None, file: str | Path = "the data"
) -> Shape:
    """The one shape of all rows. UserError naming rows when there is none, when two fit, or when rows differ.

    Optional fields (``input``, ``system``, ``history``) may be absent in some rows: the union of them is taken.
    """
    if not rows:
        raise UserError(f"{file}: there are no rows; give at least one chat")
    where = places or [f"{file} row {number}" for number in range(1, len(rows) + 1)]
    first: Shape | None = None
    merged: dict[str, str] = {}
    for place, row in zip(where, rows, strict=True):
        found = shapes_of(row)
        if not found:
            have = ", ".join(map(repr, list(row)[:8])) or "none"
            plain = "; plain documents are learned with --train_on text" if "text" in row else ""
            raise UserError(f"{place}: no chat in this row (fields: {have}); expected {KNOWN}{plain}")
        if len(found) > 1:
            said = " or ".join(f"{s.name} ({', '.join(v for _, v in s.fields)})" for s in found)
            raise UserError(f"{place}: ambiguous, it could be {said}; leave one of them, or name the shape")
        shape = found[0]
        if first is None:
            first, merged = shape, dict(shape.fields)
            continue
        core = {k: v for k, v in shape.fields if k in ("turns", "user", "assistant")}
        if (
            shape.name != first.name
            or any(merged.get(k) != v for k, v in shape.fields if k in merged)
            or not core.keys() <= merged.keys()
        ):
            raise UserError(
                f"{place}: rows of two shapes in one file: {where[0]} is {_brief(first)}, this one is {_brief(shape)}; split the file"
            )
        merged.update(shape.fields)
    assert first is not None
    order = ("turns", "user", "input", "assistant", "system", "history")
    return Shape(first.name, tuple((k, merged[k]) for k in order if k in merged))


def _brief(shape: Shape) -> str:
    return f"{shape.name} ({', '.join(name for _, name in shape.fields)})"


def to_messages(row: Mapping[str, Any], shape: Shape) -> list[Message]:
    """One row's turns, checked. ValueError with the reason (no place: the caller knows it) when it is no valid chat."""
    names = dict(shape.fields)
    turns: list[tuple[str, Any]] = []
    if shape.name in ("messages", "sharegpt"):
        role_key, text_key = ("role", "content") if shape.name == "messages" else ("from", "value")
        listed = row.get(names["turns"])
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{names['turns']!r} is not a list of turns")
        for number, turn in enumerate(listed, 1):
            if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
                raise ValueError(f"turn {number} has no {role_key!r} and {text_key!r}")
            role = turn[role_key]
            if shape.name == "sharegpt":
                role = FROM.get(role, role) if isinstance(role, str) else role
            turns.append((role, turn[text_key]))
    else:
        if row.get(names.get("system", "")):
            turns.append(("system", row["system"]))
        for pair in row.get(names.get("history", "")) or []:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ValueError("'history' is not a list of [user, assistant] pairs")
            turns += [("user", pair[0]), ("assistant", pair[1])]
        user, extra = row.get(names["user"]), row.get(names.get("input", ""))
        if isinstance(extra, str) and extra.strip() and isinstance(user, str):
            user = f"{user}\n\n{extra}"
        turns += [("user", user), ("assistant", row.get(names["assistant"]))]
    return check_messages(turns)


def check_messages(turns: Sequence[tuple[Any, Any]]) -> list[Message]:
    """Known roles, no empty text, system only first, user and assistant by turns, an answer present; else ValueError."""
    messages: list[Message] = []
    previous = ""
    for number, (role, text) in enumerate(turns, 1):
        if role not in ROLES:
            raise ValueError(f"turn {number} has the unknown role {role!r} (known: {', '.join(ROLES)})")
        if not isinstance(text, str):
            raise ValueError(f"turn {number} ({role}) is not text but {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"turn {number} ({role}) is empty")
        if role == "system" and number > 1:
            raise ValueError(f"turn {number} is a system turn; only the first one may be")
        if role == previous:
            raise ValueError(f"turns {number - 1} and {number} are both {role}")
        if role == "assistant" and previous in ("", "system"):
            raise ValueError("the assistant speaks first; a chat starts with the user")
        messages.append({"role": role, "content": text})
        previous = role
    if not any(m["role"] == "assistant" for m in messages):
        raise ValueError("no assistant turn, so there is nothing to learn")
    return messages


def read_chats(
    path: str | Path, *, shape: Shape | None = None, skip_bad: bool = False, keep_rows: bool = False
) -> ChatFile:
    """Read a file or folder of chats; see the module's head for shapes.

    A bad row raises UserError naming file and line; with ``skip_bad`` it is left out, and ``bad`` and ``counts`` tell.
    """
    bad: list[str] = []
    places: list[str] = []
    rows: list[Row] = []
    for where, row in read_rows(path, skip_bad=skip_bad, bad=bad):
        if skip_bad and shape is None and not shapes_of(row):
            bad.append(f"{where}: no chat in this row (fields: {', '.join(map(repr, list(row)[:8]))})")
            continue
        places.append(where)
        rows.append(row)
    if not rows:
        first = f"; the first complaint: {bad[0]}" if bad else ""
        raise UserError(
            f"{path}: no chat in it ({'every row is bad' if bad else 'it is empty'}); expected {KNOWN}{first}"
        )
    shape = shape or detect(rows, places=places, file=path)
    chats, kept_places, kept_rows = [], [], []
    for where, row in zip(places, rows, strict=True):
        try:
            messages = to_messages(row, shape)
        except ValueError as error:
            if not skip_bad:
                raise UserError(f"{where}: {error}; mend it, or skip bad rows with skip_bad") from error
            bad.append(f"{where}: {error}")
            continue
        chats.append(messages)
        kept_places.append(where)
        if keep_rows:
            kept_rows.append(row)
    if not chats:
        raise UserError(f"{path}: every row is bad; the first: {bad[0]}")
    roles = Counter(m["role"] for chat in chats for m in chat)
    counts = {
        "chats": len(chats),
        "turns": sum(roles.values()),
        "assistant_turns": roles["assistant"],
        "with_system": roles["system"],
        "bad": len(bad),
    }
    return ChatFile(chats, shape, counts, bad, kept_places, kept_rows)


def split_rounds(
    messages: Sequence[Message], measure: Callable[[Sequence[Message]], int], context: int
) -> tuple[list[list[Message]], int]:
    """A chat as parts of whole rounds (question and answer), each of at most `context` tokens; the system turn opens each.

    A round that is too long by itself is left out; how many there were comes back too. The parts before and after it are separate.
    """
    if measure(messages) <= context:
        return [list(messages)], 0
    head = list(messages[:1]) if messages[0]["role"] == "system" else []
    body = messages[len(head) :]
    rounds = [list(body[n : n + 2]) for n in range(0, len(body), 2)]
    parts: list[list[Message]] = []
    current: list[Message] = []
    long_rounds = 0
    for one in rounds:
        if current and measure([*head, *current, *one]) <= context:
            current += one
            continue
        if current:
            parts.append([*head, *current])
            current = []
        if measure([*head, *one]) <= context:
            current = list(one)
        else:
            long_rounds += 1
    if current:
        parts.append([*head, *current])
    return parts, long_rounds
