"""Frozen matrices in 8-bit floats: hand-computed products, the way back, what is replaced and what is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pointalign.float8 import Float8Linear, float8_products, frozen_linears, to_float8, why_not_float8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Blocks(nn.Module):
    """Two blocks of a frozen linear and a small one that trains."""

    class Config:
        num_hidden_layers = 2

    def __init__(self, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config = self.Config()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"frozen": nn.Linear(width, width, dtype=dtype), "small": nn.Linear(width, 8, bias=False)})
            for _ in range(2)
        )
        self.to(DEVICE)
        for layer in self.layers:
            layer["frozen"].requires_grad_(False)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["frozen"](x)  # pyright: ignore
        return x


@pytest.fixture
def multiplies() -> None:
    reason = why_not_float8(Blocks(), split=False)
    if reason:
        pytest.skip(reason)


def linear(weight: Tensor, bias: Tensor | None = None) -> Float8Linear:
    """A frozen one of these numbers; the bias is in float32, as a frozen model keeps it."""
    made = Float8Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.bfloat16)
    made.weight.data = weight.bfloat16()
    if bias is not None:
        made.bias.data = bias
    made.to(DEVICE).requires_grad_(False).round_weight()
    return made


def whole(rows: int, width: int, seed: int) -> Tensor:
    """Numbers that e4m3 holds exactly, whatever the way they are read: 0 to 7 with signs, and 448 once a row and column."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-7, 8, (rows, width), generator=generator).float()
    for start in range(0, rows, width):
        size = min(width, rows - start)
        numbers[start : start + size, :size][torch.arange(size), torch.arange(size)] = 448
    return numbers


def test_a_row_is_scaled_by_its_own_largest_number() -> None:
    rounded, scale = to_float8(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [0.0, 448.0, 17.0]]))
    assert scale.flatten()[::2].tolist() == pytest.approx([2 / 448, 1.0], rel=1e-6)
    assert rounded.float().tolist() == [[224.0, -448.0, 112.0], [0.0, 0.0, 0.0], [0.0, 448.0, 16.0]], (
        "17 is no e4m3 number"
    )


def test_what_is_no_number_stays_none() -> None:
    rounded, scale = to_float8(torch.tensor([[1.0, float("nan")], [1.0, float("inf")]]))
    assert (rounded.float() * scale).isnan().any(dim=1).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's sums of 8-bit products keep fewer bits")
@pytest.mark.usefixtures("multiplies")
def test_products_of_numbers_that_e4m3_holds_are_exact_forward_and_back() -> None:
    weight, x, gradient = whole(32, 32, 0), whole(16, 32, 1), whole(16, 32, 2)
    bias = torch.arange(32).float()
    given = x.clone().requires_grad_()
    output = linear(weight, bias)(given)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, (x @ weight.t() + bias).bfloat16())
    output.backward(gradient.bfloat16().t().contiguous().t())  # as what follows may hand it over
    assert given.grad is not None
    assert torch.equal(given.grad, (gradient @ weight).bfloat16().float())


def test_a_bias_is_handed_over_as_cuda_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU takes biases of any precision; CUDA those of the output's alone."""
    given = []

    def product(left: Tensor, right: Tensor, *scales: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        given.append(bias)
        return torch.zeros(len(left), right.shape[1], dtype=torch.bfloat16, device=left.device)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    rows = torch.ones(2, 32, device=DEVICE, requires_grad=True)
    linear(whole(32, 32, 0), torch.full((32,), 1 / 3))(rows).sum().backward()
    forward, back = given
    assert forward is not None
    assert (forward.dtype, back) == (torch.bfloat16, None)


@pytest.mark.usefixtures("multiplies")
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e6])
def test_of_other_numbers_they_are_as_near_as_three_bits_are(spread: float) -> None:
    """A number in e4m3 is at most 1/16 off, 1/28 in the mean square; two of them in a product by the root of two more."""
    torch.manual_seed(0)
    weight = torch.randn(256, 384) * torch.logspace(-2, 2, 256)[:, None]
    x, gradient = torch.randn(2, 7, 384) * spread, torch.randn(2, 7, 256) * spread
    given = x.clone().requires_grad_()
    output = linear(weight)(given.to(DEVICE))
    output.backward(gradient.bfloat16().to(DEVICE))
    assert given.grad is not None
    for found, exact in ((output.float(), x @ weight.t()), (given.grad, gradient @ weight)):
        assert found.shape == exact.shape
        assert 0.01 < ((found.cpu() - exact).norm() / exact.norm()).item() < 0.05


def test_only_wide_frozen_matrices_in_bfloat16_are_taken() -> None:
    model = Blocks()
    assert frozen_linears(model) == [layer["frozen"] for layer in model.layers]  # pyright: ignore
    model.layers[0]["frozen"].bias.requires_grad_(True)  # pyright: ignore
    assert frozen_linears(model) == [model.layers[1]["frozen"]]  # pyright: ignore
    for other in (Blocks(width=64), Blocks(width=136), Blocks(dtype=torch.float32)):
        assert frozen_linears(other) == []


@pytest.mark.usefixtures("multiplies")
def test_afterwards_a_model_is_as_it_was() -> None:
    model, x = Blocks(), torch.randn(3, 128).bfloat16().to(DEVICE)
    before, names, state = model(x), [name for name, _ in model.named_modules()], model.state_dict()

    def interrupted() -> None:
        with float8_products(model, True):
            assert not torch.equal(model(x), before)
            assert model.state_dict().keys() == state.keys(), "what is saved is what was there"
            assert [name for name, _ in model.named_modules()] == names
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(model(x), before)
    assert {type(layer["frozen"]) for layer in model.layers} == {nn.Linear}  # pyright: ignore
    with float8_products(model, False):
        assert torch.equal(model(x), before)


def break_it(*args: object, **kwargs: object) -> Tensor:
    raise RuntimeError("please report a bug to PyTorch")


def test_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    told: Callable[..., str | None] = why_not_float8
    assert told(Blocks(), split=True) == "weights are split over the processes"
    assert told(Blocks(dtype=torch.float32), split=False) == "the language model has no frozen matrices in bfloat16"
    monkeypatch.setattr(torch, "_scaled_mm", break_it)
    reason = f"PyTorch {torch.__version__} does not multiply them here, but on GPUs from compute capability 8.9 on"
    model = Blocks()
    assert told(model, split=False) == f"{reason} (please report a bug to PyTorch)"
    assert {type(layer["frozen"]) for layer in model.layers} == {nn.Linear}  # pyright: ignore


@pytest.mark.usefixtures("multiplies")
def test_compiled_they_give_the_same() -> None:
    model, x = Blocks(), torch.randn(48, 128).bfloat16().to(DEVICE)

    def run(function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        output = function(given)
        output.sum().backward()
        assert given.grad is not None
        return output, given.grad

    with float8_products(model, True):
        plain = run(model)
        compiled = run(torch.compile(model, dynamic=True, fullgraph=True))
    for one, other in zip(plain, compiled, strict=True):
        # Compiled, sums are rounded later, so some numbers go to the next of e4m3; the products are 0.035 from the exact ones.
        assert ((one - other).float().norm() / one.float().norm()).item() < 0.01
