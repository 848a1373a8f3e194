"""What OpenAI's two APIs share: errors and models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upspiral.gateway.dialects.base import Failure


def openai_error(failure: Failure) -> Mapping[str, Any]:
    """The body of an error, also the last data of a stream that breaks."""
    kind = "server_error" if failure.status >= 500 else "invalid_request_error"
    error = {"message": failure.message, "type": kind, "param": failure.field, "code": failure.code}
    return {"error": error}


def model_entry(model_id: str) -> Mapping[str, Any]:
    return {"id": model_id, "object": "model", "created": 0, "owned_by": "upspiral"}


def model_list(model_ids: Sequence[str]) -> Mapping[str, Any]:
    return {"object": "list", "data": [model_entry(model_id) for model_id in model_ids]}
