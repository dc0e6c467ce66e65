"""Who trains, how fast, and what of it is kept. The whole run has its own test."""

import copy
import dataclasses

import pytest
import torch
from peft import PeftModel

from pointalign.config import (
    AlignmentSettings,
    LoraSettings,
    OptimizerSettings,
    QFormerLoraSettings,
    QueryExpertSettings,
    Recipe,
)
from pointalign.errors import ConfigError
from pointalign.parts import (
    PARTS,
    add_lora,
    add_qformer_lora,
    norm_modules,
    prepare_parts,
    select_parts,
    set_query_experts,
)
from pointalign.recipe_trainer import learning_rate_at, parameter_groups, trained_state, walked_once
from pointalign.training import alignment_target, build_regularizer


@pytest.fixture
def adapted(model):
    add_lora(model, LoraSettings(rank=2, target_modules=["q_proj"]), train_norms=True)
    return model


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def count(model, prefix):
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(prefix))


def test_lora_and_norms_are_those_of_the_language_model(adapted):
    assert isinstance(adapted.language_model, PeftModel)
    wrapped = adapted.language_model
    add_lora(adapted, LoraSettings(rank=7), train_norms=False)
    assert adapted.language_model is wrapped, "a model that has a LoRA keeps it"
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (2, 16, 0.05, "CAUSAL_LM")
    # two norms in each of 4 blocks and the last one
    assert sum(".modules_to_save." in name for name, _ in adapted.named_parameters()) == 9


def test_all_linear_leaves_the_head_and_the_point_side_alone(model):
    add_lora(model, LoraSettings(rank=2), train_norms=False)
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_" in name}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(name.startswith("language_model.") for name, _ in model.named_parameters() if ".lora_" in name)


def test_norms_are_found_by_shape(model):
    assert norm_modules(model.language_model) == [
        *(f"model.layers.{i}.{name}" for i in range(4) for name in ("input_layernorm", "post_attention_layernorm")),
        "model.norm",
    ]
    assert "blocks.0.norm1" in norm_modules(model.point_encoder)


def test_new_lora_changes_nothing(model, clouds):
    ids = torch.tensor([[10, *[259] * 5, 11]])
    before = model(input_ids=ids, point_clouds=clouds[:1]).logits
    add_lora(model, LoraSettings(rank=2), train_norms=True)
    model.eval()
    assert torch.equal(model(input_ids=ids, point_clouds=clouds[:1]).logits, before)


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (["point_encoder"], ["point_encoder."]),
        (["point_mlp"], ["connector.point_mlp."]),
        (["query_tokens"], ["connector.query_tokens"]),
        (["qformer"], ["connector.qformer."]),
        (["language_projection"], ["connector.language_projection."]),
        (["connector"], ["connector."]),
        (["point_mlp", "language_projection"], ["connector.point_mlp.", "connector.language_projection."]),
        (["point_mlp", "connector"], ["connector."]),
    ],
)
def test_parts_by_name(adapted, names, prefixes):
    counts = select_parts(adapted, names)
    assert trained(adapted) == {n for n, _ in adapted.named_parameters() if n.startswith(tuple(prefixes))}
    assert sum(counts.values()) == sum(count(adapted, prefix) for prefix in prefixes)
    assert list(counts) == names
    if names == ["point_mlp", "connector"]:
        assert counts["point_mlp"] == count(adapted, "connector.point_mlp.")


def test_parts_of_the_language_model(adapted):
    counts = select_parts(adapted, ["language_model_lora", "language_model_norms"])
    assert counts == {"language_model_lora": 4 * 2 * (32 + 32), "language_model_norms": 9 * 32}
    assert trained(adapted) == {n for n, _ in adapted.named_parameters() if ".lora_" in n or ".modules_to_save." in n}
    counts = select_parts(adapted, ["qformer_norms"])
    assert trained(adapted) == {
        n for n, _ in adapted.named_parameters() if n.startswith("connector.qformer.") and "orm.weight" in n
    }
    assert counts["qformer_norms"] % 24 == 0
    assert counts["qformer_norms"] > 0


def test_selecting_again_freezes_what_trained_before(adapted):
    select_parts(adapted, ["connector"])
    select_parts(adapted, ["query_tokens"])
    assert trained(adapted) == {"connector.query_tokens"}


def test_trained_weights_are_float32_and_frozen_ones_stay(adapted):
    adapted.to(torch.bfloat16)
    select_parts(adapted, ["language_model_lora", "query_tokens"])
    for name, p in adapted.named_parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name


def test_parts_that_are_not_there(model, build_model):
    with pytest.raises(ConfigError, match=r"unknown part 'lora'; known are point_encoder, point_mlp"):
        select_parts(model, ["lora"])
    with pytest.raises(ConfigError, match="no weights in language_model_lora, query_router"):
        select_parts(model, ["language_model_lora", "point_mlp", "query_router"])
    with pytest.raises(ConfigError, match="no weights in qformer"):
        select_parts(build_model(kind="mlp"), ["qformer"])


def test_every_part_is_a_part_of_some_model(adapted):
    names = [name for name, _ in adapted.named_parameters()]
    for part in set(PARTS) - {"qformer_lora", "query_router", "query_experts"}:
        assert any(map(PARTS[part], names)), part


# Parts that a recipe makes


def test_a_new_qformer_lora(model, clouds):
    before = model.encode_points(clouds).qformer_output
    counts = prepare_parts(model, Recipe(trains=["qformer_lora", "qformer_norms"]))
    names = trained(model)
    wrapped = model.connector.qformer
    assert isinstance(wrapped, PeftModel)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names if ".lora_" in name} == {
        "query",
        "key",
        "value",
    }
    # rank 8: two matrices for each of 3 linears, 4 blocks of self-attention (24 wide), 2 of cross-attention (key, value of 18)
    assert counts["qformer_lora"] == 8 * (4 * 3 * 48 + 2 * (48 + 2 * 42))
    # weights, not biases: the first norm, 4 + 2 after attention, 4 after the MLPs
    assert counts["qformer_norms"] == 24 * (1 + 4 + 2 + 4)
    norms = {name for name in names if ".lora_" not in name}
    assert all(".modules_to_save.default." in name and name.endswith("weight") for name in norms)
    assert torch.equal(model.eval().encode_points(clouds).qformer_output, before), "a new LoRA changes nothing"
    add_qformer_lora(model, QFormerLoraSettings(rank=3), train_norms=False)
    assert model.connector.qformer is wrapped, "a Q-Former that has a LoRA keeps it"


def test_norms_of_the_qformer_alone_train_in_place(model):
    prepare_parts(model, Recipe(trains=["qformer_norms"]))
    assert not isinstance(model.connector.qformer, PeftModel)
    assert len(trained(model)) == 11


@torch.no_grad()
def test_only_the_dropout_of_a_trained_lora_is_awake(build_model, clouds):
    """The Q-Former's own dropout rests under its LoRA; a LoRA that does not train rests too."""
    model = build_model(qformer_dropout=0.5)
    prepare_parts(model, Recipe(trains=["qformer_lora", "qformer_norms"]))
    model.train()
    awake = {
        name.partition(".lora_dropout")[1] for name, part in model.connector.qformer.named_modules() if part.training
    }
    assert awake == {".lora_dropout"}
    still = model.encode_points(clouds).qformer_output
    assert torch.equal(model.encode_points(clouds).qformer_output, still), "its B is zero, so nothing shows yet"
    for name, weight in model.connector.named_parameters():
        if ".lora_B." in name:
            weight.fill_(0.3)
    assert not torch.equal(model.encode_points(clouds).qformer_output, model.encode_points(clouds).qformer_output)
    select_parts(model, ["point_mlp", "query_tokens"])
    model.train()
    still = model.encode_points(clouds).qformer_output
    assert torch.equal(model.encode_points(clouds).qformer_output, still)
    select_parts(model, ["qformer"])
    model.train()
    assert model.connector.qformer.base_model.model.encoder.layer[0].output_query.dropout.training
    model.eval()
    assert not any(part.training for part in model.modules())


@torch.no_grad()
def test_query_experts_begin_as_the_trained_queries(model, clouds):
    queries = model.connector.query_tokens.clone()
    before = model.encode_points(clouds).qformer_output
    torch.manual_seed(1)
    recipe = Recipe(trains=["query_tokens", "query_router"], query_experts=QueryExpertSettings(count=4, noise=0.1))
    counts = prepare_parts(model, recipe)
    experts = model.connector.query_tokens
    assert torch.equal(experts[0], queries[0])
    noise = experts[1:] - queries
    assert noise.std() == pytest.approx(0.1, rel=0.2)
    assert counts == {"query_tokens": 4 * 5 * 24, "query_router": 32 * 256 + 256 + 256 * 4 + 4}
    config = model.config.connector_config
    assert (config.num_query_experts, config.num_chosen_experts, config.routing) == (4, 2, "sparse")
    with pytest.raises(ConfigError, match="cannot make 3 sets of queries of 4"):
        set_query_experts(model, QueryExpertSettings(count=3))
    set_query_experts(model, QueryExpertSettings(count=4, routing="constant"))
    assert torch.equal(model.connector.query_tokens, experts), "experts that are there stay"
    experts[1:] = experts[:1]
    torch.testing.assert_close(model.encode_points(clouds).qformer_output, before)


@torch.no_grad()
def test_the_routing_is_a_setting(model, clouds):
    with pytest.raises(ConfigError, match=r"one set of queries, so nothing is routed; set its count too"):
        set_query_experts(model, QueryExpertSettings(routing="soft"))
    set_query_experts(model, QueryExpertSettings(count=4, noise=1.0))
    outputs = {}
    for routing in ("sparse", "soft", "constant"):
        set_query_experts(model, QueryExpertSettings(routing=routing))
        outputs[routing] = model.encode_points(clouds).qformer_output
    assert not torch.allclose(outputs["sparse"], outputs["soft"])
    assert not torch.allclose(outputs["constant"], outputs["soft"])
    set_query_experts(model, QueryExpertSettings(routing="sparse", num_chosen=4))
    torch.testing.assert_close(model.encode_points(clouds).qformer_output, outputs["soft"])
    with pytest.raises(ConfigError, match=r"num_chosen is 1 to 4 for this model; got 5"):
        set_query_experts(model, QueryExpertSettings(num_chosen=5))


def test_what_needs_a_qformer(build_model):
    model = build_model(kind="mlp")
    with pytest.raises(ConfigError, match="trains: qformer_lora needs a Q-Former"):
        prepare_parts(model, Recipe(trains=["qformer_lora"]))
    with pytest.raises(ConfigError, match="query_experts needs a Q-Former"):
        prepare_parts(model, Recipe(trains=["connector"], query_experts=QueryExpertSettings(count=8)))


# The schedule

PAPER = OptimizerSettings()


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-7),
        (250, 1e-7 + 2.9e-6 / 4),
        (500, 1.55e-6),
        (999, 3e-6 - 2.9e-9),
        (1000, 3e-6),
        (3250, 1e-7 + 2.9e-6 * (2 + 2**0.5) / 4),
        (5500, 1.55e-6),
        (7750, 1e-7 + 2.9e-6 * (2 - 2**0.5) / 4),
        (10_000, 1e-7),
        (12_000, 1e-7),
    ],
)
def test_the_papers_schedule_by_hand(step, rate):
    assert learning_rate_at(step, PAPER) == pytest.approx(rate, rel=1e-9)


def test_schedules_without_warm_up_or_without_cosine():
    assert learning_rate_at(0, dataclasses.replace(PAPER, warmup_steps=0)) == pytest.approx(3e-6)
    short = dataclasses.replace(PAPER, max_steps=5, warmup_steps=5)
    assert learning_rate_at(5, short) == pytest.approx(3e-6)
    rates = [learning_rate_at(step, PAPER) for step in range(10_001)]
    assert rates[:1001] == sorted(rates[:1001])
    assert rates[1000:] == sorted(rates[1000:], reverse=True)


def test_parameter_groups(adapted):
    select_parts(adapted, ["language_model_lora", "language_model_norms", "language_projection", "query_tokens"])
    decayed, plain = parameter_groups(adapted, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    by_id = {id(p): name for name, p in adapted.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    found = [by_id[id(p)] for group in (decayed, plain) for p in group["params"]]
    assert sorted(found) == sorted(trained(adapted))
    assert "connector.language_projection.0.weight" in {by_id[id(p)] for p in decayed["params"]}
    assert "connector.language_projection.0.bias" in {by_id[id(p)] for p in plain["params"]}


def test_trained_state_is_what_trains_and_its_statistics(adapted):
    select_parts(adapted, ["language_model_lora"])
    assert set(trained_state(adapted)) == trained(adapted)
    select_parts(adapted, ["point_encoder"])
    state = trained_state(adapted)
    buffers = {
        f"point_encoder.group_encoder.norm{i}.{name}"
        for i in (1, 3)
        for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert set(state) == trained(adapted) | buffers
    whole = adapted.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, whole[name]), name
        assert not tensor.requires_grad


def test_a_regulariser_in_the_model_is_saved_with_it(adapted):
    select_parts(adapted, ["language_model_lora"])
    build_regularizer(adapted, AlignmentSettings(weight=0.1, layers=[2]), seed=1)
    extra = set(trained_state(adapted)) - {n for n in trained(adapted) if ".lora_" in n}
    assert len(extra) == 6
    assert all(name.startswith("alignment_regularizer.projectors.2.") for name in extra)


# Targets


def test_targets_by_name(model, clouds):
    points = model.encode_points(clouds)
    assert torch.equal(alignment_target(points, "qformer", 5), points.qformer_output)
    assert torch.equal(alignment_target(points, "projector", 5), points.point_tokens)
    features = points.point_features
    pooled = alignment_target(points, "point_encoder", 4)
    wanted = torch.stack([features[:, 1 + 2 * i : 3 + 2 * i].mean(dim=1) for i in range(4)], dim=1)
    torch.testing.assert_close(pooled, wanted)
    assert torch.equal(alignment_target(points, "point_encoder", 9), features)
    cached = {"qformer_output": points.qformer_output}
    assert torch.equal(alignment_target(cached, "qformer", 5), points.qformer_output)
    with pytest.raises(ConfigError, match="no qformer output"):
        alignment_target({}, "qformer", 5)


def test_the_regulariser_of_a_recipe(model, build_model):
    assert build_regularizer(model, AlignmentSettings(weight=0.0), 0) is None
    for target, width in (("qformer", 24), ("point_encoder", 16), ("projector", 32)):
        settings = AlignmentSettings(weight=0.3, layers=[1, 3], target=target, depth=2, loss="l1")
        regularizer = build_regularizer(model, settings, 0)
        assert regularizer.current_weight == 0.3
        assert regularizer.loss == "l1"
        assert set(regularizer.projectors) == {"1", "3"}
        assert regularizer.projectors["1"].layers[0].in_features == 32
        assert regularizer.projectors["1"].layers[-1].out_features == width
        regularizer.detach()
    with pytest.raises(ConfigError, match="choose 1 to 4"):
        build_regularizer(model, AlignmentSettings(weight=0.1), 0)
    with pytest.raises(ConfigError, match=r"alignment\.target qformer needs a Q-Former"):
        build_regularizer(build_model(kind="mlp"), AlignmentSettings(weight=0.1, layers=[2]), 0)


def test_a_lora_that_is_there_goes_on_and_says_so(adapted, capsys):
    add_lora(adapted, LoraSettings(rank=2, target_modules=["q_proj"]), train_norms=True)
    assert capsys.readouterr().err == ""
    add_lora(adapted, LoraSettings(rank=64), train_norms=True)
    assert "has a LoRA already (rank 2, alpha 16, dropout 0.05)" in capsys.readouterr().err
    assert adapted.language_model.peft_config["default"].r == 2


def test_a_model_that_is_walked_once_is_as_ever(adapted):
    names = [name for name, _ in adapted.named_parameters()]
    count = adapted.num_parameters(exclude_embeddings=True)
    adapted.eval()
    with walked_once(adapted):
        assert [id(p) for p in adapted.parameters()] == [id(p) for _, p in adapted.named_parameters()]
        assert list(adapted.parameters(recurse=False)) == []
        assert adapted.num_parameters(exclude_embeddings=True) == count < adapted.num_parameters()
        dropout = next(m for n, m in adapted.named_modules() if "lora_dropout" in n)
        for _ in range(2):
            assert adapted.train() is adapted
            assert adapted.training
            assert dropout.training
            assert not adapted.eval().training
            assert not dropout.training
        adapted.train()
        dropout.eval()  # by a callback, say
        assert adapted.train() is adapted
        assert dropout.training
        twin = copy.deepcopy(adapted)
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in adapted.parameters()}
        assert [id(p) for p in twin.parameters()] == [id(p) for _, p in twin.named_parameters()]
        assert not twin.eval().training
        assert adapted.training
    assert not {"parameters", "train", "num_parameters"} & adapted.__dict__.keys()
    assert [name for name, _ in adapted.named_parameters()] == names
