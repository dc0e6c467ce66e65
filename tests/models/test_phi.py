"""The Phi-2 variant: caches, padding, backends, checkpointing, saving, and what the three differences are."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from pointalign.models.phi import PhiVariantConfig, PhiVariantForCausalLM, PhiVariantGELU, gelu_by_sigmoid

SIZES = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(PhiVariantConfig(**SIZES)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def ids():
    return torch.randint(2, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def test_auto_class_builds_the_variant(model):
    assert isinstance(model, PhiVariantForCausalLM)
    attention = model.model.layers[0].self_attn
    assert attention.query_key_value.weight.shape == (144, 48)
    assert attention.q_layernorm.weight.shape == (16,)
    assert attention.rotary_dim == 8
    assert model.model.layers[0].post_layernorm.eps == 1e-6


def test_gelu_is_the_published_one():
    """`gelu_new` of transformers, forward and back; GELU by tanh of 1, -1 and 3 by hand."""
    activation = PhiVariantForCausalLM(PhiVariantConfig(**SIZES)).model.layers[0].mlp.activation_fn
    assert isinstance(activation, PhiVariantGELU)
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    theirs = ACT2FN["gelu_new"](x)
    gradient = torch.autograd.grad(theirs.sum(), x)
    by_hand = torch.tensor([0.841191990608, -0.158808009392, 2.996362607918], dtype=torch.float64)
    for way in (activation, gelu_by_sigmoid):
        ours = way(x)
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(ours.sum(), x), gradient, atol=1e-12, rtol=1e-9)
        torch.testing.assert_close(way(torch.tensor([1.0, -1.0, 3.0], dtype=torch.float64)), by_hand)
    relu = PhiVariantForCausalLM(PhiVariantConfig(**SIZES, hidden_act="relu")).model.layers[0].mlp.activation_fn
    assert not isinstance(relu, PhiVariantGELU)


def by_hand(attention, hidden, cos, sin):
    """The attention written out head by head."""
    length, width = hidden.shape
    heads, size, rotary = width // attention.head_dim, attention.head_dim, attention.rotary_dim
    fused = attention.query_key_value(hidden).view(length, heads, 3, size)

    def rotate(x):
        first, second = x[:, : rotary // 2], x[:, rotary // 2 : rotary]
        turned = torch.cat([-second, first], dim=1)
        return torch.cat([x[:, :rotary] * cos + turned * sin, x[:, rotary:]], dim=1)

    outputs = []
    for head in range(heads):
        query, key, value = fused[:, head, 0], fused[:, head, 1], fused[:, head, 2]
        query, key = rotate(attention.q_layernorm(query)), rotate(attention.k_layernorm(key))
        scores = query @ key.T / size**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        outputs.append(scores.softmax(dim=-1) @ value)
    return attention.dense(torch.cat(outputs, dim=1))


@torch.no_grad()
def test_block_equals_the_formula(model):
    layer = model.model.layers[1]
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(2))
    cos, sin = model.model.rotary_emb(hidden[None], torch.arange(7)[None])
    normalized = layer.input_layernorm(hidden)
    attended = by_hand(layer.self_attn, normalized, cos[0], sin[0])
    attended = attended / (attended.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.post_layernorm.weight
    expected = hidden + attended + layer.mlp(normalized)
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    actual = layer(hidden[None], position_embeddings=(cos, sin), attention_mask=mask)
    torch.testing.assert_close(actual[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cache_gives_the_same_logits(model, ids):
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_rest(model, ids, side):
    padding, ones = torch.zeros(2, 4, dtype=torch.long), torch.ones_like(ids)
    order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
    padded = torch.cat(order(padding, ids), dim=1)
    mask = torch.cat(order(padding, ones), dim=1)
    logits = model(padded, attention_mask=mask).logits
    kept = logits[:, 4:] if side == "left" else logits[:, :9]
    torch.testing.assert_close(kept, model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_agree(model, ids):
    sdpa = model(ids).logits
    model.set_attn_implementation("eager")
    outputs = model(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(outputs.logits, sdpa, atol=1e-5, rtol=1e-5)
    assert len(outputs.hidden_states) == 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 3, 9, 9)] * 3


def test_gradient_checkpointing_gives_the_same_gradients(model, ids):
    def gradient():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.query_key_value.weight.grad.clone()

    model.train()
    plain = gradient()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradient(), plain)


def test_generate_with_left_padding(model, ids):
    alone = model.generate(ids[:1], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids[:1]], dim=1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)], dim=1)
    beside = model.generate(
        padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert alone[0, 9:].tolist() == beside[0, 12:].tolist()


def test_saved_folder_loads_in_another_process(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, pointalign.models.phi\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "torch.save(model(torch.tensor(eval(sys.argv[2]))).logits.detach(), sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(ids.tolist())], check=True, capture_output=True)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(ids).logits)


def test_norms_are_found_for_training(model):
    from pointalign.parts import norm_modules

    names = norm_modules(model)
    assert "model.layers.0.post_layernorm" in names
    assert "model.layers.0.self_attn.q_layernorm" in names
    assert len(names) == 3 * 4 + 1
    assert isinstance(model.model.final_layernorm, nn.LayerNorm)
