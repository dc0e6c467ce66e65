"""The point encoder: its size, its symmetries, and its shortcut against the plainly written form."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from pointalign.errors import DataError
from pointalign.models.point_encoder import GroupEncoder, PointEncoder, PointEncoderConfig


def test_weights_at_paper_scale_by_hand():
    with torch.device("meta"):
        encoder = PointEncoder(PointEncoderConfig())
    group_encoder = (6 * 128 + 128) + 2 * 128 + (128 * 256 + 256) + (512 * 512 + 512) + 2 * 512 + (512 * 256 + 256)
    entrance = (256 * 384 + 384) + 2 * 384 + (3 * 128 + 128) + (128 * 384 + 384)
    block = 2 * 384 + 384 * 1152 + (384 * 384 + 384) + 2 * 384 + (384 * 1536 + 1536) + (1536 * 384 + 384)
    assert sum(p.numel() for p in encoder.group_encoder.parameters()) == group_encoder
    assert sum(p.numel() for p in encoder.parameters()) == group_encoder + entrance + 12 * block + 2 * 384 == 21_859_200
    assert encoder.blocks[0].qkv.bias is None
    assert encoder.config.num_tokens == 513


def plain_group_encoder(encoder, groups):
    """As the paper writes it: the group's maximum in front of each point's feature, then the next layer."""
    first = F.relu(encoder.norm1(encoder.linear1(groups).flatten(0, 2))).view(*groups.shape[:3], -1)
    local = encoder.linear2(first)
    pooled = local.max(dim=2, keepdim=True).values.expand_as(local)
    mixed = encoder.linear3(torch.cat([pooled, local], dim=-1))
    mixed = F.relu(encoder.norm3(mixed.flatten(0, 2))).view(*mixed.shape)
    return encoder.linear4(mixed).max(dim=2).values


@pytest.mark.parametrize("training", [False, True])
def test_group_encoder_equals_the_plainly_written_form(model, training):
    encoder: GroupEncoder = model.point_encoder.group_encoder.train(training)
    groups = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = plain_group_encoder(encoder, groups)
    torch.testing.assert_close(encoder(groups), wanted, rtol=1e-5, atol=1e-5)
    wanted.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in encoder.named_parameters()}
    encoder.zero_grad()
    encoder(groups).square().sum().backward()
    for name, p in encoder.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-4)


def test_group_feature_does_not_depend_on_the_order_of_its_points(model):
    encoder = model.point_encoder.group_encoder
    groups = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    shuffled = groups[:, :, torch.tensor([3, 0, 5, 1, 4, 2])]
    torch.testing.assert_close(encoder(shuffled), encoder(groups), rtol=1e-6, atol=1e-6)


def test_tokens_do_not_depend_on_the_order_of_points_after_the_first(model, clouds):
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(47, generator=torch.Generator().manual_seed(1))]
    )
    tokens = model.point_encoder(clouds)
    torch.testing.assert_close(model.point_encoder(clouds[:, order]), tokens, rtol=1e-5, atol=1e-5)
    assert (model.point_encoder(clouds.flip(1)) - tokens).abs().max() > 1e-2, "sampling starts at point 0"


def test_shapes_repeatability_and_batches(model, clouds):
    tokens = model.point_encoder(clouds)
    assert tokens.shape == (4, 9, 16)
    assert torch.equal(model.point_encoder(clouds), tokens)
    for cloud, row in zip(clouds, tokens, strict=True):
        torch.testing.assert_close(model.point_encoder(cloud[None])[0], row, rtol=1e-5, atol=1e-5)
    assert (tokens[0] - tokens[1]).abs().max() > 1e-2


def test_colour_and_position_both_matter(model, clouds):
    tokens = model.point_encoder(clouds)
    recoloured, moved = clouds.clone(), clouds.clone()
    recoloured[..., 3:] = 1 - recoloured[..., 3:]
    moved[..., :3] += 0.2  # groups are relative, so only the centres' positions change
    for changed in (recoloured, moved):
        assert (model.point_encoder(changed) - tokens).abs().max() > 1e-2


def test_positions_are_added_before_every_block(model, clouds):
    """The class token's position reaches the last block anew: moving it there alone changes the output."""
    encoder = model.point_encoder
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    encoder(clouds[:1])
    difference = seen[0][0][0, 0] - encoder.class_token[0, 0]
    torch.testing.assert_close(difference, encoder.class_position[0, 0], rtol=0, atol=1e-6)
    for (_, before), (entering, _) in pairwise(seen):
        torch.testing.assert_close((entering - before)[0, 0], encoder.class_position[0, 0], rtol=0, atol=1e-5)
        assert (entering - before)[0, 1:].abs().max() > 0.05


def test_new_encoders_start_with_small_random_tokens():
    torch.manual_seed(0)
    encoder = PointEncoder(PointEncoderConfig(num_hidden_layers=1, hidden_size=96))
    for token in (encoder.class_token, encoder.class_position):
        assert 0.01 < token.std() < 0.03
        assert token.abs().max() < 2


def test_too_few_points(model):
    with pytest.raises(DataError, match="cloud of 7"):
        model.point_encoder(torch.zeros(1, 7, 6))


def sized_encoder() -> PointEncoder:
    torch.manual_seed(0)
    config = PointEncoderConfig(
        num_groups=8, group_size=6, group_hidden_sizes=(8, 12, 16), group_width=10, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, position_hidden_size=8, metric_size=True,
    )  # fmt: skip
    return PointEncoder(config).eval()


def with_radius(clouds: torch.Tensor, *radii: float) -> torch.Tensor:
    column = torch.tensor(radii)[:, None, None].expand(-1, clouds.shape[1], 1)
    return torch.cat([clouds, column], dim=-1)


def test_the_radius_tells_clouds_of_one_shape_apart_and_zero_tells_nothing():
    encoder = sized_encoder()
    cloud = torch.rand(1, 40, 6).expand(4, -1, -1)
    small, large, unknown, again = encoder(with_radius(cloud, 0.1, 3.0, 0.0, 0.1))
    assert torch.equal(small, again)
    assert (small - large).abs().max() > 1e-3
    assert (small - unknown).abs().max() > 1e-3
    with torch.no_grad():
        encoder.size_embedding.mlp[2].weight.normal_()
    assert torch.equal(encoder(with_radius(cloud, 0.1, 3.0, 0.0, 0.1))[2], unknown), "unknown does not pass the MLP"


def test_an_unknown_radius_gives_what_an_encoder_without_sizes_gives():
    sized = sized_encoder()
    plain = PointEncoder(PointEncoderConfig(**{**sized.config.to_dict(), "metric_size": False})).eval()
    plain.load_state_dict({name: w for name, w in sized.state_dict().items() if not name.startswith("size_embedding.")})
    clouds = torch.rand(2, 40, 6)
    assert torch.equal(sized(with_radius(clouds, 0.0, 0.0)), plain(clouds))


def test_the_size_learns_from_known_clouds_alone():
    encoder = sized_encoder()
    encoder(with_radius(torch.rand(2, 40, 6), 0.0, 0.0)).sum().backward()
    assert all(not weight.grad.any() for weight in encoder.size_embedding.parameters())
    encoder(with_radius(torch.rand(2, 40, 6), 0.0, 0.5)).square().sum().backward()
    assert all(weight.grad.any() for weight in encoder.size_embedding.parameters())
