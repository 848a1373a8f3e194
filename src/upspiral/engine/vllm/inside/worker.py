"""Adopts published weights inside vLLM's worker: its `--worker-extension-cls`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from receiver import Damaged, Receiver, StaleBase  # pyright: ignore[reportMissingImports]  # copied beside this file


class Worker:
    """Mixed into vLLM's own worker class, whose `model_runner` it uses."""

    model_runner: Any

    def upspiral_adopt(self, folder: str) -> dict[str, str]:
        """Loads a publication. The answer has one key: "adopted", "stale" (another base is needed) or "damaged".

        Names that vLLM cuts otherwise, such as experts, are Hugging Face's in a publication, which is what its loaders
        take. The output layer is named also where it is tied: the CPU worker keeps a packed copy of it, which is left
        as it was when only the embedding is loaded.
        """
        if not hasattr(self, "_upspiral_receiver"):
            self._upspiral_receiver = Receiver()
        try:
            with self._upspiral_receiver.reading(Path(folder)) as tensors:
                self.model_runner.reload_weights(weights_iterator=tensors)
        except StaleBase as error:
            return {"stale": str(error)}
        except Damaged as error:
            return {"damaged": str(error)}
        return {"adopted": folder}
