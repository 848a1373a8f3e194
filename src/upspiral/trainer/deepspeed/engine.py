"""DeepSpeed's engine, as far as forest batches need it to behave otherwise than with rows of text.

docs/design/015-deepspeed.md says which of its habits this works around, and why.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upspiral.errors import StoreError
from upspiral.trainer.attention import End, ForestPass
from upspiral.trainer.base import TrainerSetup
from upspiral.trainer.forest import ForestBatch
from upspiral.trainer.logprob import target_logprobs
from upspiral.trainer.optimizer import adamw

_TAG = "zero"
_BUCKET_ELEMENTS = 50_000_000
"""Gradients that are summed over the ranks at once."""


class ForestModel(nn.Module):
    """A transformers model whose forward is what training asks for. ZeRO-3 gathers weights around calls of modules, so
    everything that touches weights has to happen in one, the product with the output layer included."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Called by `target_logprobs`, which takes the plain modules of whatever is no model of transformers itself.
        self.get_decoder, self.get_output_embeddings = model.get_decoder, model.get_output_embeddings

    def forward(self, *, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        return target_logprobs(self, batch, temperature=temperature, forest=forest)


class ZeroEngine:
    """A model, its gradients and its optimizer, divided among the ranks of the process group."""

    def __init__(self, model: Any, setup: TrainerSetup, stage: int) -> None:
        """`model`: whole, in the precision of training; it is DeepSpeed's from now on."""
        deepspeed = _import_for(setup.device)
        self._stage = stage
        self._ranks = torch.distributed.get_world_size()
        self._layers = list(model.get_decoder().layers)
        wrapped = ForestModel(model.eval())
        if stage == 3:
            # Tied or not: used in the forward of the wrapper, owned by a module that is never called.
            deepspeed.zero.register_external_parameter(wrapped, model.get_output_embeddings().weight)
        optimizer = adamw(model.parameters(), setup.trainer)
        config = _config(setup, stage, self._layers[0])
        self._engine, *_ = deepspeed.initialize(model=wrapped, optimizer=optimizer, config=config)
        self._gathered = deepspeed.zero.GatheredParameters

    def forward(self, batch: ForestBatch, forest: ForestPass, temperature: float) -> tuple[Tensor, Tensor]:
        """See `target_logprobs`."""
        return self._engine(batch=batch, forest=forest, temperature=temperature)

    def backward(self, ends: Sequence[End]) -> None:
        """The backward pass that begins at `ends`, on all ranks at once. One of them leads to what `forward` returned,
        and so through the whole model: all ranks must gather the same weights and sum the same gradients."""
        for layer in self._layers:
            # DeepSpeed counts the inputs whose gradients are to come, to drop the weights after the last, and loses
            # count where another forward pass came between.
            layer.ds_grads_remaining = 1
        # It divides sums by the number of ranks, but token weights have their denominators already. Gradients that a
        # pass before this one has left are as they should be.
        gradients = [torch.full_like(end, self._ranks) if gradient is None else gradient for end, gradient in ends]
        self._engine.backward(_Total.apply(gradients, *(end for end, _ in ends)))
        # Else the next backward pass would overwrite the sums of stage 3 where no forward pass comes before it.
        self._engine.optimizer.clear_backward_seen_flag()

    def step(self, lr: float) -> float:
        """One update of the weights, unless a gradient is not finite. Returns the gradient's norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def forget_moments(self) -> None:
        """AdamW begins anew on the weights as they are."""
        for state in self._engine.basic_optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by its own names, whole, on every rank; each until the next one is asked for."""
        for name, parameter in self._engine.module.model.named_parameters():
            with self._gathered([parameter], enabled=self._stage == 3):
                yield name, parameter.detach()

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(str(folder), tag=_TAG)

    def load(self, folder: Path) -> None:
        """What an engine divided in the same way has written. StoreError when it is not there."""
        found, _ = self._engine.load_checkpoint(str(folder), tag=_TAG)
        if found is None:
            raise StoreError(f"{folder} lacks the files that DeepSpeed wrote; resume from an earlier checkpoint")

    def close(self) -> None:
        self._engine.destroy()


class _Total(torch.autograd.Function):
    """apply(gradients, *tensors) -> a scalar that has these gradients."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.gradients, *tensors = inputs
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.gradients


def _import_for(device: str) -> Any:
    """deepspeed, told what it computes on before it looks for itself."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    import deepspeed

    # It would be compiled where it is first used, for an operation of inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _config(setup: TrainerSetup, stage: int, layer: nn.Module) -> dict[str, Any]:
    own = type(layer)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # how many batches a step has differs, and between ranks
        "gradient_clipping": setup.trainer.max_grad_norm,
        "bf16": {"enabled": setup.dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": 0,
            # A layer's weights are gathered together, so a rank that computes it again gathers no more than others.
            "leaf_module": {"classes": [f"{own.__module__}.{own.__qualname__}"]},
        },
    }
