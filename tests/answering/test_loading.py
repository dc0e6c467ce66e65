"""Which model answers: names, what is fetched and said, devices and numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pointalign.answering import loading
from pointalign.answering.loading import fetch_model, load_answerer
from pointalign.errors import CheckpointError, ConfigError
from pointalign.models.checkpoint import resolve_model


def test_a_name_stands_for_a_folder_a_run_or_the_environment(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("POINTALIGN_MODEL", raising=False)
    assert resolve_model() == "household-135m"
    monkeypatch.setenv("POINTALIGN_MODEL", "from/environment")
    assert resolve_model() == "from/environment"
    assert resolve_model("from/argument") == "from/argument"
    assert resolve_model(tiny_model) == str(tiny_model)
    assert resolve_model(tiny_model.parent) == str(tiny_model)
    assert resolve_model(tmp_path) == str(tmp_path)


def test_the_model_in_use_is_said_once(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answerer = load_answerer(tiny_model, "cpu", "float32")
    said = capsys.readouterr()
    weights = sum(weight.numel() for weight in answerer.model.parameters())
    assert said.out == ""
    assert said.err == (
        f"model {tiny_model}: {weights / 1e6:.1f} million weights, {4 * weights / 1024:.1f} KiB, language model in float32, "
        f"on cpu; from {tiny_model.resolve()}\n"
    )


def test_adapters_are_merged_and_numbers_chosen(tmp_path: Path, tiny_model: Path, build_model: Any) -> None:
    model = build_model()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.language_model = get_peft_model(model.language_model, lora)
    shutil.copytree(tiny_model, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    answerer = load_answerer(tmp_path / "model", dtype=torch.bfloat16, device="cpu")
    assert not any("lora" in name for name in answerer.model.state_dict())
    assert answerer.model.language_model.dtype == torch.bfloat16
    assert answerer.model.get_decoder().rotary_emb.inv_freq.dtype == torch.float32
    assert next(answerer.model.point_encoder.parameters()).dtype == torch.float32
    assert not answerer.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu7"}, "cannot compute on device 'gpu7'"),
        ({"device": "cuda:99"}, "cannot compute on device 'cuda:99'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; give float32, bfloat16 or float16"),
        ({"dtype": "tensor"}, "unknown dtype 'tensor'"),
    ],
)
def test_unknown_devices_and_numbers_are_refused(tiny_model: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_answerer(tiny_model, **options)


def test_what_is_no_model_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"found no checkpoint 'nobody/nothing'"):
        fetch_model("nobody/nothing")
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        fetch_model(str(tmp_path))
    for text, message in (
        ('{"model_type": "llama"}', "holds a model of type 'llama', not pointalign"),
        ("[]", "holds a model of type None"),
        ("{", "cannot read .*config.json"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            fetch_model(str(tmp_path))


def test_what_is_fetched_is_said_before_with_its_size(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Hub is played by its own client's functions; the model it gives refers to a language model on the Hub."""
    shutil.copytree(tiny_model, tmp_path / "fetched")
    config = json.loads((tmp_path / "fetched" / "config.json").read_text())
    (tmp_path / "fetched" / "config.json").write_text(json.dumps({**config, "language_model": "someone/words"}))
    asked: list[tuple[str, Any]] = []

    def listed(repository: str, dry_run: bool, allow_patterns: Any, tqdm_class: Any) -> list[Any]:
        asked.append((repository, allow_patterns))
        sizes = {"someone/points": (3 << 20, 1 << 20, 500), "someone/words": (5 << 30, 100)}[repository]
        return [SimpleNamespace(file_size=size, will_download=size > 200) for size in sizes]

    def found(name: str) -> Path:
        assert asked, "fetched before it was said"
        return tmp_path / "fetched"

    monkeypatch.setattr(loading, "hub_is_off", lambda: False)
    monkeypatch.setattr(loading, "snapshot_download", listed)
    monkeypatch.setattr(loading, "find_checkpoint", found)
    fetch_model("someone/points")
    assert asked == [("someone/points", None), ("someone/words", ["*.safetensors", "*.json"])]
    assert capsys.readouterr().err.splitlines() == [
        "fetching someone/points from the Hub: 3 files, 4.0 MiB; they are kept for next time",
        "fetching someone/words from the Hub: 1 files, 5 GiB; they are kept for next time",
    ]
