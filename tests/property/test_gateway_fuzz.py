"""Whatever comes in: no 500, no hang, nothing of another rollout, and a refusal that names the field.

A new route joins with one line in EXAMPLES: a valid body is enough, it is taken apart here. A route without a line
fails `test_every_route_is_fuzzed`.
"""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from starlette.routing import Route, WebSocketRoute

from tests.fixtures.tiny_model import make_tokenizer
from upspiral.engine.scripted import ScriptedEngine, ScriptLine
from upspiral.gateway.http import serve_app
from upspiral.gateway.server import KEY_PREFIX, Gateway
from upspiral.rendering.renderer import Renderer
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Rollout

DEADLINE_S = 10.0
ADMIN_KEY = "ak-up-fuzz-admin-secret"
SECRET = "xylophone"
"""What only the other rollout talks about."""
TOOL = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Run a command.",
        "parameters": {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls", "n": [1]}'}}
CHAT: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How many "}, {"type": "text", "text": "files?"}]},
        {"role": "assistant", "content": "Looking.", "tool_calls": [CALL], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "a b c"},
        {"role": "user", "content": "Well?"},
    ],
    "tools": [TOOL],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "n": 1,
    "stop": ["END"],
    "max_tokens": 20,
    "max_completion_tokens": 20,
    "temperature": 0.7,
    "top_p": 0.9,
    "seed": 7,
    "min_p": 0.1,
    "logprobs": False,
    "user": "somebody",
}


ITEMS = [
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "How many files?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]},
    {"type": "function_call", "call_id": "call_1", "name": "bash", "arguments": '{"command": "ls"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "a b c"},
    {"role": "user", "content": "Well?"},
]
RESPONSES: dict[str, Any] = {
    "model": "m",
    "instructions": "Be brief.",
    "input": ITEMS,
    "tools": [{"type": "function", **TOOL["function"], "strict": False}],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "max_output_tokens": 20,
    "temperature": 0.7,
    "top_p": 0.9,
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["reasoning.encrypted_content"],
    "text": {"format": {"type": "text"}, "verbosity": "low"},
    "truncation": "disabled",
    "metadata": {"a": "b"},
    "store": True,
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": "How many files?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {"command": "ls", "n": [1]}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "a b c"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ],
    "tools": [{"name": "bash", "description": "Run.", "input_schema": TOOL["function"]["parameters"]}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": False},
    "max_tokens": 20,
    "stop_sequences": ["END"],
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "metadata": {"user_id": "somebody"},
}


@dataclass(frozen=True)
class Example:
    """What a route takes when all is well. `{id}` in a path is the rollout, `{response_id}` a stored response of it."""

    key: Literal["rollout", "admin", "none"]
    bodies: Sequence[Mapping[str, Any]] = ()
    status: int = 200


EXAMPLES: dict[tuple[str, str], Example] = {
    ("POST", "/v1/chat/completions"): Example(
        "rollout", [CHAT, {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True}]
    ),
    ("POST", "/v1/responses"): Example("rollout", [RESPONSES, {**RESPONSES, "stream": True}, {"input": "hi"}]),
    ("POST", "/v1/responses/compact"): Example("rollout", [{"model": "m", "input": ITEMS}]),
    ("POST", "/v1/responses/input_tokens"): Example("rollout", [RESPONSES]),
    ("GET", "/v1/responses"): Example("rollout", status=400),
    ("GET", "/v1/responses/{response_id}"): Example("rollout"),
    ("DELETE", "/v1/responses/{response_id}"): Example("rollout"),
    ("GET", "/v1/responses/{response_id}/input_items"): Example("rollout"),
    ("POST", "/v1/responses/{response_id}/cancel"): Example("rollout", [{}], status=400),
    ("POST", "/v1/messages"): Example("rollout", [MESSAGES, {**MESSAGES, "stream": True}]),
    ("POST", "/v1/messages/count_tokens"): Example("rollout", [MESSAGES]),
    ("GET", "/v1/models"): Example("rollout"),
    ("GET", "/v1/models/{model:path}"): Example("rollout"),
    ("GET", "/health"): Example("none"),
    ("GET", "/metrics"): Example("none"),
    ("GET", "/admin/rollouts"): Example("admin"),
    ("POST", "/admin/rollouts"): Example("admin", [{"task": "t", "group": "g", "instruction": "Count."}]),
    ("POST", "/admin/rollouts/{id}/finish"): Example("admin", [{"reward": 0.5}]),
    ("GET", "/admin/rollouts/{id}/graph"): Example("admin"),
}


# What goes wrong


@dataclass(frozen=True)
class Raw:
    """JSON text that no JSON library would write."""

    text: str


@dataclass(frozen=True)
class Case:
    """One request."""

    method: str
    path: str
    query: str
    key: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    response: Literal["own", "other", "unknown"] = "own"
    """Whose stored response `{response_id}` is."""
    key_in_path: bool = False
    expects: str | None = None
    """When it is refused, the message has to name this."""


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["\x00", "\ud800", "😀" * 50, "x" * 20_000, "<|im_end|>", "<tool_call>", "../..", "null", "user"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("-0"), Raw("01"), Raw("1.")]),
)
DEEP = st.sampled_from([5, 120, 500, 1000, 3000, 50_000]).flatmap(
    lambda depth: st.sampled_from([Raw("[" * depth + "]" * depth), Raw('{"a":' * depth + "1" + "}" * depth)])
)
SHALLOW = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(
    SHALLOW,
    DEEP,
    st.lists(SHALLOW, max_size=3),
    st.dictionaries(st.text(max_size=5), SHALLOW, max_size=3),
    st.builds(lambda text: Raw('{"a":1,"a":2,"' + text + '":3}'), st.sampled_from(["a", "role", "type"])),
    st.builds(lambda depth: "[" * depth + "]" * depth, st.sampled_from([10, 900, 5000, 100_000])),
)
HEADER_NAMES = st.sampled_from(
    b"content-type accept x-stainless-retry-count x-upspiral-retry x-api-key x-codex-turn-metadata anthropic-version "
    b"x-claude-code-session-id x-claude-code-agent-id anthropic-beta x-session-id thread-id cookie transfer-encoding "
    b"content-encoding upgrade connection host origin range x-forwarded-for".split()
)
HEADER_VALUES = st.one_of(
    st.sampled_from([b"", b"1", b"-1", b"9" * 50, b"{", b'{"thread_id": [[]]}', b"[" * 5000, b"gzip", b"close"]),
    st.binary(max_size=20).map(lambda value: bytes(x for x in value if x >= 32 and x != 127)),
)
HEADERS = st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=3)
TROUBLE = st.sampled_from(["cut", "garbage", "latin", "list", "text", "empty", "bom", "twice", "null", "surrogate"])
METHODS = st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
KEYS = st.sampled_from(["", "wrong", "sk-up-wrong", "rollout", "admin", "sealed", "\xe9"])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    (method, path), example = draw(st.sampled_from(sorted(EXAMPLES.items(), key=lambda item: item[0])))
    case = Case(method, path, "", example.key, (), b"")
    expects: list[str | None] = []
    if example.bodies:
        body = copy.deepcopy(dict(draw(st.sampled_from(list(example.bodies)))))
        for _ in range(draw(st.sampled_from([0, 1, 1, 1, 1, 2, 4]))):
            if body:
                expects.append(draw_mutation(draw, body))
        case = replace(case, body=json_text(body).encode("utf-8", "surrogatepass"))
    if draw(st.integers(0, 9)) == 0:
        case = replace(case, body=troubled(draw(TROUBLE), case.body))
        expects.append(None)
    if draw(st.integers(0, 3)) == 0:
        query = draw(st.sampled_from(["", "?limit=1", "?limit=x", "?status=running", "?status=%00", "?beta=true&x=1"]))
        case = replace(case, headers=tuple(draw(HEADERS)), query=query)
        expects.append(None)
    if draw(st.integers(0, 9)) == 0:
        case = replace(case, method=draw(METHODS), key=draw(KEYS))
        expects.append(None)
    if draw(st.integers(0, 4)) == 0:
        in_path = draw(st.booleans()) and example.key == "rollout"
        case = replace(case, key_in_path=in_path, response=draw(st.sampled_from(["own", "other", "unknown"])))
    return replace(case, expects=expects[0] if len(expects) == 1 else None)


def draw_mutation(draw: st.DrawFn, body: dict[str, Any]) -> str:
    """Changes one place of the body. Returns the top-level field that it is in."""
    path = draw(st.sampled_from(list(places(body))))
    parent: Any = body
    for step in path[:-1]:
        parent = parent[step]
    what = draw(st.sampled_from(["replace", "replace", "replace", "delete", "add"]))
    if what == "replace":
        parent[path[-1]] = draw(VALUES)
    elif what == "delete":
        del parent[path[-1]]
    elif isinstance(parent, dict):
        name = draw(st.sampled_from(["extra", "", "cache_control", "response_format", "function_call", "é"]))
        parent[name] = draw(VALUES)
        return name if parent is body else str(path[0])
    else:
        parent.insert(0, draw(VALUES))
    return str(path[0])


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in entries:
        yield from places(item, (*path, step))


def json_text(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{json_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(json_text(item) for item in value) + "]"
    return json.dumps(value)


def troubled(trouble: str, body: bytes) -> bytes:
    return {
        "cut": body[: len(body) // 2],
        "garbage": b"\x00\xff\xfe{",
        "latin": body.replace(b"e", b"\xe9", 1),
        "list": b"[" + body + b"]",
        "text": b'"hello"',
        "empty": b"",
        "bom": b"\xef\xbb\xbf" + body,
        "twice": body + body,
        "null": b"null",
        "surrogate": body.replace(b"e", b"\xed\xa0\x80", 1),
    }[trouble]


# What is served


@dataclass
class Stage:
    """One gateway for all examples; each has a rollout of its own beside one that talks about the secret."""

    runner: asyncio.Runner
    gateway: Gateway
    store: TrajectoryStore
    url: str
    keys: dict[str, str]
    other_response: str = ""
    rollouts: int = 0
    secrets: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("fuzz")
    renderer = Renderer.from_folder(make_tokenizer(folder / "model"))
    store = TrajectoryStore(folder / "trajectories.db")
    script = ["17 files", '<tool_call>\n{"name": "bash", "arguments": {"command": "ls"}}\n</tool_call>', "<think>a"]
    with asyncio.Runner() as runner:
        engine = ScriptedEngine([ScriptLine(text=text) for text in script], encode=renderer.encode_answer)
        engine.endless = True
        gateway = Gateway(renderer, engine, store, model_name="tiny", admin_key=ADMIN_KEY)
        server = serve_app(gateway.app)
        url = runner.run(server.__aenter__())
        keys = {"admin": ADMIN_KEY, "sealed": gateway.open_rollout(Rollout("sealed", "t", "g"))}
        runner.run(gateway.seal_rollout("sealed"))
        keys["other"] = gateway.open_rollout(Rollout("other", SECRET, "g", instruction=SECRET))
        stage = Stage(runner, gateway, store, url, keys)
        stage.secrets = [SECRET.encode(), *(key.encode() for key in keys.values())]
        runner.run(talk_about_the_secret(stage))
        yield stage
        runner.run(server.__aexit__(None, None, None))
    store.close()


async def talk_about_the_secret(stage: Stage) -> None:
    stage.other_response = await stored_response(stage, "other", SECRET)
    body = json.dumps({"messages": [{"role": "user", "content": SECRET}]}).encode()
    status, _, answer = await send(stage, Case("POST", "/v1/chat/completions", "", "other", (), body), {})
    assert status == 200, answer


async def stored_response(stage: Stage, key: str, text: str) -> str:
    body = json.dumps({"input": text}).encode()
    status, _, answer = await send(stage, Case("POST", "/v1/responses", "", key, (), body), {})
    assert status == 200, answer
    return json.loads(answer)["id"]


async def send(stage: Stage, case: Case, places: Mapping[str, str]) -> tuple[int, bytes, bytes]:
    """Status, headers and body of the answer, in time and on a connection of its own."""
    host, _, port = stage.url.removeprefix("http://").partition(":")
    key, path = stage.keys.get(case.key, case.key), case.path.replace("{model:path}", "any/model")
    for name, value in places.items():
        path = path.replace(f"{{{name}}}", value)
    if case.key_in_path:
        path = f"/r/{quote(key) or '-'}{path}"
    lines = [f"{case.method} {path}{case.query} HTTP/1.1\r\nhost: x\r\n".encode()]
    if case.key != "none" and not case.key_in_path:
        lines.append(b"authorization: Bearer " + key.encode("latin-1") + b"\r\n")
    lines += [name + b": " + value + b"\r\n" for name, value in case.headers]
    lines.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(case.body))
    async with asyncio.timeout(DEADLINE_S):
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        writer.write(b"".join(lines) + case.body)
        answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        body = unchunked(body)
    return int(head.split(b" ", 2)[1]), head, body


def unchunked(body: bytes) -> bytes:
    parts: list[bytes] = []
    while True:
        size, _, rest = body.partition(b"\r\n")
        if int(size, 16) == 0:
            return b"".join(parts)
        parts.append(rest[: int(size, 16)])
        body = rest[int(size, 16) + 2 :]


# What must hold


def test_every_route_is_fuzzed(stage: Stage) -> None:
    """Sockets are in test_socket_fuzz.py."""
    assert all(isinstance(route, Route | WebSocketRoute) for route in stage.gateway.app.routes)
    served = {
        (method, route.path.removeprefix(KEY_PREFIX))
        for route in stage.gateway.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == set(EXAMPLES), "give each route a valid body in EXAMPLES"


def test_the_examples_are_valid(stage: Stage) -> None:
    for (method, path), example in EXAMPLES.items():
        for body in example.bodies or [None]:
            raw = b"" if body is None else json.dumps(body).encode()
            status, _, answer = stage.runner.run(in_a_new_rollout(stage, Case(method, path, "", example.key, (), raw)))
            assert status == example.status, (path, answer)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
def test_nothing_breaks_and_nothing_leaks(stage: Stage, case: Case) -> None:
    check(stage, case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=cases())
def test_nothing_breaks_in_the_long_run(stage: Stage, case: Case) -> None:
    check(stage, case)


def check(stage: Stage, case: Case) -> None:
    before = len(stage.gateway.graph("other").nodes)
    with error_log() as errors:
        status, head, body = stage.runner.run(in_a_new_rollout(stage, case))
    event(f"{case.method} {case.path} -> {status}")
    assert status < 500, (status, body[:2000])
    assert not errors, errors
    told = head + body
    leaked = {secret for secret in stage.secrets if secret in told}
    # The list of rollouts is the administrator's to see.
    listing = (case.method, case.path, case.key) == ("GET", "/admin/rollouts", "admin")
    assert leaked <= ({SECRET.encode()} if listing else set()), leaked
    assert len(stage.gateway.graph("other").nodes) == before
    check_body(case, status, head, body)


def check_body(case: Case, status: int, head: bytes, body: bytes) -> None:
    if b"text/event-stream" in head:
        assert b"server_error" not in body and b"api_error" not in body, body[-2000:]
        return
    if status >= 400 and b"application/json" in head and case.method != "HEAD":
        message = json.loads(body)["error"]["message"]
        assert message, body
        if "is not valid JSON" in message or message.startswith("method GET") or "context holds" in message:
            return  # the place stands in the text, or it is the whole; there is no field to name
        if case.expects is not None:
            assert case.expects in message, (case.expects, message)
        elif status == 400 and case.method == "POST" and not case.headers and case.body[:1] != b"{":
            assert "body" in message, message


async def in_a_new_rollout(stage: Stage, case: Case) -> tuple[int, bytes, bytes]:
    stage.rollouts += 1
    name = f"r{stage.rollouts}"
    stage.keys["rollout"] = stage.gateway.open_rollout(Rollout(name, "t", "g"))
    places = {"id": name, "response_id": {"other": stage.other_response, "unknown": "resp_%00"}.get(case.response, "")}
    if "{response_id}" in case.path and case.response == "own":
        places["response_id"] = await stored_response(stage, "rollout", "hello")
    try:
        return await send(stage, case, places)
    finally:
        if stage.gateway.is_live(name):
            await stage.gateway.seal_rollout(name)
        check_graph(stage, name)


def check_graph(stage: Stage, name: str) -> None:
    """Nothing of the other rollout, and nothing that the store would not take back."""
    stored = stage.store.graph(name)
    assert [node.id for node in stored.nodes] == list(range(len(stored.nodes)))
    assert not any(node.message is not None and SECRET in node.message.text for node in stored.nodes)


@contextmanager
def error_log() -> Iterator[list[str]]:
    """What is logged as an error meanwhile."""
    log = _Log()
    logging.getLogger().addHandler(log)
    try:
        yield log.errors
    finally:
        logging.getLogger().removeHandler(log)


class _Log(logging.Handler):
    """What was logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.errors: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.errors.append(self.format(record))
