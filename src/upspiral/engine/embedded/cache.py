"""Keys and values of sequences, one slot each; finished sequences stay for others to continue until room is needed.

Invariants: `ids[slot, :lengths[slot]]` are exactly the tokens whose keys and values the slot holds; of a slot in use
`ids[slot, :planned[slot]]` is what it will hold. A slot without an owner may be overwritten at any time. The books of
tokens close: held = computed + copied - evicted - outdated - lost (`counts`).
"""

from __future__ import annotations

import mmap
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from upspiral.engine.embedded.sequence import Sequence
from upspiral.errors import ConfigError
from upspiral.weights.load import LoadedModel

NO_VERSION = -1


class SlotCache:
    """`keys_values` is [layer, slot, 2 * key-value heads, position, head size]; the first half of the heads is keys."""

    def __init__(self, model: LoadedModel, slots: int, context_length: int):
        config = model.config
        heads = config.num_key_value_heads
        assert heads is not None
        shape = (config.num_hidden_layers, slots, 2 * heads, context_length, model.head_size)
        self._make = partial(_zeros, shape, model.dtype, model.device)
        self.keys_values = self._make()
        self.routes: NDArray[np.int16] | None = None
        """[slot, position, layers with experts, experts of a token] of the tokens that are held; None: not kept."""
        self.ids = np.zeros((slots, context_length), np.int32)
        self.lengths = np.zeros(slots, np.int64)
        self.planned = np.zeros(slots, np.int64)
        self.owners: list[Sequence | None] = [None] * slots
        self.version = 0
        self._computed = self._copied = self._evicted = self._outdated = self._lost = 0
        self._versions = np.full(slots, NO_VERSION, np.int64)
        self._touched = np.zeros(slots, np.int64)
        self._last_used = np.zeros(slots, np.int64)
        self._clock = 0

    def keep_routes(self, layers: int, experts_of_token: int) -> None:
        """From now on."""
        self.routes = np.zeros((*self.ids.shape, layers, experts_of_token), np.int16)

    def match(self, prompt_ids: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[slot] how many leading tokens of the prompt each slot holds, and how many it will hold when its own prompt
        is computed. The last token of a prompt never counts: its logits are wanted. Keys and values of an older policy
        version never match."""
        count = len(prompt_ids) - 1
        differs = self.ids[:, :count] != prompt_ids[:count]
        common = np.where(differs.any(axis=1), differs.argmax(axis=1), count) if count else np.zeros(len(self.ids), int)
        common = np.where(self._versions == self.version, common, 0)
        return np.minimum(common, self.lengths), np.minimum(common, self.planned)

    def counts(self) -> dict[str, float]:
        """Tokens whose keys and values are held now and, of these, by running sequences (`referenced_tokens`); and how
        many were ever computed, copied to another slot, evicted for room, outdated by publication, lost in failure."""
        referenced = [slot for slot, owner in enumerate(self.owners) if owner is not None]
        return {
            "held_tokens": int(self.lengths.sum()),
            "referenced_tokens": int(self.lengths[referenced].sum()),
            "computed_tokens": self._computed,
            "copied_tokens": self._copied,
            "evicted_tokens": self._evicted,
            "outdated_tokens": self._outdated,
            "lost_tokens": self._lost,
        }

    def has_room(self) -> bool:
        return None in self.owners

    def claim(self, sequence: Sequence, source: int, prefix: int) -> None:
        """Gives the sequence a slot that holds the first `prefix` tokens of its prompt, which slot `source` has.

        It continues in place when the slot is free and all of it is wanted; else the prefix is copied, so that whoever
        comes back to the rest of `source` still finds it.
        """
        in_place = self.owners[source] is None and prefix > 0 and prefix == self.lengths[source]
        slot = source if in_place else self._victim(keep=source if prefix else None)
        kept = prefix if slot == source else 0
        self._evicted += int(self.lengths[slot]) - kept
        self._copied += prefix - kept
        if slot != source and prefix:
            self.keys_values[:, slot, :, :prefix] = self.keys_values[:, source, :, :prefix]
            if self.routes is not None:
                self.routes[slot, :prefix] = self.routes[source, :prefix]
        count = len(sequence.prompt_ids)
        self.ids[slot, :count] = sequence.prompt_ids
        self.lengths[slot], self.planned[slot] = prefix, count
        self._touched[slot] = max(self._touched[slot], count)
        self._versions[slot] = self.version
        self.owners[slot], sequence.slot = sequence, slot

    def extend(self, slot: int, count: int) -> None:
        """Keys and values of the slot's next `count` tokens have been computed."""
        self.lengths[slot] += count
        self._computed += count

    def append(self, slot: int, token_id: int) -> None:
        """Adds a sampled token, whose keys and values the next step computes. The last of a full slot has no next."""
        position = int(self.lengths[slot])
        if position < self.ids.shape[1]:
            self.ids[slot, position] = token_id
            self.planned[slot] = position + 1
            self._touched[slot] = max(self._touched[slot], position + 1)

    def release(self, sequence: Sequence) -> None:
        """The sequence is over; what was computed stays for others."""
        slot, self._clock = sequence.slot, self._clock + 1
        self.owners[slot], self.planned[slot], self._last_used[slot] = None, self.lengths[slot], self._clock
        if self._versions[slot] != self.version:
            self._outdate(slot)

    def forget(self, version: int) -> None:
        """New weights: nothing computed so far may be continued. Sequences under way keep what they have."""
        self.version = version
        for slot, owner in enumerate(self.owners):
            self._versions[slot] = NO_VERSION
            if owner is None:
                self._outdate(slot)

    def _outdate(self, slot: int) -> None:
        self._outdated += int(self.lengths[slot])
        self.lengths[slot] = self.planned[slot] = 0

    def clear(self) -> None:
        """Empties every slot, and zeroes what was written: a NaN left behind would leak through masked attention."""
        self._lost += int(self.lengths.sum())
        for slot, touched in enumerate(self._touched.tolist()):
            self.keys_values[:, slot, :, :touched] = 0
        for column in (self.lengths, self.planned, self._touched, self._last_used):
            column[:] = 0
        self._versions[:] = NO_VERSION
        self.owners = [None] * len(self.owners)

    def give_up(self) -> None:
        """Frees keys and values until `take_again`. No slot may be in use."""
        assert not any(self.owners), "what runs has to start over first"
        self.forget(self.version)
        self._touched[:] = 0
        self.keys_values = self.keys_values.new_empty((*self.keys_values.shape[:-1], 0))

    def take_again(self) -> None:
        """Does nothing where nothing was given up. Raises ConfigError when there is no memory for it."""
        if not self.keys_values.nbytes:
            self.keys_values = self._make()

    def _victim(self, keep: int | None) -> int:
        """The lowest empty slot, else the one that was left the longest ago; `keep` only when no other is free."""
        free = [slot for slot, owner in enumerate(self.owners) if owner is None]
        return min(free, key=lambda slot: (slot == keep, self.lengths[slot] > 0, self._last_used[slot], slot))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        # Anonymous memory is zero and takes no room until it is written, so short sequences do not pay for long slots.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
    except (OSError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"the prefix cache of engine.cache_slots = {shape[1]} times engine.context_length = {shape[3]} needs "
            f"{size / 1e9:.1f} GB on {device}, which it does not have; lower one of them"
        ) from error
