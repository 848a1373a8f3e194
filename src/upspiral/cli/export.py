"""`upspiral export`: what a run learned, in other programs' formats."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

from upspiral.cli.packages import need_training_packages
from upspiral.config.loader import load_run_config
from upspiral.config.models import ParallelConfig, RunConfig
from upspiral.errors import ConfigError


def export(run: Path, /, *, hf: Path | None = None, peft: Path | None = None, step: int | None = None) -> None:
    """Write the trained model as a Hugging Face folder that transformers loads, or its adapter alone.

    Parameters
    ----------
    run
        The run folder, such as runs/demo.
    hf
        The folder to write the whole model to; it must not exist yet.
    peft
        The folder to write the adapter of a run with [trainer.lora] to, for PEFT; it must not exist yet.
    step
        The step of the checkpoint; the newest when not given.
    """
    resolved = run / "config.resolved.toml"
    if not resolved.is_file():
        raise ConfigError(f"{run} holds no training run (no {resolved.name}); `upspiral run FILE` makes one")
    config = load_run_config(resolved)
    if hf is None and peft is None:
        raise ConfigError("nothing to write; give --hf FOLDER or --peft FOLDER")
    if peft is not None and config.trainer.lora is None:
        raise ConfigError(f"--peft: {run} trained all weights ([trainer.lora] is not in its config); use --hf")
    need_training_packages("export", *(["peft"] if peft is not None else []))
    from upspiral.trainer.checkpoint import check_checkpoint
    from upspiral.trainer.local import LocalTrainer
    from upspiral.weights.export import export_hf, export_peft
    from upspiral.weights.load import load_model
    from upspiral.weights.models import resolve_model

    if config.trainer.kind != "local":
        _export_of_ranks(config, _checkpoint(run, step), hf)
        return
    checkpoint = _checkpoint(run, step)
    source = resolve_model(config.model.path)
    model = load_model(source, dtype=config.model.dtype, device="cpu")
    # The trainer alone knows what its state means; loading it updates the module in place.
    trainer = LocalTrainer(model.module, config.trainer, config.algorithm, temperature=config.temperature)
    check_checkpoint(checkpoint)
    trainer.load(checkpoint)
    if hf is not None:
        print(export_hf(model.module, source, hf))
    if peft is not None and trainer.adapter is not None:
        print(export_peft(trainer.adapter, source, peft))


def _export_of_ranks(config: RunConfig, checkpoint: Path, hf: Path | None) -> None:
    """As few ranks as can put its checkpoint together, on none of the run's devices where that is possible."""
    from upspiral.loop.placement import trainer_setup
    from upspiral.trainer.checkpoint import check_checkpoint
    from upspiral.trainer.export import export_checkpoint
    from upspiral.trainer.rank_processes import start_ranks
    from upspiral.trainer.ranks import Ranks
    from upspiral.trainer.registry import RESHARDING
    from upspiral.weights.models import resolve_model

    assert hf is not None, "adapters are the local trainer's"
    check_checkpoint(checkpoint)
    # Megatron-core computes on CUDA where there is some.
    model = config.model.model_copy(update={"device": "auto" if config.trainer.kind == "megatron" else "cpu"})
    parallel = config.trainer.parallel or ParallelConfig()
    if config.trainer.kind in RESHARDING:
        parallel = ParallelConfig()
    trainer = config.trainer.model_copy(update={"parallel": parallel})
    setup = trainer_setup(
        config.model_copy(update={"model": model, "trainer": trainer}), resolve_model(config.model.path)
    )
    with (
        TemporaryDirectory(prefix="upspiral-export-") as logs,
        closing(Ranks(start_ranks(parallel.ranks, Path(logs)), config.trainer.kind, setup)) as ranks,
    ):
        print(export_checkpoint(ranks, setup, checkpoint, hf))


def _checkpoint(run: Path, step: int | None) -> Path:
    from upspiral.trainer.checkpoint import latest_checkpoint

    folder = run / "checkpoints"
    newest = latest_checkpoint(folder)
    if newest is None:
        raise ConfigError(f"{run} has no checkpoint yet, so there are no trained weights to export")
    if step is None:
        return newest
    wanted = folder / f"step-{step:06d}"
    if not wanted.is_dir():
        there = ", ".join(str(int(path.name.removeprefix("step-"))) for path in sorted(folder.glob("step-*")))
        raise ConfigError(f"--step {step}: {run} has checkpoints of steps {there}; checkpoint.keep decides how many")
    return wanted
