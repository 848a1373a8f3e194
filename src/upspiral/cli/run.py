"""`upspiral run`: a run file becomes a run folder with a report."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from upspiral.cli.packages import need_training_packages
from upspiral.config.loader import dump_toml, load_run_config
from upspiral.config.models import RunConfig
from upspiral.errors import ConfigError, UpspiralError

if TYPE_CHECKING:
    from upspiral.loop.run import RunResult


def run(
    file: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True)],
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    on: str | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    run: Path | None = None,
) -> None:
    """Train a model as a run file says.

    Parameters
    ----------
    file
        The run file (TOML); recipes/ has some to start from.
    overrides
        Keys of the run file as flags: --steps 5 --trainer.lr 1e-5. They win over the file.
    dry_run
        Print the resolved config and stop.
    on
        Where: "local" starts Ray on this machine, "auto" joins its cluster, ray://HOST:10001 another one
        (cluster.address); Ray is not used when not given.
    resume
        Go on with the run in the folder, after an interruption or with more steps.
    run
        The run folder; runs/NAME when not given.
    """
    flags = parse_flags(overrides) + ([("cluster.address", on)] if on is not None else [])
    config = load_run_config(file, flags)
    if dry_run:
        sys.stdout.write(dump_toml(config))
        return
    folder = run or Path("runs") / config.name
    need_training_packages("run")
    from upspiral.loop.folder import has_run

    try:
        _train(config, folder, resume)
    except KeyboardInterrupt:
        where = ["--on", on] if on is not None else []
        begun = ["--resume"] if has_run(folder) else []
        again = shlex.join(["upspiral", "run", str(file), *overrides, *where, "--run", str(folder), *begun])
        print(f"to go on: {again}", file=sys.stderr)
        raise
    except UpspiralError as error:
        if has_run(folder) and not isinstance(error, ConfigError):
            print(f"the run so far is in {folder}; when mended: add --resume", file=sys.stderr)
        raise


def parse_flags(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as pairs; hyphens in a key mean underscores. Raises ConfigError otherwise."""
    pairs: list[tuple[str, str]] = []
    waiting = list(tokens)
    while waiting:
        flag = waiting.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"{flag!r} is no flag; give keys as --trainer.lr 1e-5")
        key, separator, value = flag[2:].partition("=")
        if not separator:
            if not waiting or waiting[0].startswith("--"):
                raise ConfigError(f"{flag} has no value; only --dry-run and --resume stand alone")
            value = waiting.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def _train(config: RunConfig, folder: Path, resume: bool) -> None:
    from upspiral.dashboard.report import write_report

    if config.cluster.address is not None:
        from upspiral.launch.ray.run_host import run_on_ray

        result = run_on_ray(config, folder, resume=resume)
    else:
        result = _train_here(config, folder, resume)
    if result.stopped:
        print(result.stopped)
    print(f"report: {write_report(folder).resolve()}")


def _train_here(config: RunConfig, folder: Path, resume: bool) -> RunResult:
    from upspiral.loop.run import run_training
    from upspiral.monitor.metrics import read_metrics
    from upspiral.monitor.progress import LiveProgress

    history = read_metrics(folder) if resume else ()
    progress = LiveProgress(config.name, config.steps, budget_minutes=config.budget_minutes, history=history)
    return run_training(config, folder, resume=resume, progress=progress)
