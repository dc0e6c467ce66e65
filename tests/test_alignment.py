"""The regulariser: its loss by hand, the released code's golden values, and as a guest in a plain LLaVA."""

import copy
import inspect
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pointalign.alignment import (
    AlignmentProjector,
    AlignmentRegularizer,
    alignment_loss,
    find_decoder_layers,
    pool_target,
    schedule_weight,
)
from pointalign.errors import ConfigError, DataError

IMAGE_TOKEN, IMAGE_TOKENS, PAD = 90, 4, 0


# The loss alone


def test_loss_values_by_hand():
    projected = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0], [9.0, -9.0]])
    target = torch.tensor([[3.0, 4.0], [0.0, 5.0], [-1.0, -1.0], [7.0, 7.0]])
    mask = torch.tensor([True, True, True, False])
    # cosines 1, 0, -1; absolute differences 0, 6, 6; squared 0, 26, 18 (each over 2 columns)
    assert alignment_loss(projected, target, mask).item() == pytest.approx(1.0, abs=1e-6)
    assert alignment_loss(projected, target, mask, "l1").item() == pytest.approx((0 + 3 + 3) / 3, abs=1e-6)
    assert alignment_loss(projected, target, mask, "l2").item() == pytest.approx((0 + 13 + 9) / 3, abs=1e-6)


def test_target_may_hold_rows_or_clouds_instead_of_positions():
    generator = torch.Generator().manual_seed(0)
    projected, target = torch.randn(2, 6, 3, generator=generator), torch.randn(2, 6, 3, generator=generator)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    by_position = alignment_loss(projected, target, mask)
    cosines = [
        1 - torch.dot(projected[i, j], target[i, j]) / projected[i, j].norm() / target[i, j].norm()
        for i, j in [(0, 1), (0, 2), (1, 3), (1, 4)]
    ]
    assert by_position.item() == pytest.approx(sum(cosines).item() / 4, abs=1e-6)
    assert torch.equal(alignment_loss(projected, target[mask], mask), by_position)
    assert torch.equal(alignment_loss(projected, target[mask].view(2, 2, 3), mask.long()), by_position)


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_gradient_goes_into_projected_rows_of_the_mask_and_nowhere_else(kind):
    projected = torch.randn(2, 4, 3, requires_grad=True)
    target = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    alignment_loss(projected, target * 2, mask, kind).backward()
    assert target.grad is None
    assert projected.grad[mask].abs().sum(dim=-1).min() > 0
    assert projected.grad[~mask].abs().max() == 0


@pytest.mark.parametrize("kind", ["cosine", "l1", "l2"])
def test_without_point_tokens_the_loss_is_zero_and_back_propagates(kind):
    projected = torch.randn(2, 4, 3, requires_grad=True)
    loss = alignment_loss(projected, torch.empty(0, 3), torch.zeros(2, 4, dtype=torch.bool), kind)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(projected.grad, torch.zeros_like(projected))


def test_zero_rows_give_no_nan():
    projected = torch.zeros(1, 2, 3, requires_grad=True)
    loss = alignment_loss(projected, torch.zeros(2, 3), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 1.0
    assert projected.grad.isfinite().all()


def test_half_precision_is_scored_in_float32():
    projected = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    target = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    loss = alignment_loss(projected, target, torch.ones(1, 8, dtype=torch.bool))
    assert loss.dtype == torch.float32
    cosines = (projected[0].double() * target.double()).sum(-1) / projected[0].double().norm(dim=-1)
    assert loss.item() == pytest.approx((1 - cosines / target.double().norm(dim=-1)).mean().item(), abs=1e-6)


def test_wrong_number_of_targets_and_unknown_loss():
    mask = torch.tensor([[True, True, False]])
    with pytest.raises(DataError, match=r"^3 alignment targets for 2 point tokens; [^\n]+$"):
        alignment_loss(torch.zeros(1, 3, 4), torch.zeros(3, 1, 4), mask)
    with pytest.raises(DataError, match=r"^alignment targets are 1 wide and projected point tokens 4; [^\n]+$"):
        alignment_loss(torch.zeros(1, 3, 4), torch.zeros(2, 1), mask)
    with pytest.raises(ConfigError, match="'l3'; choose cosine, l1 or l2"):
        alignment_loss(torch.zeros(1, 3, 4), torch.zeros(2, 4), mask, "l3")


def test_projector_sizes_at_paper_scale():
    with torch.device("meta"):
        projector = AlignmentProjector(2560, 768)
    kinds = [type(layer).__name__ for layer in projector.layers]
    assert kinds == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
    assert projector.layers[0].out_features == (2560 + 768) // 2 == 1664
    assert sum(p.numel() for p in projector.parameters()) == 8_310_784


@pytest.mark.parametrize(
    ("depth", "count"), [(1, 10 * 6 + 6), (2, 10 * 8 + 8 + 8 * 6 + 6), (3, 10 * 8 + 8 + 8 * 8 + 8 + 8 * 6 + 6)]
)
def test_projector_depths(depth, count):
    projector = AlignmentProjector(10, 6, depth)
    assert sum(p.numel() for p in projector.parameters()) == count
    x = hidden = torch.randn(2, 3, 10)
    linears = [layer for layer in projector.layers if isinstance(layer, nn.Linear)]
    assert len(linears) == depth
    for index, linear in enumerate(linears):
        hidden = hidden @ linear.weight.T + linear.bias
        if index + 1 < depth:
            hidden = hidden * torch.sigmoid(hidden)
    torch.testing.assert_close(projector(x), hidden)
    with pytest.raises(ConfigError, match="not 4"):
        AlignmentProjector(10, 6, 4)


def test_pool_target_averages_neighbours():
    features = torch.tensor([[[1.0, 10], [3, 30], [5, 50], [9, 90]]])
    assert pool_target(features, 4) is features
    assert torch.equal(pool_target(features, 2), torch.tensor([[[2.0, 20], [7, 70]]]))
    assert torch.equal(pool_target(features, 1), torch.tensor([[[4.5, 45]]]))


def test_schedule_by_hand():
    assert schedule_weight(0.1, "constant", 1.0, 0.5) == 0.1
    assert schedule_weight(0.1, "linear", 0.0, 0.5) == 0.1
    assert schedule_weight(0.1, "linear", 0.25, 0.5) == pytest.approx(0.05)
    assert schedule_weight(0.1, "linear", 0.5, 0.5) == 0.0
    assert schedule_weight(0.1, "linear", 0.75) == pytest.approx(0.025)
    assert schedule_weight(0.1, "stop", 0.49, 0.5) == 0.1
    assert schedule_weight(0.1, "stop", 0.5, 0.5) == 0.0


# Golden values of the released code


@pytest.fixture(scope="module")
def golden(reference):
    folder = reference / "alignment"
    state = load_file(folder / "checkpoint.safetensors")
    projector = AlignmentProjector(32, 48)
    prefix = "alignment_projector.projector."
    projector.layers.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return projector, load_file(folder / "expected.safetensors")


def test_golden_projection(golden):
    projector, expected = golden
    mask = expected["point_token_mask"].bool()
    got = projector(expected["hidden_state_15"][mask])
    wanted = expected["alignment_projected"].flatten(0, 1)
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5


@pytest.mark.parametrize("which", ["point_tokens", "released"])
def test_golden_loss(golden, which):
    projector, expected = golden
    mask = expected["point_token_mask" if which == "point_tokens" else "released_span_mask"].bool()
    loss = alignment_loss(projector(expected["hidden_state_15"]), expected["qformer_output"], mask)
    assert loss.item() == pytest.approx(expected[f"loss_align_{which}"].item(), rel=1e-5)
    assert expected["loss_align_released"].item() != pytest.approx(expected["loss_align_point_tokens"].item(), rel=1e-3)


# A guest in a plain LLaVA


def make_llava(layers=3):
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=100,
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
            pad_token_id=PAD,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=20,
            num_hidden_layers=layers,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            projection_dim=16,
        ),
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).train()


def image(*text):
    return [IMAGE_TOKEN] * IMAGE_TOKENS + list(text)


PROMPTS = {
    "one image": [[5, *image(6, 7)], [*image(8, 9, 10)]],
    "image in the middle and at the end": [[5, 6, 7, *image()], [8, *image(9, 10, 11, 12, 13)]],
    "two images a prompt": [[5, *image(6), *image(7)], [*image(), *image(8, 9, 10)]],
    "several turns": [[5, *image(6, 7), 50, 8, 9, 51, 10, *image(11), 52], [*image(8), 50, 9, 51]],
}


def make_batch(prompts, side, seed=1):
    length = max(map(len, prompts)) + 2
    ids, attention = torch.full((len(prompts), length), PAD), torch.zeros(len(prompts), length, dtype=torch.long)
    for row, mask, prompt in zip(ids, attention, prompts, strict=True):
        span = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        row[span], mask[span] = torch.tensor(prompt), 1
    generator = torch.Generator().manual_seed(seed)
    images = int((ids == IMAGE_TOKEN).sum()) // IMAGE_TOKENS
    batch = {
        "input_ids": ids,
        "attention_mask": attention,
        "labels": torch.where((ids == IMAGE_TOKEN) | (attention == 0), -100, ids),
    }
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 8, 8, generator=generator)
    return batch, torch.randn(images, IMAGE_TOKENS, 10, generator=generator)


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected, tolerance=2e-5):
    """Equal within rounding; a gradient that is zero in exact arithmetic (a key's bias) is held to the others' size."""
    assert got.keys() == expected.keys()
    floor = 1e-3 * max(wanted.norm() for wanted in expected.values())
    for name, wanted in expected.items():
        error = (got[name] - wanted).norm() / wanted.norm().clamp(min=floor)
        assert error < tolerance, f"{name}: relative error {error}"


def regularized_step(model, regularizer, batch, target):
    output = model(**batch, alignment_mask=batch["input_ids"] == IMAGE_TOKEN, alignment_target=target)
    term = regularizer.take()
    loss = output.loss + term.weight * term.mean
    loss.backward()
    return loss.item(), term, gradients(model)


def by_hand(model, regularizer, batch, target, layers, kind="cosine"):
    """Loss and gradients from `output_hidden_states`, position by position."""
    projectors = copy.deepcopy(regularizer.projectors)
    model.zero_grad()
    projectors.zero_grad()
    output = model(**batch, output_hidden_states=True)
    positions = (batch["input_ids"] == IMAGE_TOKEN).nonzero().tolist()
    total = 0.0
    for layer in layers:
        for (row, column), wanted in zip(positions, target.flatten(0, 1), strict=True):
            got = projectors[str(layer)](output.hidden_states[layer][row, column])
            if kind == "cosine":
                total = total + 1 - (got @ wanted) / (got.norm() * wanted.norm())
            elif kind == "l1":
                total = total + (got - wanted).abs().sum() / len(wanted)
            else:
                total = total + ((got - wanted) ** 2).sum() / len(wanted)
    mean = total / len(positions) / len(layers)
    loss = output.loss + regularizer.weight * mean
    loss.backward()
    found = gradients(model)
    prefix = "alignment_regularizer.projectors."
    found.update({prefix + name: gradient for name, gradient in gradients(projectors).items()})
    return loss.item(), mean.item(), found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", PROMPTS)
def test_llava_loss_and_gradients_equal_those_by_hand(prompts, side):
    batch, target = make_batch(PROMPTS[prompts], side)
    plain = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,))
    wanted_loss, wanted_mean, wanted = by_hand(plain, regularizer, batch, target, (2,))
    plain.zero_grad()
    plain(**batch).loss.backward()
    without = gradients(plain)

    model = make_llava()
    regularizer.attach(model)
    loss, term, found = regularized_step(model, regularizer, batch, target)
    assert term.count == target.shape[0] * IMAGE_TOKENS
    assert term.weight == 0.1
    assert term.mean.item() == pytest.approx(wanted_mean, abs=1e-6)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_gradients(found, wanted)
    first = "model.language_model.layers.0.mlp.up_proj.weight"
    last = "model.language_model.layers.2.mlp.up_proj.weight"
    assert (found[first] - without[first]).norm() > 1e-3 * without[first].norm()
    assert torch.equal(found[last], without[last])


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_other_losses_on_llava(kind):
    batch, target = make_batch(PROMPTS["one image"], "right")
    regularizer = AlignmentRegularizer(24, 10, layers=(1,), loss=kind, depth=2, weight=0.7)
    wanted_loss, _, wanted = by_hand(make_llava(), regularizer, batch, target, (1,), kind)
    model = make_llava()
    regularizer.attach(model)
    loss, _, found = regularized_step(model, regularizer, batch, target)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_gradients(found, wanted)


def test_several_layers_are_averaged():
    batch, target = make_batch(PROMPTS["two images a prompt"], "left")
    regularizer = AlignmentRegularizer(24, 10, layers=(1, 2))
    assert set(regularizer.projectors) == {"1", "2"}
    wanted_loss, _, wanted = by_hand(make_llava(), regularizer, batch, target, (1, 2))
    model = make_llava()
    regularizer.attach(model)
    loss, _, found = regularized_step(model, regularizer, batch, target)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert_same_gradients(found, wanted)


def test_target_may_be_a_function_of_the_output():
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(1,)).attach(model)
    seen = []

    def target_of(output):
        seen.append(output.logits.shape)
        return target

    mask = batch["input_ids"] == IMAGE_TOKEN
    model(**batch, alignment_mask=mask, alignment_target=target_of)
    lazy = regularizer.take().total
    model(**batch, alignment_mask=mask, alignment_target=target)
    assert torch.equal(regularizer.take().total, lazy)
    assert len(seen) == 1


def test_the_last_block_is_read_before_the_final_norm():
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    captured = []
    model.model.language_model.layers[2].register_forward_hook(lambda m, a, output: captured.append(output))
    regularizer = AlignmentRegularizer(24, 10, layers=(3,)).attach(model)
    mask = batch["input_ids"] == IMAGE_TOKEN
    model(**batch, alignment_mask=mask, alignment_target=target)
    hidden = captured[0][0] if isinstance(captured[0], tuple) else captured[0]
    expected = alignment_loss(regularizer.projectors["3"](hidden), target, mask)
    assert regularizer.take().mean.item() == pytest.approx(expected.item(), abs=1e-6)


def test_weight_zero_changes_no_gradient_by_a_bit():
    batch, target = make_batch(PROMPTS["several turns"], "right")
    plain = make_llava()
    plain(**batch).loss.backward()
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,), weight=0.0).attach(model)
    _, term, found = regularized_step(model, regularizer, batch, target)
    assert term.mean.item() > 0.1
    for name, wanted in gradients(plain).items():
        assert torch.equal(found[name], wanted), name


def all_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for module in model.modules() for kind in kinds for hook in getattr(module, kind)]


def test_detached_nothing_remains():
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    keys, forward = list(model.state_dict()), inspect.signature(type(model).forward)
    before = model(**batch).logits
    others = all_hooks(model)  # transformers' own, which it installs on the first call
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    assert len(all_hooks(model)) == len(others) + 3
    names = {name for name, _ in model.named_parameters()}
    assert "alignment_regularizer.projectors.2.layers.0.weight" in names
    regularized_step(model, regularizer, batch, target)
    regularizer.detach()
    assert all_hooks(model) == others
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "alignment_regularizer")
    assert inspect.signature(type(model).forward) == forward
    assert torch.equal(model(**batch).logits, before)
    # and it may come again
    regularizer.attach(model)
    regularized_step(model, regularizer, batch, target)
    regularizer.detach()
    assert all_hooks(model) == others


def test_attached_twice_is_refused():
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    with pytest.raises(ConfigError, match="attached already"):
        regularizer.attach(model)
    assert len(all_hooks(model)) == 3


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_out_of_range_is_refused_and_leaves_no_hook(layer):
    model = make_llava()
    with pytest.raises(ConfigError, match=rf"^alignment layer {layer} does not exist: choose 1 to 3 for this model$"):
        AlignmentRegularizer(24, 10, layers=(1, layer)).attach(model)
    assert all_hooks(model) == []
    assert not hasattr(model, "alignment_regularizer")


def test_no_layers_is_refused():
    with pytest.raises(ConfigError, match=r"alignment\.layers is empty"):
        AlignmentRegularizer(24, 10, layers=())


def test_blocks_are_the_decoders_not_the_vision_towers():
    model = make_llava()
    assert find_decoder_layers(model) is model.model.language_model.layers
    with pytest.raises(ConfigError, match="pass `layers_module` yourself"):
        find_decoder_layers(nn.Linear(2, 2))


def checkpointed_llava(use_reentrant):
    model = make_llava()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    return model


def test_gradient_checkpointing_gives_the_same_loss_and_gradients():
    batch, target = make_batch(PROMPTS["several turns"], "left")
    results = []
    for model in (make_llava(), checkpointed_llava(use_reentrant=False)):
        regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
        runs = []
        model.model.language_model.layers[1].input_layernorm.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        results.append(regularized_step(model, regularizer, batch, target))
        assert len(runs) == len(results), "the second model must recompute its blocks"
        # a second step, after the recomputation of the first
        model.zero_grad()
        again = regularized_step(model, regularizer, batch, target)
        assert again[0] == results[-1][0]
        assert_same_gradients(again[2], results[-1][2], 1e-6)
    assert results[0][0] == results[1][0]
    assert_same_gradients(results[1][2], results[0][2], 1e-6)


def test_gradient_checkpointing_with_reentry_is_right_or_refused():
    """transformers checkpoints a block's `forward` or its `__call__`, by version; hooks see a gradient only in the first."""
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    wanted = regularized_step(model, AlignmentRegularizer(24, 10, layers=(2,)).attach(model), batch, target)
    model = checkpointed_llava(use_reentrant=True)
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    try:
        loss, _, found = regularized_step(model, regularizer, batch, target)
    except ConfigError as refusal:
        if "use_reentrant=False" not in str(refusal):
            raise
        return
    assert loss == wanted[0]
    assert_same_gradients(found, wanted[2], 1e-6)


def test_a_block_whose_hook_sees_no_gradient_is_refused():
    """What reentrant checkpointing of a block's `__call__` does: it runs without a graph, hooks included."""
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    block = model.model.language_model.layers[1]
    call = type(block).__call__

    class Reentrant(type(block)):
        def __call__(self, *args, **kwargs):
            with torch.no_grad():
                return call(self, *args, **kwargs)

    block.__class__ = Reentrant
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        regularized_step(model, regularizer, batch, target)


def test_generate_while_attached_equals_generate_without():
    batch, target = make_batch(PROMPTS["two images a prompt"], "left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    model = make_llava().eval()
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    regularized_step(model, regularizer, batch, target)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), plain)
    assert not regularizer._captured, "hidden states of an ordinary call are not kept"
    with pytest.raises(ConfigError, match="no alignment loss to take"):
        regularizer.take()


def test_a_batch_without_point_tokens():
    batch, target = make_batch([[5, 6, 7], [8, 9]], "left")
    assert target.shape == (0, IMAGE_TOKENS, 10)
    plain = make_llava()
    plain(**batch).loss.backward()
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    _, term, found = regularized_step(model, regularizer, batch, target)
    assert term.count == 0
    assert term.mean.item() == 0.0
    for name, wanted in gradients(plain).items():
        assert torch.equal(found[name], wanted), name
    projector = [g for name, g in found.items() if name.startswith("alignment_regularizer")]
    assert len(projector) == 6
    assert all(g.abs().max() == 0 for g in projector)


def test_exceptions_propagate_and_the_next_pass_is_clean():
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava()
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    mask = batch["input_ids"] == IMAGE_TOKEN
    with pytest.raises(DataError, match="7 alignment targets for 8 point tokens"):
        model(**batch, alignment_mask=mask, alignment_target=target.flatten(0, 1)[:7])
    with pytest.raises(ZeroDivisionError):
        model(**batch, alignment_mask=mask, alignment_target=lambda output: 1 / 0)
    with pytest.raises(DataError, match="alignment targets are 11 wide and projected point tokens 10"):
        model(**batch, alignment_mask=mask, alignment_target=torch.randn(2, IMAGE_TOKENS, 11))
    with pytest.raises(DataError, match="belong together"):
        model(**batch, alignment_mask=mask)
    with pytest.raises(ConfigError, match="no alignment loss to take"):
        regularizer.take()
    broken = dict(batch, pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match=r"(?i)image"):
        model(**broken, alignment_mask=mask, alignment_target=target)
    model(**batch)
    with pytest.raises(ConfigError, match="no alignment loss to take"):
        regularizer.take()
    # a loss that nobody took is not handed out after a later pass without targets
    model(**batch, alignment_mask=mask, alignment_target=target)
    model(**batch)
    with pytest.raises(ConfigError, match="no alignment loss to take"):
        regularizer.take()
    loss, _, _ = regularized_step(model, regularizer, batch, target)
    assert math.isfinite(loss)
    with pytest.raises(ConfigError, match="no alignment loss to take"):
        regularizer.take()


def test_a_frozen_stack_before_the_block_is_refused():
    batch, target = make_batch(PROMPTS["one image"], "left")
    model = make_llava().requires_grad_(False)
    regularizer = AlignmentRegularizer(24, 10, layers=(2,)).attach(model)
    mask = batch["input_ids"] == IMAGE_TOKEN
    with pytest.raises(ConfigError, match="carry no gradient"):
        model(**batch, alignment_mask=mask, alignment_target=target)
    with torch.no_grad():
        model(**batch, alignment_mask=mask, alignment_target=target)
    assert regularizer.take().count == 8


def test_initial_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = AlignmentRegularizer(8, 4, seed=3)
    assert torch.equal(torch.rand(3), expected)
    second, third = AlignmentRegularizer(8, 4, seed=3), AlignmentRegularizer(8, 4, seed=4)
    for a, b, c in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_the_weight_follows_progress():
    regularizer = AlignmentRegularizer(8, 4, weight=0.4, schedule="linear", stop_fraction=0.5)
    assert regularizer.current_weight == 0.4
    regularizer.progress = 0.25
    assert regularizer.current_weight == pytest.approx(0.2)
    regularizer.progress = 0.6
    assert regularizer.current_weight == 0.0


def test_point_model_with_its_own_target(model, clouds):
    """On our model: the Q-Former's output of the very same pass is the target, and gets no gradient."""
    ids = torch.tensor([[10, *[259] * 5, 11, 12], [13, 14, *[259] * 5, 15]])
    assert find_decoder_layers(model) is model.language_model.model.layers
    regularizer = AlignmentRegularizer(32, 24, layers=(2,)).attach(model)
    mask = ids == 259
    output = model(
        input_ids=ids,
        point_clouds=clouds[:2],
        labels=ids.masked_fill(mask, -100),
        alignment_mask=mask,
        alignment_target=lambda out: out.points.qformer_output,
    )
    term = regularizer.take()
    term.total.backward()
    plain = model(input_ids=ids, point_clouds=clouds[:2], output_hidden_states=True)
    expected = alignment_loss(regularizer.projectors["2"](plain.hidden_states[2]), plain.points.qformer_output, mask)
    assert term.mean.item() == pytest.approx(expected.item(), abs=1e-6)
    assert output.points.qformer_output.shape == (2, 5, 24)
    # the point tokens' own path reaches the Q-Former, so compare with the gradient of a constant target
    found = gradients(model)
    model.zero_grad()
    model(
        input_ids=ids,
        point_clouds=clouds[:2],
        alignment_mask=mask,
        alignment_target=plain.points.qformer_output.detach().clone(),
    )
    regularizer.take().total.backward()
    assert_same_gradients(found, gradients(model), 1e-6)
