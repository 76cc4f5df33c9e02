"""The table of parameters: what each endpoint takes, and what becomes of it. Validation reads it, and so does docs/reference/api.md.

Every field is *honoured*; or *refused* with a 400, unless its value is one that asks for nothing; or *reported*: it is taken,
has no effect, and is named in ``criadero.ignored`` and in the header ``X-Criadero-Ignored``. A name that is not here is a 400.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from criadero.serve.errors import ApiError
from criadero.serve.settings import Limits

LIMITS = Limits()  # the bounds of the schema; a server that is started with lower ones checks again


def honoured(about: str, default: Any = None, **bounds: Any) -> Any:
    """A field that does what it says."""
    return Field(default, description=about, **bounds)


def refused(why: str, *neutral: Any) -> Any:
    """A field that is a 400, unless it is null or one of ``neutral``, which ask for nothing."""
    return Field(None, description=f"refused: {why}", json_schema_extra={"refused": why, "neutral": list(neutral)})


def reported(why: str) -> Any:
    """A field without effect here, which the response says."""
    return Field(None, description=f"without effect: {why}", json_schema_extra={"reported": why})


class Body(BaseModel):
    """A JSON body: no unknown names, no words for numbers, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    def check(self) -> list[str]:
        """The names of fields that were given and have no effect. ApiError: one that is refused."""
        ignored = []
        for name, info in type(self).model_fields.items():
            value, extra = getattr(self, name), _extra(info)
            if value is None or name not in self.model_fields_set:
                continue
            if "refused" in extra and value not in extra["neutral"]:
                raise ApiError(400, "unsupported_parameter", f"{name} is not supported: {extra['refused']}", name)
            if "reported" in extra:
                ignored.append(name)
        return ignored


def _extra(info: FieldInfo) -> dict[str, Any]:
    return info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}


def rows(body: type[Body]) -> list[tuple[str, str, str]]:
    """(name, what becomes of it, about) of every field: the table for the documents."""
    found = []
    for name, info in body.model_fields.items():
        extra = _extra(info)
        status = "refused" if "refused" in extra else "reported" if "reported" in extra else "honoured"
        about = extra.get("refused") or extra.get("reported") or info.description or ""
        if extra.get("neutral"):
            about += "; taken when it is " + " or ".join(map(json.dumps, extra["neutral"]))
        found.append((info.alias or name, status, about + _bounds(info)))
    return found


def _bounds(info: FieldInfo) -> str:
    words = {"ge": "at least", "le": "at most", "gt": "above", "min_length": "at least", "max_length": "at most"}
    found = []
    for one in info.metadata:
        for name, word in words.items():
            value = getattr(one, name, None)
            if value is not None:
                found.append(f"{word} {value:,}" + (" long" if "length" in name else ""))
    return f" ({', '.join(found)})" if found else ""


_CODES = {
    "extra_forbidden": "unknown_parameter", "missing": "missing_parameter", "json_invalid": "invalid_json",
    "greater_than_equal": "out_of_range", "less_than_equal": "out_of_range", "greater_than": "out_of_range",
    "less_than": "out_of_range", "finite_number": "out_of_range", "too_long": "out_of_range", "too_short": "out_of_range",
    "string_too_long": "out_of_range", "string_too_short": "out_of_range", "int_parsing_size": "out_of_range",
    "int_from_float": "invalid_type", "literal_error": "invalid_value", "enum": "invalid_value", "value_error": "invalid_value",
}  # fmt: skip


def of_validation(errors: Sequence[ErrorDetails | Any], names: Sequence[str] = ()) -> ApiError:
    """The first of pydantic's complaints as a 400 that names the parameter."""
    if not errors:
        return ApiError(400, "invalid_request", "the body is not what this endpoint takes")
    errors = [one for one in errors if one["type"] == "extra_forbidden"] or errors
    # of a union's members, the one that came furthest: past its type, or deepest
    first = max(errors, key=lambda one: (one["type"] in _CODES, len(one["loc"])))
    param = path_of(first["loc"])
    code = _CODES.get(first["type"], "invalid_type")
    text = str(first["msg"])
    if code == "unknown_parameter":
        near = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        text = f"unknown parameter {param!r:.80}" + (f": did you mean {near[0]!r}?" if near else "")
    elif code == "missing_parameter":
        text = f"{param} must be given"
    elif code == "invalid_json":
        text = "the body is not JSON: " + str((first.get("ctx") or {}).get("error", text))
    else:
        text = f"{param}: {text[:1].lower()}{text[1:]}" if param else text
    return ApiError(400, code, text, param or None)


def path_of(place: Sequence[str | int]) -> str:
    """``("body", "messages", 0, "str")`` as ``messages[0]``: names of a union's members are left out."""
    if place[:1] == ("query",):
        return ".".join(map(str, place[:2]))[:200]
    text = ""
    for part in place[1:] if place and place[0] == "body" else place:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (part in ("str", "int", "float", "bool") or "[" in part or "-" in part or part[:1].isupper()):
            text += f".{part}" if text else part
    return text[:200]


# --- what several endpoints take ---

Temperature = Annotated[float, Field(ge=0, le=2)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Sampling(Body):
    """How tokens are chosen: the same for chat and for completions."""

    model: str | None = honoured("the name of a model or an adapter; empty: the default one", "", max_length=256)
    temperature: Temperature | None = honoured("0 takes the likeliest token; default 1")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = honoured("nucleus sampling; default 1")
    n: Annotated[int, Field(ge=1, le=LIMITS.n)] | None = honoured("answers to one prompt (limit n)")
    stop: str | Annotated[list[str], Field(max_length=LIMITS.stop)] | None = honoured(
        "texts that end the answer and are not part of it (limits stop, stop_characters)"
    )
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = honoured(
        "the same seed gives the same answer, whatever else is computed; the response names the one that was used"
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = honoured(
        "taken from the logits of what the answer has"
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = honoured("the same, for each time")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = honoured(
        "added to logits, by token id (limit logit_bias)"
    )
    stream: bool | None = honoured("server-sent events")
    stream_options: StreamOptions | None = honoured("`include_usage`: a last chunk with the usage")
    user: str | None = reported("requests are told apart by their keys")
    # beyond OpenAI, as vLLM and others name them
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = honoured("keep the k likeliest; 0 or -1: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = honoured(
        "keep tokens of at least this share of the likeliest's probability"
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = honoured(
        "divides logits of ids in prompt and answer"
    )
    min_tokens: Annotated[int, Field(ge=0, le=LIMITS.max_tokens)] | None = honoured("nothing ends the answer before")
    ignore_eos: bool | None = honoured("ends of the model's own are tokens like any other")
    stop_token_ids: Annotated[list[TokenId], Field(max_length=LIMITS.logit_bias)] | None = honoured(
        "tokens that end the answer"
    )
    skip_special_tokens: bool | None = refused("special tokens are never part of the text", True)
    regex: Annotated[str, Field(max_length=8192)] | None = honoured("the answer matches this regular expression")
    grammar: Annotated[str, Field(max_length=32_768)] | None = honoured(
        "the answer follows this grammar (Lark, or llama.cpp's GBNF)"
    )

    def sampling(self) -> dict[str, Any]:
        """Fields of `criadero.engine.request.SamplingParams`."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        stop = [text for text in stop if text]
        if any(len(text) > LIMITS.stop_characters for text in stop):
            raise ApiError(
                400, "out_of_range", f"stop: a text may have at most {LIMITS.stop_characters} characters (limit stop_characters)",
                "stop",
            )  # fmt: skip
        found: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature, "stop": stop,
            "logit_bias": self._biases(), "stop_ids": self.stop_token_ids or [],
        }  # fmt: skip
        for name in (
            "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty", "min_tokens",
            "ignore_eos", "regex", "grammar",
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None:
                found[name] = value
        if self.top_k is not None and self.top_k > 0:
            found["top_k"] = self.top_k
        return found

    def _biases(self) -> dict[int, float]:
        biases = self.logit_bias or {}
        if len(biases) > LIMITS.logit_bias:
            raise ApiError(
                400,
                "out_of_range",
                f"logit_bias: at most {LIMITS.logit_bias:,} tokens (limit logit_bias)",
                "logit_bias",
            )
        for id in biases:
            if not (id.isascii() and id.isdigit() and len(id) < 10):
                raise ApiError(400, "invalid_value", f"logit_bias: {id!r:.40} is not a token id", "logit_bias")
        return {int(id): value for id, value in biases.items()}


class StreamOptions(Body):
    """What a stream says beside the answer."""

    include_usage: bool | None = honoured("a last chunk with the usage, and null in the others")
    include_obfuscation: bool | None = reported("nothing is padded")


Sampling.model_rebuild()


def check_limits(limits: Limits, **counts: int) -> None:
    """400 when a count is above the limit of its name."""
    for name, count in counts.items():
        most = getattr(limits, name)
        if count > most:
            raise ApiError(
                400, "out_of_range", f"{name}: {count:,} are more than the {most:,} that may be (limit {name})", name
            )
