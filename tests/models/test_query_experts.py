"""Query experts: the golden outputs of all three routings, and each routing by hand at other sizes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pointalign.errors import ConfigError
from pointalign.importers import export, load_minigpt3d
from pointalign.models.connector import ConnectorConfig, QFormerConnector, build_connector
from pointalign.models.pointalign import PointAlignForConditionalGeneration

REFERENCE = Path(__file__).resolve().parents[2].parent / "shared" / "reference"
GOLDEN = REFERENCE / "query_experts"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden outputs (shared/reference) are not here")
TOLERANCE = 5e-6


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


def load(**options):
    """The published connector; the golden file leaves the language model out."""
    return load_minigpt3d(
        [GOLDEN / "checkpoint.safetensors"],
        language_model=REFERENCE / "alignment" / "phi_config.json",
        qformer=REFERENCE / "alignment" / "bert_config.json",
        tokenizer=REFERENCE / "alignment",
        num_groups=16,
        group_size=8,
        point_encoder_heads=4,
        allow_missing=["language_model."],
        **options,
    )


@needs_golden
@torch.no_grad()
def test_golden_outputs(expected):
    model = load().model
    points = model.encode_points(expected["points"])
    assert relative_error(model.connector.query_router(points.point_features), expected["router_logits"]) < TOLERANCE
    assert relative_error(points.qformer_output, expected["mixed_query_output_sparse"]) < TOLERANCE
    assert relative_error(points.point_tokens, expected["projector_output_sparse"]) < TOLERANCE


@needs_golden
@torch.no_grad()
@pytest.mark.parametrize("routing", ["sparse", "soft", "constant"])
def test_golden_routings_survive_saving(expected, routing, tmp_path):
    imported = load(routing=routing)
    export(imported, tmp_path / "model")
    model = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "model")
    tokens = model.encode_points(expected["points"]).point_tokens
    assert relative_error(tokens, expected[f"projector_output_{routing}"]) < TOLERANCE


def small_connector(**options):
    torch.manual_seed(0)
    config = ConnectorConfig(
        input_size=10,
        output_size=14,
        hidden_sizes=[9],
        num_query_tokens=5,
        projection_size=11,
        num_query_experts=4,
        router_hidden_size=6,
        qformer_config={
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "encoder_hidden_size": 8,
        },
        **options,
    )
    connector = build_connector(config).eval()
    torch.nn.init.normal_(connector.query_tokens)
    for parameter in connector.query_router.parameters():
        torch.nn.init.normal_(parameter)
    return connector


@torch.no_grad()
@pytest.mark.parametrize(
    ("routing", "chosen"), [("sparse", 1), ("sparse", 2), ("sparse", 3), ("soft", 2), ("constant", 2)]
)
def test_routing_equals_the_sum_over_experts(routing, chosen):
    connector = small_connector(routing=routing, num_chosen_experts=chosen)
    features = torch.randn(3, 7, 10)
    router_input = torch.cat([features[:, 0], features[:, 1:].max(dim=1).values], dim=1)
    weights = connector.query_router.mlp(router_input).softmax(dim=1)
    if routing == "sparse":
        kept = weights >= weights.sort(dim=1, descending=True).values[:, chosen - 1 : chosen]
        weights = weights * kept
    elif routing == "constant":
        weights = torch.full((3, 4), 0.25)
    encoded = connector.point_mlp(features)
    expected = sum(
        weights[:, expert, None, None]
        * connector.qformer(
            query_embeds=connector.query_tokens[expert].expand(3, -1, -1), encoder_hidden_states=encoded
        ).last_hidden_state
        for expert in range(4)
    )
    output = connector(features)
    torch.testing.assert_close(output.qformer_output, expected)
    torch.testing.assert_close(output.point_tokens, connector.language_projection(expected))


def test_sparse_routing_trains_router_and_chosen_experts():
    connector = small_connector(routing="sparse", num_chosen_experts=2)
    features = torch.randn(1, 7, 10)
    connector(features).point_tokens.square().sum().backward()
    chosen, _ = connector.query_router.choose(features)
    touched = connector.query_tokens.grad.flatten(1).abs().sum(dim=1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(chosen[0].tolist())
    assert connector.query_router.mlp[0].weight.grad.abs().sum() > 0


def test_one_set_needs_no_router():
    connector = build_connector(ConnectorConfig(input_size=10, output_size=14))
    assert isinstance(connector, QFormerConnector)
    assert connector.query_router is None
    assert connector.query_tokens.shape[0] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"routing": "random"}, "unknown routing 'random'"),
        ({"kind": "perceiver"}, "unknown connector kind"),
        ({"num_query_experts": 2, "num_chosen_experts": 3}, "cannot choose 3 of 2"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        ConnectorConfig(**options)
