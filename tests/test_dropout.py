"""Hashed dropout: the hash by hand, how often and how independently numbers stay, and what becomes of a model's dropouts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, PhiConfig, PhiForCausalLM

from pointalign.decoder_blocks import compiled_blocks
from pointalign.dropout import HashedDropout, dropouts_called_once, hashed_dropout, kept_places
from pointalign.models.phi import PhiVariantConfig, PhiVariantForCausalLM

KEY = torch.tensor([2_041_375_629, 1_204_884_093], dtype=torch.int32)
P, CPU = 0.05, torch.device("cpu")
SHAPE = torch.Size((1, 300, 640))


def mixed(number: int) -> int:
    """lowbias32 as its author writes it, in numbers without a sign."""
    number ^= number >> 16
    number = number * 0x7FEB352D % 2**32
    number ^= number >> 15
    number = number * 0x846CA68B % 2**32
    return number ^ number >> 16


def keys(count: int) -> Tensor:
    return torch.randint(2**31 - 1, (count, 2), generator=torch.Generator().manual_seed(0)).int()


def dropped(key: Tensor) -> Tensor:
    """1 where a number is left out, less the probability that it is."""
    return (~kept_places(SHAPE, key, P)).double().flatten() - P


def z_score(one: Tensor, other: Tensor) -> float:
    """Of what two series have in common, were they independent."""
    return abs(float((one * other).sum() / (len(one) ** 0.5 * P * (1 - P))))


def test_the_hash_by_hand() -> None:
    kept = kept_places(torch.Size((40, 50)), KEY, 0.3).flatten().tolist()
    numbers = [mixed((mixed(place ^ int(KEY[0])) + int(KEY[1])) % 2**32) % 2**24 for place in range(2000)]
    assert kept == [number >= round(0.3 * 2**24) for number in numbers]


def test_as_many_are_left_out_as_is_asked_for() -> None:
    count = SHAPE.numel()
    for key in keys(20):
        assert abs(float(dropped(key).sum())) < 4 * (count * P * (1 - P)) ** 0.5
    by_row = dropped(KEY).view(SHAPE).sum(dim=(0, 2)).var() / (SHAPE[2] * P * (1 - P))
    assert 0.75 < float(by_row) < 1.25, "no row is left out more than chance has it (four standard errors)"


def test_steps_layers_and_neighbours_have_nothing_in_common() -> None:
    for one, other in combinations([dropped(key) for key in keys(12)], 2):
        assert z_score(one, other) < 4
    mask = dropped(KEY)
    for distance in (1, 2, 3, 16, 64, 128, 640, 641, 1280, 4096, 65536):
        assert z_score(mask[:-distance], mask[distance:]) < 4
    for key in (KEY + torch.tensor([1, 0]).int(), KEY + torch.tensor([0, 1]).int()):
        assert z_score(mask, dropped(key)) < 4, "a key beside it"


def test_what_stays_is_divided_and_so_is_its_gradient() -> None:
    module: Any = HashedDropout(0.25)
    module.key = KEY
    x = torch.randn(6, 7, requires_grad=True)
    y = module(x)
    kept = kept_places(x.shape, KEY, 0.25)
    assert 0 < int(kept.sum()) < 42
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.75, 0.0))
    assert module.eval()(x) is x


def test_what_is_left_out_is_left_out_though_it_be_no_number() -> None:
    module: Any = HashedDropout(0.5)
    module.key = KEY
    x = torch.full((64,), torch.nan)
    kept = kept_places(x.shape, KEY, 0.5)
    assert torch.equal(module(x).isnan(), kept)


def test_compiled_it_leaves_out_the_same() -> None:
    compiled = torch.compile(kept_places, dynamic=True)
    for rows in (3, 8):
        shape = torch.Size((rows, 700))
        assert torch.equal(compiled(shape, KEY, 0.1), kept_places(shape, KEY, 0.1))


@pytest.fixture
def model() -> Any:
    """Three blocks of a Llama in LoRA, whose adapters drop, and whose head's dropout belongs to no block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    language_model = LlamaForCausalLM(config)
    adapted: Any = get_peft_model(
        language_model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj", "o_proj"])
    )
    adapted.base_model.model.further = nn.Dropout(0.3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_()
    return adapted.base_model.model.train()


IDS = torch.arange(10).unsqueeze(0)


def dropouts(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Dropout)]


def test_the_blocks_dropouts_are_hashed_and_come_back(model: Any) -> None:
    with hashed_dropout(model, True, CPU):
        kinds = [type(module) for module in dropouts(model)]
        assert kinds.count(HashedDropout) == 6
        assert type(model.further) is nn.Dropout
        first, second = model(input_ids=IDS).logits, model(input_ids=IDS).logits
        assert not torch.allclose(first, second), "each pass draws keys"
        used = [tuple(module.key.tolist()) for module in dropouts(model) if isinstance(module, HashedDropout)]
        assert len(set(used)) == 6
    assert [type(module) for module in dropouts(model)] == [nn.Dropout] * 7
    assert not any(hasattr(module, "key") for module in dropouts(model))
    assert not model._forward_pre_hooks
    with hashed_dropout(model, False, CPU):
        assert not any(isinstance(module, HashedDropout) for module in model.modules())


def masks(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the hashed dropouts of one forward pass keep."""
    kept: list[Tensor] = []

    def noted(shape: torch.Size, key: Tensor, p: float) -> Tensor:
        kept.append(kept_places(shape, key, p))
        return kept[-1]

    monkeypatch.setattr("pointalign.dropout.kept_places", noted)
    with hashed_dropout(model, True, CPU):
        model(input_ids=IDS)
    return kept


SMALL = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 32}


def test_both_branches_of_a_block_drop_their_own_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's and MLP's, of the same shape, and those of two blocks."""
    model = PhiVariantForCausalLM(PhiVariantConfig(**SMALL, resid_pdrop=0.5)).train()
    kept = masks(model, monkeypatch)
    assert len(kept) == 4
    for one, other in combinations(kept, 2):
        assert 0.35 < float((one == other).double().mean()) < 0.65, "independent ones agree in half of 480 places"


def test_a_dropout_that_a_block_calls_twice_stays_as_it_is() -> None:
    model = PhiForCausalLM(PhiConfig(**SMALL, resid_pdrop=0.5))
    assert any(isinstance(module, nn.Dropout) for module in model.model.layers.modules())
    assert dropouts_called_once(model.model.layers) == []


def test_keys_lie_where_the_model_will_compute(model: Any) -> None:
    """FSDP moves it later."""
    with hashed_dropout(model, True, torch.device("meta")):
        [place] = {module.key.device.type for module in dropouts(model) if isinstance(module, HashedDropout)}
    assert place == "meta"


def test_keys_come_from_pytorchs_random_numbers(model: Any) -> None:
    logits = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with hashed_dropout(model, True, CPU):
            logits.append(model(input_ids=IDS).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])


def test_a_block_that_is_run_again_drops_the_same(model: Any) -> None:
    """Also without the state of the random numbers, which gradient checkpointing else puts back."""
    block, hidden = model.model.layers[1], torch.randn(1, 10, 32)
    places = model.model.rotary_emb(hidden, torch.arange(10).unsqueeze(0))

    def run(x: Tensor) -> Tensor:
        return block(x, position_embeddings=places)

    with hashed_dropout(model, True, CPU):
        model(input_ids=IDS)
        gradients = []
        for again in (False, True):
            x = hidden.clone().requires_grad_()
            output: Any = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if again else run(x)
            output.square().sum().backward()
            gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_all_blocks_share_one_graph(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that lay in one tensor would be compiled for each way in which they lie to one another."""
    compile, counted = torch.compile, CompileCounter()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=counted, dynamic=True))
    torch.compiler.reset()
    with hashed_dropout(model, True, CPU), compiled_blocks(model, True, CPU):
        for length in (10, 7, 8):
            model(input_ids=IDS[:, :length], use_cache=False).logits.sum().backward()
    assert counted.frame_count == 1
