"""What the gateway adds to each call, and how many calls it carries, with an engine that takes no time.

    python benchmarks/gateway.py [--save] [--only NAME ...] [--profile FILE]

The gateway runs in a process of its own with the tiny tokenizer of the tests, a scripted engine and a real store on
disk; the client is this process, a bare HTTP client on kept-alive connections. Answers are ANSWER_TOKENS tokens that
the engine hands over one by one.

- `added_p50_ms_N`, `added_p99_ms_N`: latency of a call with N in flight. The engine takes no time, so all of it is
  added; with 64 and 512 in flight the gateway is saturated and most of it is waiting in line.
- `paced_p50_ms_N`, `paced_p99_ms_N`: the same while the engine takes PACED_S a call, as a real one would: what is above
  PACED_S.
- `calls_per_s_short`: short conversations (4 turns, about 100 tokens), 64 in flight; `calls_per_s_stream`: the same
  streamed; `calls_per_s_32k`: conversations whose history has 32k tokens in 64 turns, 16 in flight.
- `turn_cost_curve`: [turn, milliseconds] of one conversation of 256 turns, median; the ratio is turn 256 to turn 8.
  `turn_body_parse_ms_256` is what parsing that turn's body as JSON takes by itself: no gateway can do with less.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from result import ROOT, report

ANSWER_TOKENS = 8
SHORT_TURNS = 4
LONG_TURNS, LONG_TOKENS = 64, 32_768
CURVE_TURNS, CURVE_POINTS = 256, (1, 2, 4, 8, 16, 32, 64, 128, 256)
PACED_S, PACED_CHUNKS = 1.0, 8
REPEATS = 3
QUESTION = "How many lines of logs/app.log contain ERROR?"
SYSTEM = "You are a helpful assistant. Answer with the number only."
TARGETS = {"added_p50_ms_1": 3.0, "calls_per_s_short": 1000, "calls_per_s_32k": 300, "turn_cost_ratio_256_to_8": 2.0}


# The gateway's process


async def serve(folder: Path, pause_s: float) -> None:
    """Serves until stdin ends. Prints one JSON line {"url", "key"} when it is ready."""
    from upspiral.engine.scripted import ScriptedEngine, ScriptLine
    from upspiral.gateway.collector import seldom_collected
    from upspiral.gateway.http import serve_app
    from upspiral.gateway.server import Gateway
    from upspiral.rendering.renderer import Renderer
    from upspiral.trajectory.store import TrajectoryStore

    renderer = Renderer.from_folder(folder / "model")
    words = renderer.encode_answer("There are 17 files in the folder data. " * 4)[: ANSWER_TOKENS - 1]
    engine = ScriptedEngine(
        [ScriptLine(token_ids=(*words, renderer.stop_token_ids[0]))],
        encode=renderer.encode_answer,
        context_length=2**20,
        tokens_per_chunk=1,
        pause_s=pause_s,
    )
    engine.endless = True
    store = TrajectoryStore(folder / "trajectories.db")
    gateway = Gateway(renderer, engine, store, model_name="tiny", admin_key="benchmark-admin-key")
    with seldom_collected():
        async with serve_app(gateway.app) as url:
            print(json.dumps({"url": url, "key": "benchmark-admin-key"}), flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    store.close()


def run_server(options: argparse.Namespace) -> None:
    with asyncio.Runner(loop_factory=_loop_factory(options.loop)) as runner:
        if options.profile is None:
            runner.run(serve(options.serve, options.pause_s))
            return
        import cProfile

        profile = cProfile.Profile()
        profile.runcall(runner.run, serve(options.serve, options.pause_s))
        profile.dump_stats(options.profile)


def _loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if name == "asyncio":
        return None
    import uvloop  # pyright: ignore[reportMissingImports]  (optional)

    return uvloop.new_event_loop


@dataclass
class Server:
    """A gateway in a process of its own, while the context is open."""

    options: argparse.Namespace
    pause_s: float = 0.0
    url: str = ""
    admin_key: str = ""
    _process: subprocess.Popen[str] | None = None
    _folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Server:
        sys.path.insert(0, str(ROOT))
        from tests.fixtures.tiny_model import make_tokenizer

        self._folder = tempfile.TemporaryDirectory(prefix="upspiral-gateway-")
        make_tokenizer(Path(self._folder.name) / "model")
        command = [sys.executable, __file__, "--serve", self._folder.name, "--pause-s", str(self.pause_s)]
        command += ["--loop", self.options.loop]
        if self.options.profile is not None:
            command += ["--profile", str(self.options.profile)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        ready = json.loads(self._process.stdout.readline())
        self.url, self.admin_key = ready["url"], ready["key"]
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None and self._folder is not None
        self._process.communicate(timeout=60)
        self._folder.cleanup()

    def cpu_s(self) -> float:
        """Processor time that the gateway has used so far."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# The client


class Client:
    """One connection, one request at a time: as little work as HTTP allows, so that the gateway is what is measured."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, authority: str) -> None:
        self._reader, self._writer, self._authority = reader, writer, authority

    @classmethod
    async def connect(cls, url: str) -> Client:
        authority = url.removeprefix("http://")
        host, _, port = authority.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        return cls(reader, writer, authority)

    async def post(self, path: str, key: str, body: bytes) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: {self._authority}\r\nauthorization: Bearer {key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)
        headers = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        _, found, rest = headers.partition(b"content-length: ")
        answer = await self._reader.readexactly(int(rest.split(b"\r\n", 1)[0])) if found else await self._chunks()
        if not headers.startswith(b"http/1.1 200"):
            raise RuntimeError(f"{path}: {headers.split(maxsplit=2)[1].decode()} {answer[:500]!r}")
        return answer

    async def _chunks(self) -> bytes:
        parts: list[bytes] = []
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            parts.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(parts)

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


@dataclass
class Conversation:
    """An append-only conversation of one rollout. Messages are kept as JSON text, so that a turn costs the client
    little."""

    key: str
    question: str = QUESTION
    stream: bool = False
    messages: list[bytes] = field(default_factory=lambda: [orjson.dumps({"role": "system", "content": SYSTEM})])

    def body(self) -> bytes:
        """The next question's request."""
        self.messages.append(orjson.dumps({"role": "user", "content": self.question}))
        head = b'{"model":"tiny","stream":true,"messages":[' if self.stream else b'{"model":"tiny","messages":['
        return head + b",".join(self.messages) + b"]}"

    def take(self, answer: bytes) -> None:
        """Appends what the gateway answered."""
        self.messages.append(orjson.dumps({"role": "assistant", "content": self._text(answer)}))

    def _text(self, answer: bytes) -> str:
        if not self.stream:
            return orjson.loads(answer)["choices"][0]["message"]["content"]
        lines = [line[6:] for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
        return "".join(choice["delta"].get("content") or "" for x in lines for choice in orjson.loads(x)["choices"])

    async def turn(self, client: Client) -> float:
        """Seconds from the first byte sent to the last received."""
        body = self.body()
        started = time.perf_counter()
        answer = await client.post("/v1/chat/completions", self.key, body)
        seconds = time.perf_counter() - started
        self.take(answer)
        return seconds


async def open_rollouts(server: Server, count: int) -> list[str]:
    """The keys of new rollouts."""
    client = await Client.connect(server.url)
    keys = []
    for index in range(count):
        body = orjson.dumps({"task": "benchmark", "group": f"g{index}"})
        keys.append(orjson.loads(await client.post("/admin/rollouts", server.admin_key, body))["key"])
    await client.close()
    return keys


async def in_flight(
    server: Server, workers: int, work: Callable[[Client, int], Awaitable[Sequence[float]]]
) -> tuple[list[float], float]:
    """Runs `work(client, worker)` in so many workers at once. Returns all latencies, and the seconds that it took."""
    clients = await asyncio.gather(*(Client.connect(server.url) for _ in range(workers)))
    started = time.perf_counter()
    latencies = await asyncio.gather(*(work(client, index) for index, client in enumerate(clients)))
    wall_s = time.perf_counter() - started
    for client in clients:
        await client.close()
    return [each for worker in latencies for each in worker], wall_s


# What is measured


async def short_calls(server: Server, workers: int, calls: int, *, stream: bool = False) -> dict[str, Any]:
    """Conversations of SHORT_TURNS turns, each in a rollout of its own."""
    each = max(1, calls // workers // SHORT_TURNS)
    keys = await open_rollouts(server, workers * each)

    async def work(client: Client, worker: int) -> list[float]:
        latencies = []
        for key in keys[worker * each : (worker + 1) * each]:
            conversation = Conversation(key, stream=stream)
            latencies += [await conversation.turn(client) for _ in range(SHORT_TURNS)]
        return latencies

    cpu_s = server.cpu_s()
    latencies, wall_s = await in_flight(server, workers, work)
    return _figures(latencies, wall_s, server.cpu_s() - cpu_s)


async def long_calls(server: Server, workers: int, measured_turns: int) -> dict[str, Any]:
    """Turns that continue histories of LONG_TURNS turns and LONG_TOKENS tokens; building them up is not measured."""
    keys = await open_rollouts(server, workers)
    question = QUESTION + " " + "total 12 exit code 0 no such file or directory " * 200
    conversations = [Conversation(key) for key in keys]
    client = await Client.connect(server.url)
    one = Conversation((await open_rollouts(server, 1))[0], question)
    usage = orjson.loads(await client.post("/v1/chat/completions", one.key, one.body()))["usage"]["prompt_tokens"]
    for conversation in conversations:
        conversation.question = question[: len(question) * LONG_TOKENS // LONG_TURNS // usage]
    await client.close()

    async def build(client: Client, worker: int) -> list[float]:
        return [await conversations[worker].turn(client) for _ in range(LONG_TURNS)]

    async def work(client: Client, worker: int) -> list[float]:
        conversations[worker].question = QUESTION
        return [await conversations[worker].turn(client) for _ in range(measured_turns)]

    await in_flight(server, workers, build)
    client = await Client.connect(server.url)
    body = conversations[0].body()
    tokens = orjson.loads(await client.post("/v1/chat/completions", keys[0], body))["usage"]["prompt_tokens"]
    conversations[0].messages.pop()
    await client.close()
    cpu_s = server.cpu_s()
    latencies, wall_s = await in_flight(server, workers, work)
    figures = _figures(latencies, wall_s, server.cpu_s() - cpu_s)
    return {**figures, "history_tokens": tokens, "body_bytes": len(body)}


async def turn_costs(server: Server, conversations: int) -> tuple[list[float], bytes]:
    """Median seconds of each turn of conversations of CURVE_TURNS turns, and the last turn's body."""
    client = await Client.connect(server.url)
    seconds: list[list[float]] = []
    body = b""
    for key in await open_rollouts(server, conversations):
        conversation = Conversation(key)
        seconds.append([await conversation.turn(client) for _ in range(CURVE_TURNS)])
        body = b'{"messages":[' + b",".join(conversation.messages) + b"]}"
    await client.close()
    return [statistics.median(turn) for turn in zip(*seconds, strict=True)], body


def _figures(latencies: list[float], wall_s: float, cpu_s: float) -> dict[str, Any]:
    ordered = sorted(latencies)
    return {
        "p50_ms": 1000 * ordered[len(ordered) // 2],
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "calls_per_s": len(ordered) / wall_s,
        "server_cpu_ms": 1000 * cpu_s / len(ordered),
    }


async def _median_of(measure: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """The run with the median rate."""
    runs = [await measure() for _ in range(REPEATS)]
    return sorted(runs, key=lambda run: run["calls_per_s"])[REPEATS // 2]


async def measure_latency(server: Server) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for workers, calls in ((1, 1200), (64, 4096), (512, 4096)):
        run = await _median_of(lambda w=workers, c=calls: short_calls(server, w, c))
        figures[f"added_p50_ms_{workers}"] = run["p50_ms"]
        figures[f"added_p99_ms_{workers}"] = run["p99_ms"]
        if workers == 64:
            figures["calls_per_s_short"] = run["calls_per_s"]
            figures["server_cpu_ms_short"] = run["server_cpu_ms"]
    streamed = await _median_of(lambda: short_calls(server, 64, 4096, stream=True))
    return {**figures, "calls_per_s_stream": streamed["calls_per_s"], "server_cpu_ms_stream": streamed["server_cpu_ms"]}


async def measure_long(server: Server) -> dict[str, Any]:
    run = await _median_of(lambda: long_calls(server, 16, 32))
    names = {"calls_per_s": "calls_per_s_32k", "p50_ms": "p50_ms_32k", "server_cpu_ms": "server_cpu_ms_32k"}
    figures = {name: run[key] for key, name in names.items()}
    return {**figures, "history_tokens_32k": run["history_tokens"], "body_bytes_32k": run["body_bytes"]}


async def measure_curve(server: Server) -> dict[str, Any]:
    costs, body = await turn_costs(server, 2 * REPEATS)
    at = {turn: 1000 * statistics.median(costs[max(0, turn - 5) : turn + 3]) for turn in CURVE_POINTS}
    parsing = []
    for _ in range(20):
        started = time.perf_counter()
        orjson.loads(body)
        parsing.append(time.perf_counter() - started)
    return {
        "turn_cost_ratio_256_to_8": at[256] / at[8],
        "turn_cost_curve": [[turn, round(cost, 3)] for turn, cost in at.items()],
        "turn_body_parse_ms_256": 1000 * statistics.median(parsing),
    }


async def measure_paced(server: Server) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for workers in (64, 512):
        run = await short_calls(server, workers, 2 * SHORT_TURNS * workers)
        figures[f"paced_p50_ms_{workers}"] = run["p50_ms"] - 1000 * PACED_S
        figures[f"paced_p99_ms_{workers}"] = run["p99_ms"] - 1000 * PACED_S
    return figures


MEASUREMENTS: dict[str, tuple[Callable[[Server], Awaitable[dict[str, Any]]], float]] = {
    "latency": (measure_latency, 0.0),
    "long": (measure_long, 0.0),
    "curve": (measure_curve, 0.0),
    "paced": (measure_paced, PACED_S / PACED_CHUNKS),
}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name in options.only or MEASUREMENTS:
        measurement, pause_s = MEASUREMENTS[name]
        async with AsyncExitStack() as stack:
            server = stack.enter_context(Server(options, pause_s))
            await short_calls(server, 4, 16 if pause_s else 400)  # warm
            found = await measurement(server)
        print(found, file=sys.stderr, flush=True)
        figures |= found
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/gateway.json")
    parser.add_argument("--only", nargs="*", choices=list(MEASUREMENTS), help="measure only these")
    parser.add_argument("--loop", choices=("asyncio", "uvloop"), default="asyncio", help="the gateway's event loop")
    parser.add_argument("--profile", type=Path, help="write cProfile statistics of the gateway's process there")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--pause-s", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        run_server(options)
        return
    figures = asyncio.run(measure(options))
    fixed = {"answer_tokens": ANSWER_TOKENS, "loop": options.loop}
    report("gateway", {**figures, **fixed}, TARGETS, save=options.save)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
