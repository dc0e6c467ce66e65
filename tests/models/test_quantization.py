"""A quantised language model: what becomes small, what trains, and that a saved folder gives the same model back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pointalign.config import LoraSettings, Recipe, from_dict
from pointalign.errors import ConfigError, MissingDependencyError
from pointalign.models import quantization
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.parts import add_lora, select_parts
from pointalign.runs import build_model, train, train_language

bitsandbytes: Any = pytest.importorskip("bitsandbytes")
IDS = torch.tensor([[10, *[259] * 5, 11, 12]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, build_model: Any) -> dict[str, Path]:
    """A model wide enough for blocks of 64 weights: all in one folder, and with its language model in another."""
    folder = tmp_path_factory.mktemp("models")
    model = build_model(hidden_size=64, intermediate_size=128)
    processor = load_processor(str(tiny_model))
    model.save_pretrained(folder / "whole")
    model.language_model.save_pretrained(folder / "language_model")
    model.config.language_model = str(folder / "language_model")
    model.save_pretrained(folder / "by reference")
    for name in ("whole", "by reference"):
        processor.save_pretrained(folder / name)
    return {name: folder / name for name in ("whole", "by reference")}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("place", ["whole", "by reference"])
@torch.no_grad()
def test_matrices_become_small_and_answers_stay_near(
    folders: dict[str, Path], clouds: torch.Tensor, kind: str, place: str
) -> None:
    folder = folders[place]
    plain = PointAlignForConditionalGeneration.from_pretrained(folder)
    model = PointAlignForConditionalGeneration.from_pretrained(folder, quantize=kind)
    sizes = {name: tensor.element_size() for name, tensor in model.named_parameters()}
    small = {name for name, size in sizes.items() if size == 1}
    assert len(small) == 4 * 7
    assert all(name.startswith("language_model.model.layers.") for name in small)
    given = {"input_ids": IDS, "point_clouds": clouds[:1]}
    expected, logits = plain(**given).logits, model(**given).logits
    apart = (logits - expected).norm() / expected.norm()
    assert 0 < apart < (0.5 if kind == "nf4" else 0.05)


@pytest.mark.parametrize("place", ["whole", "by reference"])
def test_a_run_on_four_bits_gives_its_model_back(
    folders: dict[str, Path], clouds: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    trained: list[Any] = []

    def watched(recipe: Any, run: Any, model: Any, processor: Any) -> Any:
        trained.append(model)
        return train_language(recipe, run, model, processor)

    monkeypatch.setattr("pointalign.runs.train_language", watched)
    start = folders[place]
    values = {
        "model": {"start_from": str(start), "quantize": "nf4"},
        "lora": {"rank": 2, "alpha": 4},
        "data": {"fraction": 0.02, "max_length": 1500, "sets": [{"types": ["single_round"], "batch_size": 2}]},
        "alignment": {"weight": 0.5, "layers": [2]},
        "optimizer": {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0},
        "precision": "fp32",  # in bfloat16 the trained model's frozen head is rounded, the loaded one's is not
        "report_to": [],
    }
    train(from_dict(Recipe, values, "test"), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    model = trained[0].eval()
    again = PointAlignForConditionalGeneration.from_pretrained(folder)
    assert again.config.quantize == "nf4"
    again.merge_adapters()  # as answering does: the adapter stays beside four bits
    given = {"input_ids": IDS, "point_clouds": clouds[:1]}
    with torch.no_grad():
        expected, logits = model(**given).logits, again(**given).logits
        before = PointAlignForConditionalGeneration.from_pretrained(start, quantize="nf4")(**given).logits
    torch.testing.assert_close(logits, expected)
    assert (before - expected).norm() > 0.01 * expected.norm()
    if place == "whole":
        kept, first = (load_file(path / "model.safetensors") for path in (folder, start))
        assert {name for name in kept if name.startswith("language_model.")} == {
            name for name in first if name.startswith("language_model.")
        }
        assert all(torch.equal(kept[name], tensor) for name, tensor in first.items())


def test_gradients_pass_through_four_bits(folders: dict[str, Path]) -> None:
    """They are those of the rounded weights in full, also after the model has answered something in between."""
    load, ids = PointAlignForConditionalGeneration.from_pretrained, torch.arange(10, 40)[None]
    rounded, fresh, used = load(folders["whole"]), *(load(folders["whole"], quantize="nf4") for _ in range(2))
    gradients = []
    with torch.no_grad():
        for name, module in fresh.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                rounded.get_submodule(name).weight.copy_(whole)
        used.eval()(input_ids=ids)
    for model in (rounded, fresh, used):
        torch.manual_seed(0)
        add_lora(model, LoraSettings(rank=2, target_modules=["q_proj", "down_proj"], dropout=0.0), train_norms=True)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None and ".0." in name]
        gradients.append(torch.cat(found))
    torch.testing.assert_close(gradients[2], gradients[1])
    assert torch.cosine_similarity(gradients[1], gradients[0], dim=0) > 0.99


def test_what_cannot_be(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build_model(
        from_dict(Recipe, {"model": {"start_from": str(tiny_model), "quantize": "nf4"}}, "").model, ()
    )
    with pytest.raises(ConfigError, match=r"trains: language_model is quantised and cannot train"):
        select_parts(model, ["language_model"])
    with pytest.raises(ConfigError, match="unknown quantisation 'q4'; choose nf4 or int8"):
        PointAlignForConditionalGeneration.from_pretrained(tiny_model, quantize="q4")
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'needs bitsandbytes; run `pip install "pointalign\[quantize\]"`'):
        quantization.quantization_config("nf4")
