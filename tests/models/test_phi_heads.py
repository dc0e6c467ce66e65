"""Norms, rotary and layout of the Phi variant's heads in one pass: what the modules give, forward and back, on every way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from pointalign.decoder_blocks import compiled_blocks
from pointalign.models.phi import PhiVariantAttention, PhiVariantConfig
from pointalign.models.phi_heads import join_heads, one_pass, split_heads
from randomness import randomize
from test_kernels import needs_triton, run

HEADS, WIDTH = 4, 20


class Given:
    """An attention layer with random norms, and what its heads are split from."""

    def __init__(self, batch: int, length: int, same_places: bool) -> None:
        config = PhiVariantConfig(
            vocab_size=50,
            hidden_size=HEADS * WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=1,
            intermediate_size=64,
        )
        self.attention = PhiVariantAttention(config, 0)
        randomize(self.attention, 5)
        places = torch.arange(length) if same_places else torch.arange(batch * length).view(batch, length)
        places = places.view(-1, length)
        self.tables = PhiRotaryEmbedding(config)(torch.zeros(1), places)
        draw = torch.Generator().manual_seed(batch)
        self.fused = torch.randn(batch, length, HEADS, 3, WIDTH, generator=draw).requires_grad_()
        self.gradients = [torch.randn(batch, length, HEADS, WIDTH, generator=draw) for _ in range(3)]

    @property
    def norms(self) -> tuple[Tensor, ...]:
        query, key = self.attention.q_layernorm, self.attention.k_layernorm
        return query.weight, query.bias, key.weight, key.bias

    def by_modules(self) -> list[Tensor]:
        """Queries, keys and values (B, L, H, D) as the layer's modules give them."""
        query, key, value = self.fused.transpose(1, 2).unbind(dim=3)
        norms = self.attention.q_layernorm(query), self.attention.k_layernorm(key)
        return [tensor.transpose(1, 2) for tensor in (*self.attention._rotate(*norms, self.tables), value)]

    def in_one_pass(self) -> tuple[Tensor, ...]:
        """The same by `split_heads`."""
        return split_heads(self.fused, *self.norms, *self.tables, self.attention.q_layernorm.eps)

    def back(self, outputs: Any) -> tuple[Tensor, ...]:
        """Gradients of the input and the four vectors of the norms."""
        return torch.autograd.grad(outputs, (self.fused, *self.norms), self.gradients)


@pytest.mark.parametrize(("batch", "length", "same_places"), [(1, 7, True), (2, 5, False), (2, 5, True), (1, 1, True)])
def test_one_pass_gives_what_the_modules_give(batch: int, length: int, same_places: bool) -> None:
    given = Given(batch, length, same_places)
    wanted, got = given.by_modules(), given.in_one_pass()
    for one, other in zip((*wanted, *given.back(wanted)), (*got, *given.back(got)), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_norms_that_lie_elsewhere_are_called_as_modules() -> None:
    """accelerate leaves nothing of an offloaded norm but its shape until the module is called."""
    with FakeTensorMode():
        fused = torch.empty(1, 2, HEADS, 3, WIDTH, device="cuda")
        there = [torch.empty(WIDTH, device="cuda") for _ in range(4)]
        assert one_pass(fused, there)
        for device in ("cpu", "meta"):
            assert not one_pass(fused, [*there[:3], torch.empty(WIDTH, device=device)])
        assert not one_pass(torch.empty(1, 2, HEADS, 3, WIDTH), [torch.empty(WIDTH)] * 4)


def test_the_operators_keep_pytorchs_rules() -> None:
    """Shapes without values, gradients, and dynamic shapes, as its compiler needs them."""
    given = Given(2, 5, False)
    eps = given.attention.q_layernorm.eps
    torch.library.opcheck(split_heads, (given.fused, *given.norms, *given.tables, eps))
    weights = [norm.detach() for norm in given.norms[::2]]
    torch.library.opcheck(join_heads, (*given.gradients, given.fused.detach(), *weights, *given.tables, eps))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_whose_norms_train_is_the_same_in_one_pass(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PhiVariantConfig(
        vocab_size=60, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=3
    )
    trained = ["q_layernorm", "k_layernorm", "input_layernorm", "post_layernorm"]
    lora = LoraConfig(r=2, target_modules=["query_key_value", "dense"], modules_to_save=trained)
    model: nn.Module = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    randomize(model, 3)
    ids = torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))

    def results() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, gradients = results()
    monkeypatch.setattr("pointalign.models.phi.one_pass", lambda fused, norms: True)
    with compiled_blocks(model, compiled, torch.device("cpu")):
        got, others = results()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


INTERPRETED = """
import torch
from pointalign import kernels
from pointalign.models.phi_heads import join_heads, split_heads
draw = torch.Generator().manual_seed(0)
def random(*sizes): return torch.randn(*sizes, generator=draw)
for batch, length, places, heads, width, rotary, kind, programs in (
    (1, 7, 1, 3, 20, 10, torch.float32, 512), (2, 5, 2, 4, 16, 16, torch.float32, 2), (2, 5, 1, 1, 80, 32, torch.bfloat16, 1)
):
    kernels.MOST_PROGRAMS = programs
    fused, norms = random(batch, length, heads, 3, width).to(kind), [random(width) for _ in range(4)]
    angles = random(places, length, rotary)
    tables = angles.cos().to(kind), angles.sin().to(kind)
    gradients = [random(batch, heads, length, width).to(kind).transpose(1, 2) for _ in range(3)]
    close = dict(rtol=1e-5, atol=2e-5) if kind == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    for one, other in (
        (split_heads(fused, *norms, *tables, 1e-5), kernels.launch_split_heads(fused, norms, *tables, 1e-5)),
        (join_heads(*gradients, fused, *norms[::2], *tables, 1e-5),
         kernels.launch_join_heads(gradients, fused, norms[::2], *tables, 1e-5)),
    ):
        for wanted, got in zip(one, other, strict=True):
            torch.testing.assert_close(got, wanted, **close)
            print(tuple(got.shape))
"""


@needs_triton
def test_the_interpreted_kernels_give_what_torch_gives(tmp_path) -> None:
    assert len(run(INTERPRETED, tmp_path, TRITON_INTERPRET="1").splitlines()) == 15


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pointalign import kernels
given = "fused query key value cos sin gradient"
types = {**dict.fromkeys(given.split(), "*bf16"), "rows": "i32", "heads": "i32", "places": "i32", "eps": "fp32"}
sizes = {"WIDTH": 80, "ROTARY": 32, "ROWS": kernels.HEADS_AT_ONCE, "LANES": 128}
for kernel in (kernels._split_heads, kernels._join_heads):
    signature = {name: "constexpr" if name in sizes else types.get(name, "*fp32") for name in kernel.arg_names}
    for *card, name in (("cuda", 80, 32, "ptx"), ("cuda", 90, 32, "ptx"), ("hip", "gfx942", 64, "amdgcn")):
        source, options = ASTSource(kernel, signature, constexprs=sizes), {"num_warps": kernels.HEADS_WARPS}
        print(compile(source, target=GPUTarget(*card), options=options).asm[name])
"""


@needs_triton
def test_the_kernels_compile_for_real_cards(tmp_path) -> None:
    assembly = run(COMPILED, tmp_path)
    assert assembly.count(".target sm_80") == assembly.count(".target sm_90") == 2
    assert "gfx942" in assembly


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_a_gpu_gives_what_a_cpu_gives(kind: torch.dtype, tolerance: float) -> None:
    draw = torch.Generator().manual_seed(0)
    fused, norms = torch.randn(1, 300, 32, 3, 80, generator=draw), [torch.randn(80, generator=draw) for _ in range(4)]
    angles = torch.randn(1, 300, 32, generator=draw)
    gradients = [torch.randn(1, 300, 32, 80, generator=draw).to(kind).float() for _ in range(3)]
    given = [fused.to(kind).float(), *norms, angles.cos().to(kind).float(), angles.sin().to(kind).float()]
    results = []
    for device, precision in (("cpu", torch.float32), ("cuda", kind)):
        there = [x.to(device) if i in range(1, 5) else x.to(device, precision) for i, x in enumerate(given)]
        leaves = [x.requires_grad_() for x in there[:5]]
        outputs = split_heads(*there, 1e-5)  # pyright: ignore[reportArgumentType]
        back = torch.autograd.grad(outputs, leaves, [g.to(device, precision) for g in gradients])
        results.append([x.detach().float().cpu() for x in (*outputs, *back)])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() <= tolerance * one.abs().max()
