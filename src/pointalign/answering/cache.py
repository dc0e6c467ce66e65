"""The language model's keys and values, with room for the tokens to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Columns that are kept free at least, and as a share of those in use.
LEAST_ROOM, ROOM_SHARE = 32, 0.25


class RoomyLayer(DynamicLayer):
    """One block's keys and values: a new token is written beside the others, where transformers copies all of them.

    At 512 rows of a model of 2.8 billion weights that copy is 20 GB a token, and asks the device for larger pieces of memory
    each time.
    """

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new columns.

        Args:
            key_states: (B, H, L, D).
            value_states: as key_states.
            args: not used.
            kwargs: not used.

        Returns:
            Keys and values of all columns, views that lie apart by the room.
        """
        held = (self.keys, self.values) if self.get_seq_length() else (None, None)
        rooms = self._room or (None, None)
        (keys, room), (values, other) = (
            _appended(room, old, new) for room, old, new in zip(rooms, held, (key_states, value_states), strict=True)
        )
        self.keys, self.values, self._room = keys, values, (room, other)
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        return keys, values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold other keys and values, (B, H, L, D), from now on, and give the room back."""
        self.keys, self.values, self._room = keys, values, None


def _appended(room: Tensor | None, held: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """What is held with new columns behind it, and the room in which it lies: the same one while it suffices."""
    known = 0 if held is None else held.shape[-2]
    total = known + new.shape[-2]
    ours = room is not None and held is not None and held.data_ptr() == room.data_ptr() and len(held) == len(room)
    if room is None or not ours or total > room.shape[-2]:
        room = new.new_empty(*new.shape[:2], total + max(LEAST_ROOM, int(ROOM_SHARE * total)), new.shape[-1])
        if held is not None:
            room[:, :, :known] = held
    room[:, :, known:total] = new
    return room[:, :, :total], room


def roomy_cache(text_config: Any) -> DynamicCache:
    """A cache for a model of plain attention, see `refill.can_refill`."""
    cache = DynamicCache(config=text_config)
    cache.layers[:] = [RoomyLayer() for _ in cache.layers]
    return cache
