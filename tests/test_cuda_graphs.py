"""What is recorded of a decoder's blocks and what is not, with a stand-in for the card."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from pointalign import cuda_graphs
from pointalign.cuda_graphs import BlockRecorder, graphed_blocks, why_not_graphed
from pointalign.decoder_blocks import compiled_blocks
from pointalign.errors import PointAlignError
from recording import Recorded

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
        more = 0 if bias is None else bias
        return hidden_states + scale * self.linear(hidden_states) + more


class Decoder(nn.Module):
    """Three blocks, called as a test wants it."""

    def __init__(self, call: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"num_hidden_layers": 3})()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.call = call or (lambda number, block, hidden: block(hidden, scale=0.5))

    def forward(self, hidden: Tensor) -> Tensor:
        for number, block in enumerate(self.layers):
            hidden = self.call(number, block, hidden)
        return hidden


def steps(model: nn.Module, recorded: Recorded | None, lengths: tuple[int, ...] = (6, 6, 6)) -> list[Tensor]:
    """The gradients of every step, those of the weights in order."""
    found = []
    with graphed_blocks(model, recorded is not None, recorded):
        for number, length in enumerate(lengths):
            inputs = torch.randn(1, length, 4, generator=torch.Generator().manual_seed(number))
            model.zero_grad(set_to_none=True)
            model(inputs).square().sum().backward()
            found += [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    return found


def test_a_shape_is_recorded_when_it_comes_for_the_second_time() -> None:
    recorded = Recorded()
    got = steps(Decoder(), recorded, (6, 6, 8, 6, 9))
    assert recorded.lengths == [6]
    assert recorded.replays == 2
    for one, two in zip(got, steps(Decoder(), None, (6, 6, 8, 6, 9)), strict=True):
        assert torch.allclose(one, two)


def test_nothing_of_an_earlier_step_lives_while_a_shape_is_recorded() -> None:
    """Its graph ends at the weights, on the stream of that step, which a card does not let a recording wait for."""
    outputs: list[weakref.ref[Tensor]] = []

    def watched(number: int, block: nn.Module, hidden: Tensor) -> Tensor:
        output = block(hidden)
        outputs.append(weakref.ref(output))
        return output

    alive = []

    class Watching(Recorded):
        def __call__(self, *given: Any, **named: Any) -> Any:
            alive.append([output() for output in outputs if output() is not None])
            return super().__call__(*given, **named)

    steps(Decoder(watched), Watching())
    assert alive == [[]]


CALLS = {
    "work between blocks": lambda number, block, hidden: block(hidden) + 1,
    "other arguments for one block": lambda number, block, hidden: block(hidden, scale=float(number)),
    "arguments by position": lambda number, block, hidden: block(hidden, None, 0.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_blocks_that_do_not_simply_follow_each_other_run_as_ever(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Recorded()
    got = steps(Decoder(CALLS[name]), recorded)
    assert not recorded.lengths
    assert capsys.readouterr().err.count("cuda_graphs: nothing is recorded") == 1
    assert all(torch.equal(one, two) for one, two in zip(got, steps(Decoder(CALLS[name]), None), strict=True))


def test_an_argument_keeps_its_gradient() -> None:
    def gradient(recorded: Recorded | None) -> Tensor:
        model = Decoder(lambda number, block, hidden: block(hidden, bias=model.bias))
        model.bias = nn.Parameter(torch.ones(4))
        return steps(model, recorded)[0]

    recorded = Recorded()
    assert torch.equal(gradient(recorded), gradient(None))
    assert not recorded.lengths


def test_one_off_shapes_take_no_room_and_full_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_SHAPES", 1)
    recorded = Recorded()
    steps(Decoder(), recorded, (3, 4, 5, 6, 6, 7, 7))
    assert recorded.lengths == [6]
    assert "1 shapes are recorded, others are not any more" in capsys.readouterr().err


def test_a_recording_that_fails_ends_in_one_line() -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    model = Decoder()
    with pytest.raises(
        PointAlignError, match=r"cannot be recorded \(CUDA out of memory.\); go on without: .* --resume"
    ):
        steps(model, full)  # pyright: ignore[reportArgumentType]
    assert "forward" not in model.layers[0].__dict__


def test_answering_is_not_recorded() -> None:
    model, recorded = Decoder().eval(), Recorded()
    steps(model, recorded)
    assert not recorded.lengths


def test_a_forward_of_a_blocks_own_comes_back() -> None:
    model = Decoder()
    own = model.layers[1].forward
    model.layers[1].forward = own
    with graphed_blocks(model, True, Recorded()), compiled_blocks(model, True, CPU):
        assert model.layers[1].forward is not own
    assert model.layers[1].__dict__["forward"] == own
    assert "forward" not in model.layers[0].__dict__


def test_a_model_that_calls_its_blocks_by_position_trains_compiled_or_to_be_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=11)
    model = GPT2LMHeadModel(config).train()
    ids = torch.arange(6).unsqueeze(0)
    with compiled_blocks(model, True, CPU), graphed_blocks(model, True, Recorded()):
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()


def test_why_nothing_is_recorded() -> None:
    fine = {"packed": True, "checkpointing": False, "trains": True}
    assert why_not_graphed("cuda", 1, 1, **fine) is None
    assert why_not_graphed("cpu", 1, 1, **fine) == "there is no CUDA GPU"
    assert why_not_graphed("cuda", 2, 1, **fine) == "several processes train"
    assert why_not_graphed("cuda", 1, 4, **fine) == "gradients are summed over several batches"
    assert why_not_graphed("cuda", 1, 1, **{**fine, "trains": False}) == "the language model is frozen"


def test_full_fine_tuning_records_fewer_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks of 20 weights; a card whose share for gradients holds those of four shapes."""
    monkeypatch.setattr(
        "torch.cuda.get_device_properties",
        lambda device: type("Card", (), {"total_memory": 4 * 3 * 20 * 4 / cuda_graphs.GRADIENTS_SHARE})(),
    )
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    assert BlockRecorder(Decoder().layers, Recorded(), None).most == 4
