"""Hard conversations, made from a seed: what the model samples, and agents that act on it as real ones do.

An agent sees only messages in the form of OpenAI's chat completions. It is played against anything that answers them
(`Answerer`), so that two ways of keeping tokens can be compared on the same conversations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from tokenizers import Tokenizer

from upspiral.errors import TemplateError
from upspiral.rendering.renderer import Renderer
from upspiral.types import FinishReason, Message, ToolCall, ToolSpec

TOOLS: dict[str, dict[str, Any]] = {
    "bash": {"command": {"type": "string"}, "timeout": {"type": "number"}},
    "edit": {"path": {"type": "string"}, "line": {"type": "integer"}, "force": {"type": "boolean"}},
    "list": {},
    "task": {"prompt": {"type": "string"}},
}
_TEXT = (
    "files lines count the total data logs app.log csv ERROR naïve café Grüße 你好 😀 👩\u200d👩\u200d👧 e\u0301 "
    'don\'t  wait 42 3.14 "quoted" \\n <b> & json |x| --flag {} []'
)
_WORDS = _TEXT.split(" ")
_NUMBERS = (0, 1, -7, 1.0, 0.1, 2.50, 1e3, 1e-7, 123456789, 3.0)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the engine plays for one answer."""

    token_ids: tuple[int, ...]
    finish: FinishReason


class AnswerMaker:
    """Answers in the model's own format, as token ids that need not be the tokenizer's."""

    def __init__(self, random: Random, renderer: Renderer, tokenizer: Tokenizer) -> None:
        self._random = random
        self._renderer = renderer
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self._counts = (1, 1, 1, 2, 3) if _takes_parallel_calls(renderer) else (1,)

    def text(self) -> Sampled:
        return self._answer(self._thinking() + self._words(1, 14), calls=False)

    def calls(self) -> Sampled:
        """One to three calls, with or without text before them."""
        lead = self._random.choice(["", "", self._words(1, 6), self._words(1, 4) + "\n\n"])
        count = self._random.choice(self._counts)
        return self._answer(self._thinking() + lead + "\n".join(self._call() for _ in range(count)), calls=True)

    def spawn(self) -> Sampled:
        """A call of the tool that starts a sub-agent."""
        call = self._written_call("task", {"prompt": "Please " + self._words(3, 9)})
        return self._answer(self._thinking() + call, calls=True)

    def broken(self) -> Sampled:
        """A call that cannot be read, or ids that are no text at all."""
        if self._random.random() < 0.5:
            return self._answer(self._thinking() + self._call().replace("}", "", 1), calls=False)
        ids = self._random.choices(sorted(self._vocabulary.values()), k=self._random.randint(1, 12))
        stops = self._renderer.stop_token_ids
        return Sampled((*(index for index in ids if index not in stops), self._stop(calls=False)), "stop")

    def truncated(self) -> Sampled:
        """An answer that ends at the token limit, anywhere."""
        whole = self._random.choice([self.text, self.calls])().token_ids
        return Sampled(whole[: self._random.randint(1, max(1, len(whole) - 1))], "length")

    def _answer(self, text: str, *, calls: bool) -> Sampled:
        ids = self._renderer.encode_answer(text)
        if self._random.random() < 0.35:
            ids = self._split(ids, text)
        return Sampled((*ids, self._stop(calls=calls)), "stop")

    def _stop(self, *, calls: bool) -> int:
        """What ends an answer. Where nothing closes a turn, it is what opens the next one."""
        stops = self._renderer.stop_token_ids
        if self._renderer.end_of_turn is not None:
            return stops[0]
        wanted = "observation" if calls else "user"
        return next((stop for stop in stops if wanted in self._renderer.spell([stop])), stops[0])

    def _split(self, ids: Sequence[int], text: str) -> list[int]:
        """The same text in other tokens: some are cut in two, also inside a character."""
        other: list[int] = []
        for index in ids:
            token = self._tokenizer.id_to_token(index) or ""
            cut = self._random.randint(1, len(token) - 1) if len(token) > 1 and self._random.random() < 0.3 else 0
            halves = [self._vocabulary.get(token[:cut]), self._vocabulary.get(token[cut:])]
            other += [half for half in halves if half is not None] if cut and None not in halves else [index]
        return other if self._renderer.decode(other) == self._renderer.decode(ids) else list(ids)

    def _thinking(self) -> str:
        """A thought at the beginning of an answer: always where the prompt has opened one, else now and then."""
        tags = self._renderer.thinking_tags
        is_open = tags.opened_by(self._renderer.spell(self._renderer.generation_prompt.tolist()))
        if not is_open and self._random.random() < 0.6:
            return ""
        thought = self._words(1, 8) + tags.close + self._random.choice(["", "\n", "\n\n"])
        return thought if is_open else tags.open + thought

    def _words(self, least: int, most: int) -> str:
        text = " ".join(self._random.choices(_WORDS, k=self._random.randint(least, most)))
        return self._random.choice(["", "", "", " "]) + text + self._random.choice(["", "", ".", "\n", " "])

    def _call(self) -> str:
        name = self._random.choice(["bash", "edit", "list"])
        return self._written_call(name, self._arguments() if name != "list" else {})

    def _arguments(self) -> dict[str, Any]:
        names = self._random.sample(
            ["command", "path", "line", "force", "timeout", "über"], k=self._random.randint(0, 4)
        )
        return {name: self._value(2) for name in names}

    def _value(self, depth: int) -> Any:
        kinds: list[Callable[[], Any]] = [
            lambda: self._random.choice((True, False, None)),
            lambda: self._random.choice(_NUMBERS),
            lambda: self._words(0, 3),
            lambda: self._random.choice(["true", "1.0", "null", ""]),
        ]
        if depth:
            kinds.append(lambda: [self._value(depth - 1) for _ in range(self._random.randint(0, 2))])
            kinds.append(lambda: {"b": self._value(depth - 1), "a": self._value(depth - 1)})
        return self._random.choice(kinds)()

    def _written_call(self, name: str, arguments: dict[str, Any]) -> str:
        """A call in the model's format; in Hermes format with the freedom that a model takes."""
        if self._renderer.format.name != "hermes":
            return self._renderer.format_tool_call({"name": name, "arguments": arguments})
        entry: dict[str, Any] = {"name": name, "arguments": arguments}
        if self._random.random() < 0.2:
            entry = {"arguments": arguments, "name": name}
        if not arguments and self._random.random() < 0.5:
            entry = {"name": name}
        styles: list[dict[str, Any]] = [{}, {}, {"separators": (",", ":")}, {"indent": 2}]
        style = self._random.choice(styles)
        body = json.dumps(entry, ensure_ascii=self._random.random() < 0.3, **style)
        space = self._random.choice(["\n", "\n", ""])
        return f"<tool_call>{space}{body}{space}</tool_call>"


def _takes_parallel_calls(renderer: Renderer) -> bool:
    calls = tuple(ToolCall(f"call0000{number}", "list", "{}") for number in range(2))
    try:
        renderer.render([Message("user", "Hello"), Message("assistant", tool_calls=calls)], [ToolSpec("list")])
    except TemplateError:
        return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One message of an agent's history. Another entry with the same words is another message."""

    message: dict[str, Any]
    answers: int | None = None
    """The number of the request that this message was the answer to, when the agent repeats it unchanged."""
    index: int = 0
    """Which of the request's answers it was."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One request of an agent, and what the engine is to play for it."""

    number: int
    entries: tuple[Entry, ...]
    tools: tuple[str, ...]
    script: tuple[Sampled, ...]
    """One for each answer that is asked for."""
    lost_after: int | None = None
    """The client hangs up when so many tokens have been sampled, then sends the request again."""
    repeated: bool = False
    """The client sends the request again although it has been answered, and says that it does."""

    @property
    def body(self) -> dict[str, Any]:
        tools = [{"type": "function", "function": {"name": name, "parameters": _schema(name)}} for name in self.tools]
        body: dict[str, Any] = {"model": "any", "messages": [entry.message for entry in self.entries]}
        if tools:
            body["tools"] = tools
        return {**body, "n": len(self.script)} if len(self.script) > 1 else body


class Answerer(Protocol):
    def allows(self, request: Request) -> bool:
        """Whether the chat template can render the whole conversation: some know no user after a tool's result."""
        ...

    async def answer(self, request: Request) -> list[dict[str, Any]]:
        """The assistant messages that the agent gets, in the form of chat completions."""
        ...


class _NotAllowed(Exception):
    """The template cannot render what an agent wanted to send; it does something else."""


@dataclass
class _Thread:
    """One line of conversation."""

    entries: list[Entry]
    tools: tuple[str, ...]


class Play:
    """One conversation: an agent, its sub-agents and everything that happens to its history."""

    def __init__(self, random: Random, maker: AnswerMaker, answerer: Answerer) -> None:
        self.requests: list[Request] = []
        self.happened: Counter[str] = Counter()
        self._random = random
        self._maker = maker
        self._answerer = answerer

    async def run(self) -> None:
        thread = self._thread("You are a helpful assistant.")
        moves = {
            self._step: 10, self._truncate: 2, self._edit: 2, self._branch: 2, self._compact: 1, self._delegate: 2,
            self._hang_up: 1, self._repeat: 1, self._several: 1, self._other_tools: 1, self._break: 1,
        }  # fmt: skip
        for _ in range(self._random.randint(5, 12)):
            (move,) = self._random.choices(list(moves), weights=list(moves.values()))
            before = list(thread.entries)
            try:
                await move(thread)
                self.happened[move.__name__.removeprefix("_")] += 1
            except _NotAllowed:
                thread.entries = before
                self.happened["not allowed"] += 1

    # What can happen

    async def _step(self, thread: _Thread) -> None:
        await self._ask(thread, self._random.choice([self._maker.text, self._maker.calls])())

    async def _truncate(self, thread: _Thread) -> None:
        await self._ask(thread, self._maker.truncated())

    async def _break(self, thread: _Thread) -> None:
        await self._ask(thread, self._maker.broken())

    async def _edit(self, thread: _Thread) -> None:
        """The agent rewrites something that was said."""
        place = self._random.randrange(len(thread.entries))
        message = dict(thread.entries[place].message)
        message["content"] = (message.get("content") or "") + " (edited)"
        thread.entries[place] = Entry(message)
        await self._step(thread)

    async def _branch(self, thread: _Thread) -> None:
        """The agent goes back and tries something else."""
        places = [i for i, entry in enumerate(thread.entries) if entry.message["role"] == "user"]
        del thread.entries[self._random.choice(places) + 1 :]
        await self._step(thread)

    async def _compact(self, thread: _Thread) -> None:
        """The agent asks for a summary and goes on with that alone."""
        thread.entries.append(Entry({"role": "user", "content": "Summarise what was done."}))
        await self._ask(thread, self._maker.text())
        said = next(e for e in reversed(thread.entries) if e.message["role"] == "assistant")
        summary = {"role": "user", "content": f"So far: {said.message.get('content')}\nGo on."}
        thread.entries = [*thread.entries[:1], Entry(summary)]

    async def _delegate(self, thread: _Thread) -> None:
        """The agent starts another one, and takes its last words as the result of the call."""
        (message,) = await self._send(thread, (self._maker.spawn(),))
        entry = self._echo(message, self.requests[-1])
        thread.entries.append(entry)
        call = entry.message["tool_calls"][0]
        helper = self._thread(None, json.loads(call["function"]["arguments"])["prompt"])
        for _ in range(self._random.randint(1, 3)):
            await self._step(helper)
        (last,) = await self._send(helper, (self._maker.text(),))
        thread.entries.append(_result(call, last.get("content") or ""))

    async def _hang_up(self, thread: _Thread) -> None:
        script = self._maker.calls()
        after = self._random.randint(1, max(1, len(script.token_ids) - 1))
        (message,) = await self._send(thread, (script,), lost_after=after)
        self._take(thread, message)

    async def _repeat(self, thread: _Thread) -> None:
        (message,) = await self._send(thread, (self._maker.text(),), repeated=True)
        self._take(thread, message)

    async def _several(self, thread: _Thread) -> None:
        messages = await self._send(thread, (self._maker.text(), self._maker.calls()))
        index = self._random.randrange(2)
        self._take(thread, messages[index], index)

    async def _other_tools(self, thread: _Thread) -> None:
        thread.tools = tuple(self._random.sample(list(TOOLS), k=self._random.randint(1, len(TOOLS))))
        await self._step(thread)

    # How it is done

    def _thread(self, system: str | None, question: str = "How many files are there?") -> _Thread:
        entries = [Entry({"role": "system", "content": system})] if system else []
        return _Thread([*entries, Entry({"role": "user", "content": question})], tuple(TOOLS))

    async def _ask(self, thread: _Thread, script: Sampled) -> None:
        (message,) = await self._send(thread, (script,))
        self._take(thread, message)

    async def _send(self, thread: _Thread, script: tuple[Sampled, ...], **trouble: Any) -> list[dict[str, Any]]:
        request = Request(len(self.requests), tuple(thread.entries), thread.tools, script, **trouble)
        if not self._answerer.allows(request):
            raise _NotAllowed
        self.requests.append(request)
        return await self._answerer.answer(request)

    def _take(self, thread: _Thread, message: dict[str, Any], index: int = 0) -> None:
        """Appends the answer and what the agent has to say to it."""
        entry = self._echo(message, self.requests[-1], index)
        thread.entries.append(entry)
        calls = entry.message.get("tool_calls") or []
        thread.entries += [_result(call, self._random.choice(["ok", "12\n34", "", "café"])) for call in calls]
        if not calls:
            words = self._random.choice(["Go on.", "Are you sure?", "continue", "naïve 😀"])
            thread.entries.append(Entry({"role": "user", "content": words}))

    def _echo(self, message: dict[str, Any], request: Request, index: int = 0) -> Entry:
        """The answer as an agent sends it back: the same to everybody but a computer."""
        echo: dict[str, Any] = {"role": "assistant", "content": message.get("content")}
        if self._random.random() < 0.3:
            echo["content"] = echo["content"] or ""
        if self._random.random() < 0.3 and message.get("reasoning_content"):
            echo["reasoning_content"] = message["reasoning_content"]
        rename, rewrite = self._random.random() < 0.4, self._random.choice([str, _as_python, _as_javascript, _indented])
        if message.get("tool_calls"):
            echo["tool_calls"] = [
                {
                    "id": f"mine_{request.number}_{place}" if rename else call["id"],
                    "type": "function",
                    "function": {
                        "name": call["function"]["name"],
                        "arguments": rewrite(call["function"]["arguments"]),
                    },
                }
                for place, call in enumerate(message["tool_calls"])
            ]
        return Entry(echo, request.number, index)


def _result(call: dict[str, Any], content: str) -> Entry:
    return Entry({"role": "tool", "tool_call_id": call["id"], "content": content})


def _schema(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": TOOLS[name]}


def _as_python(arguments: str) -> str:
    return json.dumps(json.loads(arguments))


def _indented(arguments: str) -> str:
    return json.dumps(json.loads(arguments), indent=2, sort_keys=True)


def _as_javascript(arguments: str) -> str:
    """As JSON.stringify(JSON.parse(...)) writes it: no spaces, and whole numbers without a point."""
    return json.dumps(_whole(json.loads(arguments)), ensure_ascii=False, separators=(",", ":"))


def _whole(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {key: _whole(item) for key, item in value.items()} if isinstance(value, dict) else value
