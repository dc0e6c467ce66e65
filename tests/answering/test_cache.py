"""The cache with room: what it holds is what transformers' own holds, and nothing is copied that need not be."""

from __future__ import annotations

import torch
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache

from pointalign.answering.cache import LEAST_ROOM, RoomyLayer, roomy_cache

CONFIG = LlamaConfig(num_hidden_layers=2)


def columns(count: int, rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2, count, 4, generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_transformers_cache_holds() -> None:
    roomy, plain = roomy_cache(CONFIG), DynamicCache(config=CONFIG)
    assert roomy.get_seq_length() == 0
    for step, count in enumerate((5, 1, 1, 70, *[1] * 50)):
        for layer in (0, 1):
            keys, values = columns(count, seed=step), columns(count, seed=100 + step)
            got, wanted = (cache.update(keys, values, layer) for cache in (roomy, plain))
            assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))
    assert roomy.get_seq_length() == plain.get_seq_length() == 127


def test_a_token_is_written_into_the_room_that_is_there() -> None:
    layer = RoomyLayer()
    first, _ = layer.update(columns(4), columns(4))
    for step in range(LEAST_ROOM):
        keys, _ = layer.update(columns(1, seed=step), columns(1, seed=step))
        assert keys.data_ptr() == first.data_ptr()
    assert torch.equal(keys[:, :, :4], columns(4))
    grown, _ = layer.update(columns(1), columns(1))
    assert grown.data_ptr() != first.data_ptr()
    assert torch.equal(grown[:, :, :-1], keys)


def test_rows_that_were_dropped_or_joined_do_not_come_back() -> None:
    layer = RoomyLayer()
    layer.update(columns(6), columns(6, seed=1))
    layer.replace(layer.keys[[2, 0], :, 2:], layer.values[[2, 0], :, 2:])
    assert layer._room is None, "or the old room would be held beside the new one"
    keys, values = layer.update(columns(1, rows=2, seed=2), columns(1, rows=2, seed=3))
    assert torch.equal(keys, torch.cat([columns(6)[[2, 0], :, 2:], columns(1, rows=2, seed=2)], dim=2))
    assert torch.equal(values, torch.cat([columns(6, seed=1)[[2, 0], :, 2:], columns(1, rows=2, seed=3)], dim=2))


def test_fewer_rows_at_the_same_place_are_not_taken_for_all() -> None:
    layer = RoomyLayer()
    layer.update(columns(6), columns(6))
    layer.keys, layer.values = layer.keys[:2], layer.values[:2]
    keys, _ = layer.update(columns(1, rows=2), columns(1, rows=2))
    assert keys.shape == (2, 2, 7, 4)
