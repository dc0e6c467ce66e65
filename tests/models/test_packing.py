"""Packed conversations: the losses and gradients of padded ones, and nothing passes from one to another."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_language_models import MODELS
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
)

from pointalign.alignment import AlignmentRegularizer
from pointalign.config import LoraSettings
from pointalign.data.conversations import Collator
from pointalign.models import packing
from pointalign.models.packing import (
    PACKED_ATTENTION,
    _fused_attention,
    _plain_attention,
    keeps_apart,
    packed_attention,
    packed_positions,
    packing_attention,
)
from pointalign.parts import add_lora, select_parts
from pointalign.runs import cast_frozen
from randomness import randomize

POINT, CLOUD = 259, [259] * 5
CONVERSATIONS = [
    ([257, *CLOUD, 10, 11, 12, 13, 14, 258], 8),
    ([257, 20, *CLOUD, 21, *range(30, 50), 258], 9),
    ([257, 7, 258], 0),  # a label at its first token, and no cloud
    ([257, *CLOUD, 40, *CLOUD, 41, 42, 258], 13),
]


def whole_model(config: Any, build_around: Any) -> Any:
    """A tiny PointAlign around a language model in LoRA, everything random, everything trains."""
    model = build_around(config)
    randomize(model, 4)
    add_lora(model, LoraSettings(rank=2, alpha=4, dropout=0.0), train_norms=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.requires_grad_(".original_module." not in name)
            if ".lora_B." in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


def samples(clouds: Tensor) -> list[dict[str, Any]]:
    """As `ConversationDataset` gives them; the last one is about two clouds."""
    given = iter(clouds)
    return [
        {
            "input_ids": ids,
            "labels": [-100] * start + ids[start:],
            "points": [{"point_clouds": next(given)} for _ in range(ids.count(POINT) // len(CLOUD))],
        }
        for ids, start in CONVERSATIONS
    ]


def run(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    """Next-token loss, alignment loss, all gradients of their sum, and the output."""
    regularizer = AlignmentRegularizer(32, 24, layers=[2], seed=1).attach(model)
    model.zero_grad()
    output = model(**batch, alignment_target=lambda output: output.points.qformer_output, use_cache=False)
    alignment = regularizer.take().mean
    (output.loss + 0.5 * alignment).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    regularizer.detach()
    return output.loss.detach(), alignment.detach(), gradients, output


@pytest.fixture(scope="module", params=MODELS)
def named_model(request: pytest.FixtureRequest, build_around: Any) -> Any:
    return whole_model(MODELS[request.param], build_around)


@pytest.mark.parametrize("own_attention", [True, False], ids=["own attention", "packed attention"])
def test_packed_equals_padded(named_model: Any, processor: Any, clouds: Tensor, own_attention: bool) -> None:
    padded = run(named_model, Collator(processor)(samples(clouds)))
    batch = Collator(processor, packing=packed_positions)(samples(clouds))
    assert batch["input_ids"].shape == (1, sum(len(ids) for ids, _ in CONVERSATIONS))
    assert int(batch["alignment_mask"].sum()) == 4 * len(CLOUD)
    base = named_model.language_model.get_base_model()
    own = base.config._attn_implementation  # Gemma 2 caps its scores, for which transformers has no fused attention
    assert own == ("eager" if base.config.model_type == "gemma2" else "sdpa")
    if own_attention:
        packed = run(named_model, batch)
    else:
        with packing_attention(named_model.language_model, bf16=False) as possible:
            assert possible
            assert base.config._attn_implementation == (PACKED_ATTENTION if own == "sdpa" else own)
            packed = run(named_model, batch)
    assert base.config._attn_implementation == own
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(packed[1], padded[1], rtol=1e-5, atol=0)
    assert packed[2].keys() == padded[2].keys()
    assert sum(".lora_" in name for name in packed[2]) > 16
    for name, gradient in packed[2].items():
        torch.testing.assert_close(gradient, padded[2][name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_fused_kernel_is_the_plain_products() -> None:
    """As a GPU computes it: forward and back, with fewer heads of keys than of queries."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 7, 8, generator=generator) for heads in (4, 2, 2))
    results = []
    for attend in (_fused_attention, _plain_attention):
        leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        attended = attend(*leaves, 0.3, 0.0)
        attended.square().sum().backward()
        results.append([attended, *(leaf.grad for leaf in leaves)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_no_conversation_feels_another(named_model: Any, processor: Any, clouds: Tensor) -> None:
    """Other words and another cloud in the second one: every other logit stays to the last bit, its own do not."""
    lengths = [len(ids) for ids, _ in CONVERSATIONS]
    before, after = samples(clouds), samples(clouds)
    after[1]["input_ids"] = [token + 1 if 30 <= token < 50 else token for token in after[1]["input_ids"]]
    after[1]["points"] = [{"point_clouds": clouds[1].flip(1)}]
    with packing_attention(named_model.language_model, bf16=False), torch.no_grad():
        logits = []
        for given in (before, after):
            batch = Collator(processor, packing=packed_positions)(given)
            del batch["alignment_mask"], batch["logits_to_keep"], batch["labels"]
            logits.append(named_model(**batch, use_cache=False).logits[0].split(lengths))
    for number, (one, other) in enumerate(zip(*logits, strict=True)):
        assert torch.equal(one, other) == (number != 1)


def test_bfloat16_rounds_as_autocast_alone_does(build_around: Any, processor: Any, clouds: Tensor) -> None:
    """Frozen matrices in bfloat16 and packing add little to the rounding that autocast over float32 weights has anyway.

    On real data and SmolLM2-135M the gradients were 4.7 to 5.4 % and 3.2 to 3.7 % from those in float32 (docs/LOG.md).
    """
    model = whole_model(MODELS["llama"], build_around)
    select_parts(model, ["language_model_lora", "language_model_norms"])
    batches = [Collator(processor, packing=packing)(samples(clouds)) for packing in (None, packed_positions)]
    with torch.no_grad():
        points = model.encode_points(batches[0]["point_clouds"])
    for batch in batches:
        batch |= {"point_clouds": None, "point_tokens": points.point_tokens, "use_cache": False}

    def gradients(batch: dict[str, Any], bf16: bool) -> tuple[Tensor, Tensor]:
        """Both losses, and all gradients of their sum end to end."""
        regularizer = AlignmentRegularizer(32, 24, layers=[2], seed=1).attach(model)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch, alignment_target=points.qformer_output).loss
            alignment = regularizer.take().mean
        (loss + 0.5 * alignment).backward()
        regularizer.detach()
        found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        return torch.stack([loss, alignment]).detach(), torch.cat(found).clone()

    padded, packed = batches
    losses, exact = gradients(padded, False)
    published = gradients(padded, True)
    cast_frozen(model)
    with packing_attention(model.language_model, bf16=True):
        ours = gradients(packed, True)
    apart = [(gradient - exact).norm() / exact.norm() for _, gradient in (published, ours)]
    assert 0 < apart[0] < 0.1
    assert 0 < apart[1] < 2 * apart[0]
    torch.testing.assert_close(ours[0], losses, rtol=0.005, atol=0)


def test_a_model_that_cannot_is_found_out() -> None:
    sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "initializer_range": 0.2}
    torch.manual_seed(0)
    recurrent = AutoModelForCausalLM.from_config(MambaConfig(**sizes, num_hidden_layers=2))
    alibi = AutoModelForCausalLM.from_config(BloomConfig(**sizes, n_layer=2, n_head=4))
    learned = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    )
    learned.train()
    found = {}
    for name, model in (("recurrent", recurrent), ("alibi", alibi), ("learned", learned)):
        with packing_attention(model, bf16=False) as possible:
            found[name] = possible
    assert found == {"recurrent": False, "alibi": False, "learned": True}
    assert learned.training
    assert learned.transformer.h[0].attn.training


@pytest.mark.parametrize("seed", range(4))
def test_experts_are_kept_apart_but_for_rounding(seed: int) -> None:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    )
    with packing_attention(model, bf16=False) as possible:
        assert possible


def test_attention_that_is_not_causal_is_left_as_it_is() -> None:
    sizes: dict[str, Any] = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ahead = AutoModelForCausalLM.from_config(Gemma3TextConfig(**sizes, **heads, use_bidirectional_attention=True))
    chunked = AutoModelForCausalLM.from_config(
        Llama4TextConfig(**sizes, **heads, attention_chunk_size=4, intermediate_size_mlp=40, num_local_experts=2)
    )
    for model in (ahead, chunked):
        own = model.config._attn_implementation
        with packing_attention(model, bf16=False):
            assert model.config._attn_implementation == own


def test_positions_that_run_on_are_not_apart(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial sees what it is there to see: conversations that are told to be one."""
    assert keeps_apart(model.language_model, bf16=False)
    assert keeps_apart(model.language_model, bf16=True)
    one = lambda lengths: packed_positions([sum(lengths)])  # noqa: E731
    monkeypatch.setattr("pointalign.models.packing.packed_positions", one)
    assert not keeps_apart(model.language_model, bf16=False)
    assert not keeps_apart(model.language_model, bf16=True)


def test_dropout_of_attention_is_drawn_in_training(build_model: Any) -> None:
    model = build_model(attention_dropout=0.5).language_model
    ids, places = torch.arange(9).unsqueeze(0), packed_positions([4, 5])
    with packing_attention(model, bf16=False), torch.no_grad():
        still = model(input_ids=ids, use_cache=False, **places).logits
        assert torch.equal(model(input_ids=ids, use_cache=False, **places).logits, still)
        model.train()
        assert not torch.equal(model(input_ids=ids, use_cache=False, **places).logits, still)


def attend_by_ends(
    query: Tensor, key: Tensor, value: Tensor, begins: Tensor, same: Tensor, longest: int, again: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """What PyTorch's `varlen_attn` promises, (T, H, D), conversation by conversation."""
    assert torch.equal(begins, same)
    assert begins.dtype == torch.int32
    assert longest == again >= int(begins.diff().max())
    outputs = []
    for start, end in pairwise(begins.tolist()):
        scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), key[start:end].float())
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
        weights = (scores * (query.shape[2] ** -0.5 if scale is None else scale)).masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", weights.softmax(dim=-1), value[start:end].float()))
    return torch.cat(outputs).to(query.dtype)


def heads_and_places(device: str) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Queries, keys and values of four conversations, a gradient, and where they end."""
    draw, lengths = torch.Generator().manual_seed(0), [5, 70, 1, 52]
    heads = [torch.randn(1, 4, sum(lengths), 80, generator=draw).to(device, torch.bfloat16) for _ in range(3)]
    gradient = torch.randn(1, sum(lengths), 4, 80, generator=draw).to(device, torch.bfloat16)
    ends = packed_positions(lengths)["cu_seq_lens_q"].to(device)
    return heads, gradient, {"cu_seq_lens_q": ends, "max_length_q": 128}


ON_GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("window", [None, 9])
def test_flash_attention_by_ends_is_a_row_for_each_conversation(
    window: int | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(packing, "varlen_attn", attend_by_ends)
        monkeypatch.setattr(packing, "_on_gpu", lambda tensor: True)
    elif not packing._has_flash(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("this GPU or PyTorch has no flash attention by ends")
    heads, gradient, places = heads_and_places(device)
    results = []
    for flash in (False, True):
        leaves = [head.clone().requires_grad_() for head in heads]
        output, _ = packed_attention(torch.nn.Identity(), *leaves, None, sliding_window=window, flash=flash, **places)
        results.append((output, *torch.autograd.grad(output, leaves, gradient)))
    for one, other in zip(*results, strict=True):
        assert (one.float() - other.float()).abs().max() <= 2e-2 * one.float().abs().max()


@pytest.mark.parametrize(
    ("dtype", "key_heads", "width"), [(torch.float32, 4, 80), (torch.bfloat16, 2, 80), (torch.bfloat16, 4, 12)]
)
def test_what_flash_attention_does_not_take_has_rows(
    dtype: torch.dtype, key_heads: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "varlen_attn", lambda *given, **named: pytest.fail("not for these"))
    monkeypatch.setattr(packing, "_on_gpu", lambda tensor: True)
    query = torch.randn(1, 4, 6, width, dtype=dtype)
    key = torch.randn(1, key_heads, 6, width, dtype=dtype)
    output, _ = packed_attention(torch.nn.Identity(), query, key, key, None, flash=True, **packed_positions([2, 4]))
    assert output.shape == (1, 6, 4, width)


def test_where_flash_attention_refuses_conversations_have_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which builds and cards have it is not known by version alone."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval().bfloat16()
    monkeypatch.setattr(packing, "_has_flash", lambda device: True)
    monkeypatch.setattr(packing, "_on_gpu", lambda tensor: True)

    def refused(*given: Any, **named: Any) -> Tensor:
        raise RuntimeError("USE_FLASH_ATTENTION was not enabled for build.")

    for attend, way in ((attend_by_ends, packing.PACKED_FLASH), (refused, PACKED_ATTENTION)):
        monkeypatch.setattr(packing, "varlen_attn", attend)
        with packing_attention(model, bf16=True) as possible:
            assert possible
            assert model.config._attn_implementation == way
        assert model.config._attn_implementation == "sdpa"
