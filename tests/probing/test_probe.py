"""The layers' reader on our model and on a LLaVA, and `pointalign probe` from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from pointalign.cli import main
from pointalign.data.household import load_household
from pointalign.errors import ConfigError, DataError
from pointalign.models.processing import PointAlignProcessor
from pointalign.probing.features import read_point_tokens
from pointalign.probing.probes import Outcome
from pointalign.probing.run import ProbedModel, _differences, short_names
from pointalign.probing.targets import make_targets

IMAGE = 90


def by_hand(model: Any, inputs: dict[str, Any], mask: torch.Tensor, num_tokens: int) -> list[torch.Tensor]:
    """The tokens (clouds, num_tokens, D) of every layer from transformers' own hidden states; the last is normed there."""
    with torch.inference_mode():
        states = model(**inputs, output_hidden_states=True).hidden_states
    return [state[mask].view(-1, num_tokens, state.shape[-1]) for state in states]


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("side", ["left", "right"])
def test_our_layers(model: Any, processor: Any, clouds: torch.Tensor, side: str) -> None:
    cloud = {"type": "point_cloud"}
    turns = [
        [{"role": "user", "content": [{"type": "text", "text": "Look: "}, cloud, {"type": "text", "text": "So?"}]}],
        [{"role": "user", "content": [cloud, cloud]}],
    ]
    inputs = dict(processor.apply_chat_template(turns, points=list(clouds[:3]), padding_side=side))
    mask = inputs["input_ids"] == model.config.point_token_id
    before = hooks_of(model)
    means, tokens = read_point_tokens(model, inputs, mask, 5, sampled=[0, 3])
    assert hooks_of(model) == before, "nothing of the reader stays"
    expected = by_hand(model, inputs, mask, 5)
    assert means.shape == (3, 5, 32)
    for layer in range(4):
        torch.testing.assert_close(means[:, layer], expected[layer].mean(dim=1))
        torch.testing.assert_close(tokens[:, layer], expected[layer][:, [0, 3]])
    normed = model.language_model.model.norm(tokens[:, 4])
    torch.testing.assert_close(normed, expected[4][:, [0, 3]], atol=1e-4, rtol=1e-4)


def test_a_llavas_layers() -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3}
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=100, num_attention_heads=2, num_key_value_heads=1, **small),
        vision_config=CLIPVisionConfig(**small, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    llava = LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, *[IMAGE] * 4, 6, 7], [*[IMAGE] * 4, 8, 9, 10]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}
    means, tokens = read_point_tokens(llava, inputs, ids == IMAGE, 4)
    assert tokens.shape == (2, 4, 0, 24)
    expected = by_hand(llava, inputs, ids == IMAGE, 4)
    for layer in range(3):
        torch.testing.assert_close(means[:, layer], expected[layer].mean(dim=1))


def test_placeholders_that_are_not_whole_clouds(model: Any) -> None:
    ids = torch.full((1, 7), 259)
    with pytest.raises(DataError, match=r"\[7\] placeholders are not whole clouds of 5 tokens"):
        read_point_tokens(model, {"input_ids": ids}, ids == 259, 5)


def test_targets_of_a_box() -> None:
    objects = [thing for split in ("train", "test") for thing in load_household(split)[:30]]
    targets = make_targets(objects)
    extents = np.ptp(objects[7].points[:, :3], axis=0)
    np.testing.assert_allclose(targets.box[7], np.log(extents / extents.prod() ** (1 / 3)), atol=1e-5)
    np.testing.assert_allclose(targets.heights.sum(axis=1), 1)
    y = objects[7].points[:, 1]
    assert targets.heights[7, 0] == pytest.approx((y < y.min() + (y.max() - y.min()) / 4).mean(), abs=1e-3)
    assert targets.scored.tolist() == list(range(30, 60))
    crossed = make_targets(objects, 3)
    assert sorted(crossed.scored.tolist()) == list(range(60))
    for fitted, scored in crossed.folds:
        assert not {objects[i].family for i in fitted} & {objects[i].family for i in scored}


def test_names_that_tell_models_apart() -> None:
    assert short_names(["/x/demo/baseline/model", "/x/demo/aligned/model"]) == ["baseline", "aligned"]
    assert short_names(["hub/one"]) == ["hub/one"]
    assert short_names(["a", "a/b"]) == ["a", "a/b"]
    with pytest.raises(ConfigError, match="m is named twice"):
        short_names(["a", "m", "m"])


def test_scores_against_other_targets_are_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    def probed(groups: float) -> Any:
        lost, whole = np.array([0.2, 0.4, 0.1]), np.ones(3)
        outcomes = {"box_r2": Outcome(lost, whole), "group_r2": Outcome(lost * groups, whole * groups)}
        space = SimpleNamespace(kernel=np.full((2, 2), groups))
        return ProbedModel([outcomes], outcomes, [], space, {})  # pyright: ignore[reportArgumentType]

    assert _differences([probed(1.0), probed(2.0)], 0).keys() == {"box_r2"}  # pyright: ignore[reportOptionalMemberAccess]
    assert "against different targets by group_r2" in capsys.readouterr().err


def test_one_model_in_two_spellings_is_named_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "b").symlink_to("runs/a")
    for other in ("runs/a/", "./runs/a", "b"):
        with pytest.raises(ConfigError, match="runs/a is named twice; name different models"):
            short_names(["runs/a", other])


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., Any], build_tokenizer: Callable[..., Any]
) -> dict[str, Path]:
    """Two Q-Former models, the second with another language model, and one with an MLP."""
    found = {}
    for name, kind, seed in (("first", "qformer", 0), ("second", "qformer", 1), ("mlp", "mlp", 0)):
        model = build_model(seed, kind=kind)
        if found:
            model.point_encoder.load_state_dict(build_model(0, kind=kind).point_encoder.state_dict())
        found[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(found[name])
        PointAlignProcessor(
            build_tokenizer(), num_points=48, num_point_tokens=model.config.num_point_tokens, min_points=8
        ).save_pretrained(found[name])
    return found


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "probing-cache"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["probe", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_two_models(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = ["--model", str(models["first"]), "--model", str(models["second"]), "--limit", "24"]
    status, out, err = run(capsys, *both, "--out", str(tmp_path / "one"))
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["n"], told["k"], told["scored_on"]) == (24, 1, "held-out objects")
    result = json.loads((tmp_path / "one" / "probe.json").read_text())
    assert len(result["models"]) == 2
    for measures in result["models"].values():
        assert set(measures) == {"knn_class", "linear_class", "linear_color", "box_r2", "heights_r2", "cknna"}
        for measure, rows in measures.items():
            assert [row["layer"] for row in rows] == [0, 1, 2, 3, 4]
            for row in rows:
                low, high = row["interval"]
                assert low <= row["raw" if measure == "cknna" else "value"] <= high
    assert set(result["difference"]) == {"knn_class", "linear_class", "linear_color", "box_r2", "heights_r2", "cknna"}
    assert (tmp_path / "one" / "probe.png").stat().st_size > 20_000
    monkeypatch.setattr("pointalign.probing.features._compute", lambda *given: pytest.fail("read again"))
    status, *_ = run(capsys, *both, "--out", str(tmp_path / "two"))
    assert status == 0
    assert json.loads((tmp_path / "two" / "probe.json").read_text())["models"] == result["models"]


def test_an_mlps_tokens_tell_where_their_groups_lie(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(models["mlp"]), "--limit", "24", "--out", str(tmp_path), "--folds", "3", "--k", "3"]
    status, out, err = run(capsys, *arguments)
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    assert (told["n"], told["scored_on"]) == (48, "3 folds over all objects")
    result = json.loads((tmp_path / "probe.json").read_text())
    assert result["difference"] is None
    [measures] = result["models"].values()
    # Each group's position enters its token, which no training has mixed away yet: the decoding cannot be chance.
    assert measures["group_r2"][0]["interval"][0] > 0.3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "M", "--model", "M"], "is named twice"),
        (["--model", "M", "--k", "0"], "--k and --batch-size are 1 or more"),
        (["--model", "M", "--limit", "3", "--k", "4"], "--k 4 is more than the objects"),
        (["--model", "M", "--limit", "0"], "--limit 0 leaves no object; give 1 or more"),
        (["--model", "M", "--folds", "9000"], "cannot part"),
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_bad_input(
    models: dict[str, Path], arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(models["first"]) if argument == "M" else argument for argument in arguments]
    status, out, err = run(capsys, *given, "--out", str(tmp_path / "out"))
    assert (status, out) == (1, "")
    assert told in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
