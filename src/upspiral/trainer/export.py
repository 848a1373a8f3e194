"""A checkpoint of any backend becomes a Hugging Face folder, which every other backend starts from."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from upspiral.trainer.base import TrainerBackend, TrainerSetup
from upspiral.trainer.checkpoint import check_checkpoint, step_of
from upspiral.weights.export import export_hf
from upspiral.weights.load import load_model
from upspiral.weights.publication import PublisherSettings


def export_checkpoint(trainer: TrainerBackend, setup: TrainerSetup, checkpoint: Path, target: Path) -> Path:
    """Returns `target`, with the trained weights in the model's precision and the tokenizer; see `export_hf`.

    `trainer`: of the kind that wrote the checkpoint, made by `setup`; it has the checkpoint's weights afterwards.
    """
    check_checkpoint(checkpoint)
    trainer.load(checkpoint)
    with TemporaryDirectory(prefix="upspiral-export-") as work:
        published = trainer.publish(PublisherSettings(Path(work)), step_of(checkpoint))
        module = load_model(published.folder, dtype=setup.dtype, device="cpu").module
        return export_hf(module, setup.model_folder, target)
