"""A training step asks the device for no value: what a GPU would have to be waited for is looked up on the host before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pointalign.alignment import AlignmentRegularizer
from pointalign.config import Recipe, from_dict
from pointalign.errors import DataError
from pointalign.runs import train
from pointalign.training import AlignmentTrainer

aten: Any = torch.ops.aten
# What hands a value, or a shape that depends on values, from the device to Python.
WAITING = {
    aten._local_scalar_dense,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.unique_dim,
    aten._unique2,
}


class Waits(TorchDispatchMode):
    """Counts the operations that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        packet = func.overloadpacket
        by_mask = packet in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None
        if packet in WAITING or by_mask or unsized:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_what_waits() -> None:
    values = torch.arange(4)
    with Waits() as waits:
        _ = values[values > 1], int(values.sum()), values.nonzero(), bool((values == 0).any()), values + 1
        values.repeat_interleave(torch.tensor([1, 0, 2, 1]))
        values.repeat_interleave(torch.tensor([1, 0, 2, 1]), output_size=4)
    names = [name.split(".")[1] for name in waits.found]
    assert [names.count(name) for name in ("index", "_local_scalar_dense", "nonzero")] == [1, 2, 1]
    assert names.count("repeat_interleave") == 1


def test_a_packed_step_waits_for_nothing(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A padded one waits twice: transformers looks whether its mask can be left out."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    waits, step, prepare = Waits(), AlignmentTrainer.training_step, AlignmentTrainer._prepare_inputs
    embeds: list[torch.Tensor] = []

    def watched(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        decoder = trainer.accelerator.unwrap_model(trainer.model).get_decoder()
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        with waits:
            loss = step(trainer, *args, **kwargs)
        hook.remove()
        return loss

    def on_the_host(trainer: Any, inputs: Any) -> Any:
        with _disable_current_modes():
            return prepare(trainer, inputs)

    monkeypatch.setattr(AlignmentTrainer, "training_step", watched)
    monkeypatch.setattr(AlignmentTrainer, "_prepare_inputs", on_the_host)
    values = {
        "model": {"start_from": str(tiny_model)},
        "lora": {"rank": 2},
        "data": {"fraction": 0.02, "max_length": 1500, "sets": [{"types": ["single_round"], "batch_size": 2}]},
        "alignment": {"weight": 0.5, "layers": [2]},
        "optimizer": {"max_steps": 2, "warmup_steps": 0},
        "precision": "bf16",
        "report_to": [],
    }
    train(from_dict(Recipe, values, "test"), tmp_path / "run")
    assert waits.seen > 1000
    assert waits.found == []
    assert len(embeds) == 2
    assert not any(tensor.requires_grad for tensor in embeds), "nothing before the first block trains"


@torch.no_grad()
def test_positions_mean_what_a_mask_means(model: Any, clouds: torch.Tensor) -> None:
    ids = torch.tensor([[10, *[259] * 5, 11, 12], [10, 11, 12, *[259] * 5]])
    mask = ids == 259
    positions = mask.flatten().nonzero().flatten()
    points = model.encode_points(clouds[:2])
    regularizer = AlignmentRegularizer(32, 24, layers=[2]).attach(model)
    inputs = {"input_ids": ids, "point_tokens": points.point_tokens, "alignment_target": points.qformer_output}
    looked_up = model(**inputs, alignment_mask=mask).logits, regularizer.take()
    given = model(**inputs, alignment_mask=positions, point_positions=positions).logits, regularizer.take()
    assert torch.equal(given[0], looked_up[0])
    assert torch.equal(given[1].total, looked_up[1].total)
    assert given[1].count == 10
    with pytest.raises(DataError, match="10 alignment targets for 9 point tokens"):
        model(**inputs, alignment_mask=positions[:9])
    with pytest.raises(DataError, match="the prompts hold 9 point placeholders but the clouds give 10"):
        model(input_ids=ids, point_tokens=points.point_tokens, point_positions=positions[:9])
    regularizer.detach()
