"""A run, or one rollout of it, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from upspiral.dashboard.conversation import Conversation, Piece, Turn, read_conversation
from upspiral.dashboard.run_data import RunData
from upspiral.dashboard.token_text import load_token_texts
from upspiral.errors import StoreError
from upspiral.monitor.panel import number, percent
from upspiral.types import Ledger, Rollout

MAX_ROLLOUTS = 60
"""How many rollouts a terminal is shown, the newest; a pipe gets all."""
LEAST_LIKELY = 5
MAX_OUTPUT_LINES = 40
# Background of a token by its probability, from sure to surprised: (at least, colour). Readable on light and dark.
PROBABILITY_COLOURS = (
    (0.9, ""),
    (0.5, "black on #f7e3b5"),
    (0.2, "black on #f3bd6c"),
    (0.05, "black on #ec8b4a"),
    (0.0, "white on #b8402f"),
)
# Unicode has a picture for each of the first 32; the rest become the replacement character.
_VISIBLE_CONTROLS = dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)
_VISIBLE_CONTROLS |= {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_STATUS_WIDTH = 32
_WORDS = ("id", "split", "status")
_ROLE_COLOURS = {"system": "dim", "user": "bold blue", "assistant": "bold green", "tool": "bold magenta"}


def view(run_folder: Path, rollout_id: str | None = None, *, console: Console | None = None) -> None:
    """Prints the run's steps, evaluations and rollouts, or with `rollout_id` that rollout as a conversation with
    token log-probabilities and advantages. The start of an id is enough when only one rollout has it.

    Raises StoreError, naming the nearest ids, when there is no such run or rollout.
    """
    console = console or Console()
    with RunData.open(run_folder) as run:
        if rollout_id is None:
            console.print(_run_page(run, MAX_ROLLOUTS if console.is_terminal else None))
        else:
            console.print(_rollout_page(run, rollout_id, colours=console.is_terminal))


def _run_page(run: RunData, limit: int | None) -> RenderableType:
    state = "finished" if run.finished else "not finished"
    steps = f"{len(run.steps)} of {run.planned_steps} steps" if run.planned_steps else f"{len(run.steps)} steps"
    parts: list[RenderableType] = [Text.assemble((run.name, "bold"), f"  {run.model}  {steps}, {state}\n")]
    if run.evaluations:
        parts.append(_evaluation_table(run))
    if run.steps:
        parts.append(_step_table(run))
    rollouts = run.rollouts()
    if rollouts:
        parts.append(_rollout_table(rollouts, limit))
        parts.append(Text(f"upspiral view {run.folder} ROLLOUT shows one of them.", style="dim"))
    if len(parts) == 1:
        parts.append(Text("nothing measured yet", style="dim"))
    return Group(*parts)


def _evaluation_table(run: RunData) -> Table:
    table = _table("held-out success", ["step", "version", "success", "rate", "95 % interval", "calls"])
    for line in run.evaluations:
        table.add_row(
            str(line["step"]),
            str(line.get("version", "-")),
            f"{line['success']}/{line['tasks']}",
            percent(line["rate"]),
            f"{100 * line['low']:.1f} to {100 * line['high']:.1f}",
            number(line.get("mean_calls"), 1),
        )
    return table


def _step_table(run: RunData) -> Table:
    table = _table("steps", ["step", "reward", "signal", "trained", "loss", "entropy", "mismatch", "tok/s", "seconds"])
    for line in run.steps:
        table.add_row(
            str(line["step"]),
            number(line.get("reward_mean")),
            f"{line.get('groups_with_signal', '-')}/{line.get('groups_sampled', '-')}",
            f"{line.get('effective_batch', '-')}/{line.get('rollouts', '-')}",
            number(line.get("loss"), 4),
            number(line.get("entropy")),
            number(line.get("mismatch_mean_abs"), 4),
            number(line.get("sampled_tokens_per_s"), 0),
            number((line.get("seconds") or {}).get("total"), 1),
        )
    return table


def _rollout_table(rollouts: Sequence[Rollout], limit: int | None) -> Table:
    shown = rollouts if limit is None else rollouts[-limit:]
    title = "rollouts" if len(shown) == len(rollouts) else f"rollouts, the newest {len(shown)} of {len(rollouts)}"
    table = _table(title, ["id", "step", "split", "status", "reward"])
    table.add_column("instruction", no_wrap=True, overflow="ellipsis", ratio=1)
    table.expand = True
    for rollout in shown:
        status = f"{rollout.status}: {rollout.reason}" if rollout.reason else str(rollout.status)
        about = [Text(rollout.id), Text(str(rollout.step)), Text(rollout.split), Text(harmless(status)[:_STATUS_WIDTH])]
        table.add_row(*about, _reward(rollout), Text(harmless(_first_line(rollout))))
    # Only the instruction gives way in a narrow terminal.
    for column in table.columns[:-1]:
        column.min_width = max(len(str(cell)) for cell in [column.header, *column.cells])
    return table


def _rollout_page(run: RunData, rollout_id: str, colours: bool) -> RenderableType:
    rollout = _find(run, rollout_id)
    assert run.store is not None
    talk = read_conversation(run.store, rollout, load_token_texts(run.model))
    parts: list[RenderableType] = [_header(talk)]
    if any(turn.pieces for turn in talk.turns):
        parts += [_legend()] if colours else []
    elif talk.ledger.sampled:
        parts.append(
            Text(f"(no tokens shown: the tokenizer of {run.model or 'the model'} is not at hand)", style="dim")
        )
    parts += [Padding(_turn(turn, colours), (0, 0, 0, 2 * turn.depth)) for turn in talk.turns]
    return Group(*parts, Rule(style="dim"), _footer(talk))


def _find(run: RunData, rollout_id: str) -> Rollout:
    rollouts = {rollout.id: rollout for rollout in run.rollouts()}
    if rollout_id in rollouts:
        return rollouts[rollout_id]
    starting = [name for name in rollouts if name.startswith(rollout_id)]
    if len(starting) == 1:
        return rollouts[starting[0]]
    near = starting[:5] or get_close_matches(rollout_id, rollouts, n=3, cutoff=0.4)
    if not rollouts:
        hint = "it has no rollouts yet"
    elif near:
        hint = (
            f"{'it could be' if starting else 'did you mean'} {', '.join(near)}{' ...' if len(starting) > 5 else ''}?"
        )
    else:
        hint = f"it has {len(rollouts)}, from {next(iter(rollouts))}; `upspiral view {run.folder}` lists them"
    raise StoreError(f"{run.folder} has no rollout {rollout_id!r}; {hint}")


def _header(talk: Conversation) -> Text:
    rollout = talk.rollout
    text = Text.assemble((rollout.id, "bold"), f"  {rollout.split} step {rollout.step}, task {rollout.task_id}")
    text.append(f", group {rollout.group_id}\n{rollout.status}")
    if rollout.reason:
        text.append(f" ({harmless(rollout.reason)})")
    text.append(", reward ").append(_reward(rollout))
    text.append(f", {talk.calls} model call{'' if talk.calls == 1 else 's'}")
    if talk.is_tree:
        text.append(", a tree: an indented turn hangs where it says", style="yellow")
    return text


def _legend() -> Text:
    text = Text("token probability  ", style="dim")
    bounds = [1.0, *(low for low, _ in PROBABILITY_COLOURS)]
    for (low, colour), high in zip(PROBABILITY_COLOURS, bounds, strict=False):
        text.append(f" {low:g} to {high:g} ", colour).append(" ")
    return text


def _turn(turn: Turn, colours: bool) -> RenderableType:
    parts: list[RenderableType] = [Text(), _turn_title(turn)]
    parts += [Text.assemble(("$ ", "green"), (harmless(command), "bold")) for command in turn.commands]
    if turn.pieces:
        parts.append(_tokens(turn.pieces))
        parts.append(_least_likely(turn.pieces) if colours else _all_logprobs(turn.pieces))
    elif turn.text:
        parts.append(Text(_clipped(harmless(turn.text.rstrip())), style="dim" if turn.role == "system" else ""))
    elif not turn.commands:
        parts.append(Text("(empty)", style="dim"))
    return Group(*parts)


def _turn_title(turn: Turn) -> Text:
    node = turn.node
    text = Text.assemble((turn.role, _ROLE_COLOURS[turn.role]), (f"  #{node.id}", "dim"))
    if turn.branches_from is not None:
        text.append(f"  {node.reason}, after #{turn.branches_from}", "yellow")
    if turn.credit:
        colour = "green" if turn.credit.total > 0 else "red" if turn.credit.total < 0 else ""
        text.append(f"  advantage {turn.credit.total:+.3f}", colour)
        if turn.credit.positive and turn.credit.negative:
            text.append(f" ({turn.credit.positive:+.3f} and {turn.credit.negative:+.3f})", "dim")
    if turn.mean_logprob is None:
        return text.append(f"  {len(node.token_ids)} tokens", "dim")
    versions = sorted({int(version) for version in node.versions[node.sampled]})
    text.append(f"  {node.num_sampled} tokens, mean logprob {turn.mean_logprob:.3f}", "dim")
    text.append(f", version {', '.join(map(str, versions))}, finish {node.finish_reason}", "dim")
    return text if node.delivered else text.append("  never delivered", "yellow")


def _tokens(pieces: Sequence[Piece]) -> Text:
    text = Text()
    for piece in pieces:
        text.append(harmless(piece.text), _colour(piece.probability))
    return text


def _least_likely(pieces: Sequence[Piece]) -> Text:
    ranked = sorted(pieces, key=lambda piece: piece.logprob)[:LEAST_LIKELY]
    return Text.assemble(("least likely  ", "dim"), (_logprobs(ranked), "dim"))


def _all_logprobs(pieces: Sequence[Piece]) -> Text:
    """For a pipe, which has no colours."""
    return Text(f"logprobs  {_logprobs(pieces)}")


def _logprobs(pieces: Sequence[Piece]) -> str:
    return "  ".join(f"{piece.text!r} {piece.logprob:.3f}" for piece in pieces)


def harmless(text: str) -> str:
    """Control characters made visible: what a model wrote must not steer the terminal."""
    return text.translate(_VISIBLE_CONTROLS)


def _colour(probability: float) -> str:
    return next(colour for low, colour in PROBABILITY_COLOURS if probability >= low)


def _footer(talk: Conversation) -> Text:
    text = Text.assemble(
        ("answer  ", "dim"), harmless(talk.rollout.answer) or "-", ("\nledger  ", "dim"), _ledger(talk.ledger)
    )
    if talk.credit and talk.credit.masked:
        text.append(f"\nmasked: {talk.credit.masked}", "yellow")
    return text


def _ledger(ledger: Ledger) -> Text:
    masked = [f" + masked {count:,} ({reason})" for reason, count in ledger.masked.items()]
    dropped = [f" + dropped {count:,} ({reason})" for reason, count in ledger.dropped.items()]
    closed = ledger.difference == 0
    text = f"sampled {ledger.sampled:,} = trained {ledger.trained:,}{''.join(masked + dropped)}"
    mark = ("  ✓", "green") if closed else (f"  ✗ {ledger.difference:,} unaccounted for", "red")
    return Text.assemble(text, mark)


def _clipped(text: str) -> str:
    lines = text.splitlines()
    if len(lines) <= MAX_OUTPUT_LINES:
        return text
    return "\n".join([*lines[:MAX_OUTPUT_LINES], f"... {len(lines) - MAX_OUTPUT_LINES} more lines"])


def _reward(rollout: Rollout) -> Text:
    if rollout.reward is None:
        return Text("-", style="dim")
    return Text(f"{rollout.reward:g}", style="green" if rollout.reward >= 1 else "red")


def _first_line(rollout: Rollout) -> str:
    return (rollout.instruction.strip().splitlines() or [""])[0]


def _table(title: str, columns: Sequence[str]) -> Table:
    """Numbers to the right, words to the left."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in _WORDS else "right", no_wrap=True)
    return table
