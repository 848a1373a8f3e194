"""Heads of HTTP messages, read strictly: what two programs could understand differently is refused.

A request is forwarded from what was understood of it, never from its bytes, and one connection carries one request; so
nothing can be smuggled behind it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from upspiral.sandbox.egress.policy import clean_host, split_port

Headers = Sequence[tuple[str, str]]
Framing = int | Literal["chunked", "until end"]
"""How long a body is: so many bytes, chunks, or all that comes."""

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_TARGET = re.compile(r"[\x21-\x7e]+")
_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
_OF_ONE_HOP = {
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "te", "trailer",
    "upgrade",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asks of a proxy."""

    method: str
    host: str
    """As `clean_host` gives it."""
    port: int
    path: str
    """With the query; empty for CONNECT."""
    headers: Headers
    framing: Framing

    @property
    def is_tunnel(self) -> bool:
        return self.method == "CONNECT"

    def forwarded_head(self) -> bytes:
        """For the destination. Its Host is the destination that was decided about."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        host = host if self.port == 80 else f"{host}:{self.port}"
        return _head(f"{self.method} {self.path} HTTP/1.1", [("Host", host), *self.headers])


@dataclass(frozen=True, slots=True)
class Response:
    """What a destination answers."""

    status_line: str
    status: int
    headers: Headers
    framing: Framing

    @property
    def is_interim(self) -> bool:
        return self.status < 200

    def forwarded_head(self) -> bytes:
        """For the client."""
        if self.is_interim:
            return f"{self.status_line}\r\n\r\n".encode("latin-1")
        return _head(self.status_line, self.headers)


def parse_request(head: bytes) -> Request:
    """`head` ends with the empty line. Raises ValueError that says what is wrong with it."""
    first, headers = _lines(head)
    parts = first.split(" ")
    if len(parts) != 3 or not _TOKEN.fullmatch(parts[0]) or parts[2] not in ("HTTP/1.0", "HTTP/1.1"):
        raise ValueError("the request line is not that of HTTP/1.1")
    method, target, _ = parts
    if not _TARGET.fullmatch(target):
        raise ValueError("the target has characters that may not be there")
    if method == "CONNECT":
        host, port = split_port(target)
        if port is None:
            raise ValueError("CONNECT needs a host and a port")
        path = ""
    else:
        host, port, path = _absolute(target)
    host = clean_host(host)
    _check_host_header(headers, host, port, is_tunnel=not path)
    framing = _framing(headers, absent=0)
    if method == "CONNECT" and framing != 0:
        raise ValueError("CONNECT with a body")
    return Request(method, host, port, path, _end_to_end(headers, also="host"), framing)


def parse_response(head: bytes, *, method: str) -> Response:
    """The answer to a request of this method. Raises ValueError."""
    first, headers = _lines(head)
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise ValueError("the answer is not HTTP/1.1")
    status = int(match[1])
    if status == 101:
        raise ValueError("the destination switched to another protocol")
    framing = _framing(headers, absent="until end")
    if method == "HEAD" or status < 200 or status in (204, 304):
        framing = 0
    return Response(first, status, _end_to_end(headers), framing)


def _lines(head: bytes) -> tuple[str, Headers]:
    first, *rest = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    headers: list[tuple[str, str]] = []
    for line in rest:
        name, colon, value = line.partition(":")
        value = value.strip(" \t")
        if not colon or not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"this is no header: {line[:40]!r}")
        headers.append((name, value))
    return first, headers


def _absolute(target: str) -> tuple[str, int, str]:
    parts = urlsplit(target)
    if parts.scheme != "http":
        raise ValueError("a proxy is asked with CONNECT host:port or with an address that begins with http://")
    if "@" in parts.netloc or "\\" in target:
        raise ValueError("names or backslashes in an address are not understood")
    host, port = split_port(parts.netloc.removesuffix(":"))
    path = target[len("http://") + len(parts.netloc) :].partition("#")[0]
    return host, 80 if port is None else port, path if path.startswith("/") else f"/{path}"


def _check_host_header(headers: Headers, host: str, port: int, *, is_tunnel: bool) -> None:
    """The Host header has to name the target: a destination that believes it would serve another host than the one that
    was decided about. Clients that tunnel may leave the port out."""
    values = _all(headers, "host")
    if len(values) > 1:
        raise ValueError("more than one Host header")
    if values:
        named, named_port = split_port(values[0])
        usual_port = port if is_tunnel else 80
        if (clean_host(named), named_port or usual_port) != (host, port):
            raise ValueError(f"the Host header names {values[0][:80]!r}, the request {host}:{port}")


def _framing(headers: Headers, *, absent: Framing) -> Framing:
    lengths = _all(headers, "content-length")
    encodings = _all(headers, "transfer-encoding")
    if encodings:
        if lengths:
            raise ValueError("both Content-Length and Transfer-Encoding")
        if [each.lower() for each in encodings] != ["chunked"]:
            raise ValueError("a Transfer-Encoding other than chunked")
        return "chunked"
    if not lengths:
        return absent
    if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,18}", lengths[0]):
        raise ValueError("a Content-Length that is not one number")
    return int(lengths[0])


def _all(headers: Headers, name: str) -> list[str]:
    return [value for key, value in headers if key.lower() == name]


def _end_to_end(headers: Headers, *, also: str = "") -> Headers:
    named = {name.strip().lower() for value in _all(headers, "connection") for name in value.split(",")}
    # What frames the body stays, whatever Connection says: without it the body would be read as something else.
    dropped = (_OF_ONE_HOP | named | {also}) - {"content-length", "transfer-encoding"}
    return [(name, value) for name, value in headers if name.lower() not in dropped]


def _head(first: str, headers: Headers) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")
