"""What rendering costs on every call: a short tail, a long one, and a whole conversation of 64 tool turns.

    python benchmarks/rendering.py [--model NAME] [--repeats 50] [--save]

Without `--model` all of the tests' tokenizers and templates in the formats of the model families are measured, and
each figure is the slowest family's. `tail_ms` is one tool result of 20 short lines behind a stored answer,
`tail_32kb_ms` one of 32 kB, `whole_64_turns_ms` a conversation of 130 messages with one segment each, `start_ms` the
loading of a tokenizer and the probing of its template. Each is the median over the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from result import ROOT, report
from upspiral.rendering.renderer import Renderer
from upspiral.types import Message, ToolCall, ToolSpec
from upspiral.weights.models import resolve_model

BASH = ToolSpec("bash", "Run.", {"type": "object", "properties": {"command": {"type": "string"}}})
CALLS = [ToolCall(f"call_{number:016x}", "bash", '{"command": "ls"}') for number in range(64)]
TARGETS = {"tail_ms": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if options.model:
            folders = {options.model: resolve_model(options.model, weights=False)}
        else:
            sys.path.insert(0, str(ROOT))
            from tests.fixtures.model_families import FAMILIES, make_family

            folders = {name: make_family(Path(work) / name, name) for name in FAMILIES}
        measured = {name: measure(folder, options.repeats) for name, folder in folders.items()}
    for name, figures in measured.items():
        print(name, figures)
    slowest = {key: max(figures[key] for figures in measured.values()) for key in next(iter(measured.values()))}
    report("rendering", slowest, TARGETS, save=options.save)


def measure(folder: Path, repeats: int) -> dict[str, float]:
    started = time.perf_counter()
    renderer = Renderer.from_folder(folder)
    start_ms = 1000 * (time.perf_counter() - started)
    stop_token = renderer.end_of_turn
    if stop_token is None:
        stop_token = renderer.encode_answer("<|observation|>")[0]

    def tail(lines: int) -> Callable[[], object]:
        messages = [Message("tool", "3 files\n" * lines, tool_call_id=CALLS[0].id)]
        return lambda: renderer.render_tail(messages, after="stop", stop_token=stop_token, calls=CALLS[:1])

    conversation = [Message("system", "Be brief."), Message("user", "Count the files.")]
    for call in CALLS:
        result = Message("tool", "3 files\n" * 20, tool_call_id=call.id)
        conversation += [Message("assistant", tool_calls=(call,)), result]
    return {
        "tail_ms": median_ms(tail(20), repeats),
        "tail_32kb_ms": median_ms(tail(4000), max(3, repeats // 10)),
        "whole_64_turns_ms": median_ms(lambda: renderer.render(conversation, [BASH]), max(3, repeats // 10)),
        "start_ms": round(start_ms, 1),
    }


def median_ms(work: Callable[[], object], repeats: int) -> float:
    work()
    times: list[float] = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - started))
    return round(statistics.median(times), 3)


if __name__ == "__main__":
    main()
