"""What server and client say to each other by HTTP: bodies, and how an error travels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from upspiral.errors import (
    CapabilityError,
    ConfigError,
    DeadlineError,
    ImageError,
    RequestError,
    SandboxBusyError,
    SandboxError,
    SandboxGoneError,
)
from upspiral.sandbox.base import Allow, Limits, SandboxSpec, Snapshot

PATIENCE_S = 30.0
"""How long a client tries to take a lost line up again, if it does not say. What follows must be longer than such a
client may not be heard of: `remote.line.back_within_s`, after its last heartbeat."""
RETURN_S = 120.0
"""How long the server keeps a line without a connection, and with it what its client has not received."""
HEARTBEAT_S = 90.0
"""How long it keeps a sandbox without a sign of its client, if nobody says."""
KEY_HEADER = "Idempotency-Key"
LONGEST_KEY = 200
MOST_FORKS = 256
_LARGEST_LIMIT = 1 << 31
"""Of whatever: a larger one is none, and may be more than those who set it can count to."""


class CreateRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /sandboxes. Contents of files are base64."""

    spec: SandboxSpec


class ForkRequest(msgspec.Struct, forbid_unknown_fields=True):
    count: int = 1


class RestoreRequest(msgspec.Struct, forbid_unknown_fields=True):
    snapshot: str


class HeartbeatRequest(msgspec.Struct, forbid_unknown_fields=True):
    sandboxes: Sequence[str] = ()
    snapshots: Sequence[str] = ()


class HeartbeatAnswer(msgspec.Struct):
    gone: Mapping[str, str]
    """Why, by id."""


class LeaseAnswer(msgspec.Struct):
    """A sandbox in the client's hands."""

    id: str
    ends_in_s: float
    """The rest of its lifetime."""
    heartbeat_s: float
    """After so long without a sign of its client it is stopped."""


class LeasesAnswer(msgspec.Struct):
    sandboxes: Sequence[LeaseAnswer]


class ListedSandbox(msgspec.Struct):
    """What GET /sandboxes tells of each."""

    id: str
    labels: Mapping[str, str]
    age_s: float
    ends_in_s: float
    memory_mb: int


class Listing(msgspec.Struct):
    sandboxes: Sequence[ListedSandbox]


class DiffAnswer(msgspec.Struct):
    """A `Diff`, whose paths need not be text."""

    archive: bytes
    removed: Sequence[bytes]


class ErrorAnswer(msgspec.Struct):
    """Any answer of 4xx or 5xx, and how an operation in a sandbox failed."""

    code: str
    message: str
    retry_after_s: float | None = None


Body = TypeVar("Body")

_STATUS_OF_CODE = {
    "capability": 422,
    "image": 422,
    "config": 400,
    "gone": 410,
    "busy": 429,
    "deadline": 504,
    "sandbox": 502,
    "no_file": 404,
    "refused": 409,
    "broken_pipe": 409,
    "os": 409,
}
_CODES: Sequence[tuple[type[Exception], str]] = (
    # The first that fits: more special ones before what they are a kind of.
    (CapabilityError, "capability"),
    (SandboxGoneError, "gone"),
    (SandboxBusyError, "busy"),
    (ImageError, "image"),
    (SandboxError, "sandbox"),
    (DeadlineError, "deadline"),
    (FileNotFoundError, "no_file"),
    (ConnectionRefusedError, "refused"),
    (BrokenPipeError, "broken_pipe"),
    (OSError, "os"),
    (ConfigError, "config"),
)
_PLAIN_KINDS: Mapping[str, Callable[[str], Exception]] = {
    code: kind for kind, code in _CODES if kind is not SandboxBusyError
}


def read_body(raw: bytes, kind: type[Body]) -> Body:
    """Raises RequestError for what is no such body, naming the field."""
    try:
        return msgspec.json.decode(raw or b"{}", type=kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise RequestError(f"the request's body is not as it should be: {error}") from error


def read_spec(raw: bytes) -> SandboxSpec:
    """The spec of a CreateRequest. Raises RequestError for a key that there is not, or a limit that is no limit."""
    spec = read_body(raw, CreateRequest).spec
    # msgspec ignores unknown keys of dataclasses; a limit that is misspelt would be none.
    given = msgspec.json.decode(raw)["spec"]
    _check_keys(given, SandboxSpec, "spec")
    _check_keys(given.get("limits"), Limits, "spec.limits")
    _check_keys(given.get("network"), Allow, "spec.network")
    _check_keys(given.get("image"), Snapshot, "spec.image")
    for each in fields(Limits):
        value = getattr(spec.limits, each.name)
        if isinstance(value, int | float) and not 0 < value <= _LARGEST_LIMIT:
            raise RequestError(f"spec.limits.{each.name} must be positive, and at most {_LARGEST_LIMIT}, not {value}")
    return spec


def write_body(value: Any) -> bytes:
    return msgspec.json.encode(value)


def error_answer(error: Exception) -> tuple[int, ErrorAnswer]:
    """HTTP status and body. What is not meant for clients is told as a bug, without its text."""
    if isinstance(error, RequestError):
        return error.status, ErrorAnswer(error.code, str(error))
    for kind, code in _CODES:
        if isinstance(error, kind):
            retry_s = error.retry_after_s if isinstance(error, SandboxBusyError) else None
            return _STATUS_OF_CODE[code], ErrorAnswer(code, str(error), retry_s)
    return 500, ErrorAnswer("internal", "the server of sandboxes has a bug; see its log")


def raised(answer: ErrorAnswer) -> Exception:
    """The error that `error_answer` was told, at the client."""
    if answer.code == "busy":
        return SandboxBusyError(answer.message, retry_after_s=answer.retry_after_s or 1.0)
    if answer.code == "unknown_sandbox":
        return SandboxGoneError(answer.message)
    return _PLAIN_KINDS.get(answer.code, SandboxError)(answer.message)


def _check_keys(given: Any, kind: type[Any], where: str) -> None:
    if isinstance(given, dict):
        names = [each.name for each in fields(kind)]
        if unknown := sorted(given.keys() - set(names)):
            raise RequestError(f"{where} has no key {', '.join(unknown)}; its keys are {', '.join(names)}")
