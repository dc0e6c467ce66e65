"""PointLLM as published: every golden tensor, shards, its tokenizer's prompt, and the folder we write."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

from pointalign.errors import CheckpointError, ConfigError
from pointalign.importers import export, import_checkpoint, import_pointllm, load_pointllm
from pointalign.models.pointalign import PointAlignForConditionalGeneration

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "pointllm"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden outputs (shared/reference) are not here")

SIZES = {"num_groups": 16, "group_size": 8, "point_encoder_heads": 4, "num_points": 128}
TOLERANCE = 5e-6


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def imported():
    return load_pointllm(GOLDEN, **SIZES)


@pytest.fixture
def folder(tmp_path):
    """A published folder of our own, to change."""
    path = tmp_path / "published"
    path.mkdir()
    shutil.copyfile(GOLDEN / "config.json", path / "config.json")
    return path


def test_golden_outputs(imported, expected):
    model = imported.model
    with torch.no_grad():
        outputs = model(
            input_ids=expected["input_ids"],
            point_clouds=expected["points"],
            labels=expected["labels"],
            output_hidden_states=True,
        )
    # The golden file holds the first cloud's features.
    assert relative_error(outputs.points.point_features[:1], expected["point_encoder_output"]) < TOLERANCE
    assert relative_error(outputs.points.point_tokens[:1], expected["projector_output"]) < TOLERANCE
    assert outputs.points.qformer_output is None
    assert relative_error(outputs.hidden_states[3], expected["hidden_state_3"]) < TOLERANCE
    assert relative_error(outputs.logits, expected["logits"]) < TOLERANCE
    assert relative_error(outputs.loss, expected["loss_ntp"]) < TOLERANCE
    mask = expected["input_ids"] == model.config.point_token_id
    assert torch.equal(mask, expected["point_token_mask"].bool())


def test_greedy_answer(imported, expected):
    prompt = expected["input_ids"][:1, :30]
    ids = imported.model.generate(
        input_ids=prompt, point_clouds=expected["points"][:1], max_new_tokens=10, do_sample=False
    )
    assert ids[0, 30:].tolist() == expected["greedy_ids_0"].tolist()


def test_report_and_missing_tokenizer(imported):
    assert imported.report.summary() == {"loaded": 115, "missing": [], "left_over": []}
    assert imported.processor is None
    assert imported.alignment_projector is None


def test_saved_folder_gives_the_same_logits(imported, expected, tmp_path):
    export(imported, tmp_path / "out")
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = again(input_ids=expected["input_ids"], point_clouds=expected["points"]).logits
    assert relative_error(logits, expected["logits"]) < TOLERANCE


def test_shards_of_half_precision_pickles(folder, expected):
    state = {
        name: t.half() if t.is_floating_point() else t
        for name, t in load_file(GOLDEN / "checkpoint.safetensors").items()
    }
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, members in shards.items():
        torch.save({name: state[name] for name in members}, folder / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    model, _ = import_pointllm(folder, **SIZES)
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"], point_clouds=expected["points"]).logits
    assert relative_error(logits, expected["logits"]) < 1e-2
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="found no weights at"):
        import_pointllm(folder, **SIZES)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        import_pointllm(folder, **SIZES)


def test_prompt_of_a_folder_with_tokenizer(folder):
    shutil.copyfile(GOLDEN / "checkpoint.safetensors", folder / "model.safetensors")
    letters = dict.fromkeys(["<unk>", "<s>", "</s>", "▁", *map(chr, range(33, 127)), "\n"])
    tokenizer = LlamaTokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="does not know '<point_patch>'"):
        import_pointllm(folder, **SIZES)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<point_patch>", "<point_start>", "<point_end>"]})
    tokenizer.save_pretrained(folder)
    model, processor = import_pointllm(folder, **SIZES)
    messages = [
        {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "A chair."},
    ]
    segments = processor.render(messages)
    points = "<point_patch>" * 17
    assert segments[0].text.startswith("<s> A chat between a curious user")
    assert segments[0].text.endswith(f"USER: <point_start>{points}<point_end>\nWhat is this? ASSISTANT:")
    assert segments[1].text == " A chair.</s>"
    assert processor.encode(messages)["input_ids"].count(model.config.point_token_id) == 17


def test_other_folders_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_pointllm(folder, **SIZES)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="of type 'llama', not 'pointllm'"):
        import_pointllm(folder, **SIZES)
    with pytest.raises(ConfigError, match="one folder"):
        import_checkpoint("pointllm", ["a", "b"], tmp_path / "out")


def test_missing_tensor_is_named(folder, tmp_path):
    state = load_file(GOLDEN / "checkpoint.safetensors")
    del state["model.point_proj.2.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"nothing for connector\.language_projection\.2\.bias;"):
        import_checkpoint("pointllm", [str(folder)], tmp_path / "out", **SIZES)
    report = import_checkpoint("pointllm", [str(folder)], tmp_path / "out", allow_missing=["connector.*.bias"], **SIZES)
    assert report.missing == ["connector.language_projection.2.bias"]
