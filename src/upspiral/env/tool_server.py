"""The HTTP address behind which a rollout's sandbox acts.

    GET  /tools          {"tools": [{"type": "function", "function": {"name", "description", "parameters"}}]}
    POST /tools/{name}   arguments as a JSON object -> {"output": str, "exit_code": int | null, "timed_out": bool}

Both want `Authorization: Bearer KEY`, with the key of one rollout. What a tool does lies in `Tool` and in
`ToolServer.call`; HTTP is only a door to it, and MCP can become another.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from upspiral.errors import ConfigError, RequestError, SandboxError, SealedRolloutError, UnknownKeyError
from upspiral.sandbox.base import Sandbox
from upspiral.types import ToolSpec

_MAX_BODY_BYTES = 1 << 20
_GRACE_S = 15.0


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model sees of a call, and how it ended."""

    output: str
    exit_code: int | None
    timed_out: bool


class Tool(Protocol):
    """Something an agent can call. Raises RequestError for arguments it cannot use, SandboxError when that broke."""

    async def call(self, sandbox: Sandbox, arguments: Mapping[str, Any], timeout_s: float) -> ToolResult: ...


@dataclass(frozen=True, slots=True)
class BashTool:
    """Runs a command line. Output is stdout, then stderr, without white space around, at most `output_chars` long."""

    output_chars: int = 400

    async def call(self, sandbox: Sandbox, arguments: Mapping[str, Any], timeout_s: float) -> ToolResult:
        command = arguments.get("command")
        if not isinstance(command, str):
            raise RequestError(f'tool bash: "command" must be a string, and {command!r} was given')
        if "\0" in command:
            raise RequestError('tool bash: "command" must not contain NUL')
        done = await sandbox.exec(command, timeout_s=timeout_s)
        streams = [stream.decode(errors="replace").strip() for stream in (done.stdout, done.stderr)]
        output = "\n".join(stream for stream in streams if stream)
        if len(output) > self.output_chars or done.truncated:
            output = f"{output[: self.output_chars]}\n[output truncated]"
        if done.timed_out:
            output = f"{output}\n[timed out after {timeout_s:g} s]".strip()
        return ToolResult(output, done.exit_code, done.timed_out)


TOOLS: Mapping[str, Tool] = {"bash": BashTool()}
"""What there is to do behind the names that an environment offers."""


@dataclass(slots=True)
class _Session:
    sandbox: Sandbox | None
    """None once closed."""
    timeout_s: float
    failure: str | None = None
    calls: set[asyncio.Future[ToolResult]] = field(default_factory=set)
    """In flight."""


class ToolServer:
    """The tools of many rollouts, one secret key each. `app` is the Starlette application to serve.

    `specs` are offered to every rollout. A call is given up `grace_s` after its deadline: a sandbox that is silent
    for so long is broken. Raises ConfigError for a tool that nothing implements.
    """

    def __init__(self, specs: Sequence[ToolSpec], tools: Mapping[str, Tool] = TOOLS, grace_s: float = _GRACE_S):
        missing = [spec.name for spec in specs if spec.name not in tools]
        if missing:
            raise ConfigError(f"the environment offers the tools {missing}; implemented are {sorted(tools)}")
        self._specs = tuple(specs)
        self._tools = {spec.name: tools[spec.name] for spec in specs}
        self._grace_s = grace_s
        self._sessions: dict[str, _Session] = {}
        self.app = Starlette(
            routes=[
                Route("/tools", self._list_tools, methods=["GET"]),
                Route("/tools/{name}", self._call_tool, methods=["POST"]),
            ],
            exception_handlers={RequestError: _refuse, SandboxError: _unavailable},
        )

    def open(self, sandbox: Sandbox, *, timeout_s: float) -> str:
        """A key by which the tools act in `sandbox`, each call for at most `timeout_s`."""
        key = f"tools-{secrets.token_urlsafe(24)}"
        self._sessions[key] = _Session(sandbox, timeout_s)
        return key

    async def close(self, key: str) -> None:
        """From now on calls with this key are refused with 409; those in flight are cancelled and waited for, so that
        nothing changes under the verifier's eyes. Safe to call twice."""
        session = self._sessions[key]
        session.sandbox = None
        for call in session.calls:
            call.cancel()
        if session.calls:
            await asyncio.wait(session.calls, timeout=self._grace_s)

    def failure(self, key: str) -> str | None:
        """Why the sandbox failed, if it did while the key was open: the rollout is then no measure of the agent."""
        return self._sessions[key].failure

    async def call(self, key: str, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Raises UnknownKeyError, SealedRolloutError, RequestError, or SandboxError, which is remembered."""
        session, sandbox = self._session(key)
        tool = self._tools.get(name)
        if tool is None:
            raise RequestError(f"there is no tool {name!r}; there are {sorted(self._tools)}")
        if session.failure:
            raise SandboxError(session.failure)
        limit_s = session.timeout_s + self._grace_s
        running = asyncio.ensure_future(tool.call(sandbox, arguments, session.timeout_s))
        session.calls.add(running)
        running.add_done_callback(session.calls.discard)
        try:
            async with asyncio.timeout(limit_s):
                return await running
        except asyncio.CancelledError:
            self._session(key)  # raises when `close` did it; else it was our caller, who hung up
            raise
        except SandboxError as error:
            problem = str(error)
        except TimeoutError:
            problem = f"the sandbox did not end tool {name} within {limit_s:g} s"
        self._session(key)  # a sandbox that was stopped because the rollout ended has not failed
        session.failure = problem
        raise SandboxError(problem)

    def _session(self, key: str) -> tuple[_Session, Sandbox]:
        session = self._sessions.get(key)
        if session is None:
            raise UnknownKeyError("no rollout has this tool key; send it as `Authorization: Bearer KEY`")
        if session.sandbox is None:
            raise SealedRolloutError("the rollout has ended; its tools are closed")
        return session, session.sandbox

    async def _list_tools(self, request: Request) -> Response:
        self._session(_key_of(request))
        tools = [
            {"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)}
            for spec in self._specs
        ]
        return JSONResponse({"tools": [{"type": "function", "function": tool} for tool in tools]})

    async def _call_tool(self, request: Request) -> Response:
        key = _key_of(request)
        self._session(key)  # strangers are turned away before their body is read
        arguments = await _body_of(request)
        result = await self.call(key, request.path_params["name"], arguments)
        return JSONResponse({"output": result.output, "exit_code": result.exit_code, "timed_out": result.timed_out})


def _key_of(request: Request) -> str:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


async def _body_of(request: Request) -> dict[str, Any]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise RequestError(f"the body is longer than {_MAX_BODY_BYTES} bytes")
    try:
        arguments = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise RequestError("the body must be a JSON object with the tool's arguments")
    return arguments


async def _refuse(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse({"error": {"code": error.code, "message": str(error)}}, status_code=error.status)


async def _unavailable(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": {"code": "sandbox_failed", "message": str(error)}}, status_code=503)
