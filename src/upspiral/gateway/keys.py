"""The key that a request carries."""

from __future__ import annotations

import secrets

from starlette.requests import HTTPConnection, Request

from upspiral.errors import UnknownKeyError


def api_key(request: HTTPConnection) -> str:
    """From `Authorization: Bearer` or `x-api-key`; "" without either."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("x-api-key", "").strip()


def check_admin_key(request: Request, admin_key: str) -> None:
    """Raises UnknownKeyError unless the request carries the admin key."""
    if not secrets.compare_digest(api_key(request).encode(), admin_key.encode()):
        raise UnknownKeyError(
            "the admin API needs 'Authorization: Bearer KEY' with the key that `upspiral serve` prints"
        )
