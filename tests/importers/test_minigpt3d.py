"""MiniGPT-3D and PointAlign as published: every golden tensor, stacks of partial files, and the folder we write."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from pointalign.alignment import AlignmentRegularizer, alignment_loss
from pointalign.config import load_recipe
from pointalign.data.conversations import Collator, ConversationDataset, read_conversations
from pointalign.errors import CheckpointError, ConfigError
from pointalign.importers import export, import_checkpoint, import_minigpt3d, load_minigpt3d
from pointalign.importers.minigpt3d import fuse_query_key_value
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.parts import prepare_parts
from pointalign.released import (
    released_alignment_mask,
    released_messages,
    released_question,
    with_released_prompt,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT.parent / "shared" / "reference" / "alignment"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden outputs (shared/reference) are not here")

SIZES = {"num_groups": 16, "group_size": 8, "point_encoder_heads": 4, "lora_alpha": 16, "num_points": 128}
PARTS = {"language_model": str(GOLDEN / "phi_config.json"), "qformer": str(GOLDEN / "bert_config.json")}
TOLERANCE = 5e-6


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def load(*files, **options):
    return load_minigpt3d(
        files or [GOLDEN / "checkpoint.safetensors"], tokenizer=GOLDEN, **{**PARTS, **SIZES, **options}
    )


@pytest.fixture(scope="module")
def expected():
    return load_file(GOLDEN / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint():
    return load_file(GOLDEN / "checkpoint.safetensors")


@pytest.fixture(scope="module")
def imported():
    return load()


@pytest.fixture(scope="module")
def batch(imported):
    """The training batch, as our processor writes it."""
    inputs = json.loads((GOLDEN / "inputs.json").read_text())
    encoded = [
        imported.processor.encode(
            [
                {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer},
            ]
        )
        for question, answer in zip(inputs["question"], inputs["answer"], strict=True)
    ]
    ids = [row["input_ids"] for row in encoded]
    return {
        "input_ids": imported.processor.pad(ids, side="right"),
        "attention_mask": imported.processor.pad([[1] * len(row) for row in ids], "right", 0),
        "labels": imported.processor.pad([row["labels"] for row in encoded], "right", -100),
    }


@pytest.fixture(scope="module")
def outputs(imported, batch, expected):
    with torch.no_grad():
        return imported.model(**batch, point_clouds=expected["points"], output_hidden_states=True)


def test_batch_is_the_published_one(imported, batch, expected):
    assert torch.equal(batch["labels"], expected["labels"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    mask = batch["input_ids"] == imported.model.config.point_token_id
    assert torch.equal(mask, expected["point_token_mask"].bool())


def test_everything_before_the_language_model(imported, batch, outputs, expected):
    points = outputs.points
    assert relative_error(points.point_features, expected["point_encoder_output"]) < TOLERANCE
    mlp_output = imported.model.connector.point_mlp(points.point_features)
    assert relative_error(mlp_output, expected["point_mlp_output"]) < TOLERANCE
    assert relative_error(points.qformer_output, expected["qformer_output"]) < TOLERANCE
    assert relative_error(points.point_tokens, expected["projector_output"]) < TOLERANCE
    embeds = imported.model.embed_inputs(batch["input_ids"], points.point_tokens)
    assert relative_error(embeds, expected["inputs_embeds"]) < TOLERANCE


def test_language_model(outputs, expected):
    assert relative_error(outputs.hidden_states[15], expected["hidden_state_15"]) < TOLERANCE
    assert relative_error(outputs.hidden_states[-1], expected["hidden_state_last"]) < TOLERANCE
    assert relative_error(outputs.logits, expected["logits"]) < TOLERANCE
    assert relative_error(outputs.loss, expected["loss_ntp"]) < TOLERANCE


def test_alignment_losses(imported, batch, outputs, expected):
    with torch.no_grad():
        projected = imported.alignment_projector(outputs.hidden_states[15])
    point_rows = projected[expected["point_token_mask"].bool()].view_as(expected["alignment_projected"])
    assert relative_error(point_rows, expected["alignment_projected"]) < TOLERANCE
    ours = alignment_loss(projected, outputs.points.qformer_output, expected["point_token_mask"])
    assert relative_error(ours, expected["loss_align_point_tokens"]) < TOLERANCE
    mask = released_alignment_mask(batch["labels"], imported.model.config.num_point_tokens)
    assert torch.equal(mask, expected["released_span_mask"].bool())
    released = alignment_loss(projected, outputs.points.qformer_output, mask)
    assert relative_error(released, expected["loss_align_released"]) < TOLERANCE


def test_gradients_of_the_released_loss(batch, expected):
    imported = load()
    model, projector = imported.model, imported.alignment_projector
    regularizer = AlignmentRegularizer(32, 48)
    regularizer.projectors["15"] = projector
    regularizer.attach(model)
    mask = released_alignment_mask(batch["labels"], model.config.num_point_tokens)
    loss = model(
        **batch,
        point_clouds=expected["points"],
        alignment_mask=mask,
        alignment_target=lambda output: output.points.qformer_output,
    ).loss
    term = regularizer.take()
    loss = loss + term.weight * term.mean
    loss.backward()
    assert relative_error(loss.detach(), expected["loss_total_released"]) < TOLERANCE
    first = projector.layers[0].weight.grad
    assert relative_error(first, expected["grad_alignment_projector_0_weight_released"]) < 1e-5
    layer = model.get_decoder().layers[3].self_attn.query_key_value
    assert relative_error(layer.lora_A["default"].weight.grad, expected["grad_layer3_qkv_lora_A_released"]) < 1e-5


@pytest.mark.parametrize("row", [0, 1])
def test_greedy_answers(imported, expected, row):
    text = json.loads((GOLDEN / "inputs.json").read_text())["generation_text"][row]
    token = imported.processor.point_token
    prompt = imported.processor(text.replace("<PointCloudHere>", token), points=expected["points"][row])
    with torch.no_grad():
        point_tokens = imported.model.encode_points(expected["points"][row : row + 1]).point_tokens
        embeds = imported.model.embed_inputs(prompt["input_ids"], point_tokens)
    assert relative_error(embeds, expected[f"context_embeds_{row}"]) < TOLERANCE
    answer = imported.model.generate(
        input_ids=prompt["input_ids"], point_tokens=point_tokens, max_new_tokens=12, do_sample=False
    )
    # The released generate puts a beginning-of-sequence id before the answer's ids.
    assert answer[0, prompt["input_ids"].shape[1] :].tolist() == expected[f"greedy_ids_{row}"][1:].tolist()


def test_report_accounts_for_every_tensor(imported, checkpoint):
    summary = imported.report.summary()
    assert summary["missing"] == []
    assert summary["left_over"] == ["Qformer.bert.embeddings.position_ids"]
    assert summary["loaded"] == len(checkpoint) - 1
    assert "545 tensors loaded" in imported.report.lines()[0]


def test_only_the_language_models_lora_trains(imported):
    trained = [name for name, parameter in imported.model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(name.startswith("language_model.") and ".lora_" in name for name in trained)
    imported.model.train()
    assert not imported.model.connector.qformer.training
    imported.model.eval()


LOAD_ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
from pointalign.models.pointalign import PointAlignForConditionalGeneration
model = PointAlignForConditionalGeneration.from_pretrained(sys.argv[1])
batch = load_file(sys.argv[2])
with torch.no_grad():
    save_file({"logits": model(**batch).logits}, sys.argv[3])
"""


@pytest.mark.parametrize("merge", [False, True])
def test_folder_loads_in_another_process(tmp_path, batch, expected, outputs, merge):
    imported = load(merge=merge)
    export(imported, tmp_path / "model")
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    save_file({**batch, "point_clouds": expected["points"]}, tmp_path / "batch.safetensors")
    arguments = [str(tmp_path / name) for name in ("model", "batch.safetensors", "out.safetensors")]
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *arguments], check=True, capture_output=True)
    logits = load_file(tmp_path / "out.safetensors")["logits"]
    assert relative_error(logits, outputs.logits) < TOLERANCE
    adapters = {"language_model_adapter", "qformer_adapter"}
    assert adapters & set(os.listdir(tmp_path / "model")) == (set() if merge else adapters)
    regularizer = AlignmentRegularizer(32, 48)
    regularizer.load_state_dict(load_file(tmp_path / "model" / "alignment_projector.safetensors"))
    assert torch.equal(regularizer.projectors["15"].layers[0].weight, imported.alignment_projector.layers[0].weight)
    processor = load_processor(str(tmp_path / "model"))
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]}]
    assert processor.encode(messages) == imported.processor.encode(messages)


def split_into_published_files(checkpoint, folder):
    """The checkpoint as people have it: partial `.pth` files in half precision, with their foreign tensors."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in checkpoint.items()}
    language = {n: t for n, t in half.items() if n.startswith("llama_model")}
    trained = {n: t for n, t in language.items() if "lora_" in n or "norm" in n}
    encoder = {n.removeprefix("pc_encoder."): t for n, t in half.items() if n.startswith("pc_encoder.")}
    qformer = {n: t for n, t in half.items() if n.startswith(("Qformer.", "query_tokens")) and "lora_" not in n}
    foreign = {"ln_vision.weight": torch.ones(4), "t5_proj.weight": torch.ones(4, 4)}
    text_branch = {"Qformer.bert.encoder.layer.0.output.dense.weight": torch.ones(48, 96)}
    stale = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    used = language.keys() | qformer.keys() | {n for n in half if n.startswith("pc_encoder.")}
    doubled = {"point_encoder." + name: tensor for name, tensor in encoder.items()}
    final = {name: tensor for name, tensor in half.items() if name not in used} | doubled
    files = {
        "blip2.pth": {"model": {**qformer, **foreign, **text_branch}},
        "tinygpt.pth": {"model": {**stale, "llama_proj.weight": torch.zeros(4096, 48)}, "epoch": 3},
        "point_bert.pth": {"state_dict": {f"module.point_encoder.{n}": t for n, t in encoder.items()}},
        "point_bert_bare.pth": encoder,
        "pretrain.pth": {"model": trained, "optimizer": {"state": {}}},
        "finetune.pth": {"model": final},
    }
    for name, content in files.items():
        torch.save(content, folder / name)
    base = {n.replace("llama_model.base_model.model.", ""): t for n, t in language.items() if n not in trained}
    return [folder / name for name in files], base


def unfuse(base, heads):
    """Phi-2 as it is published today, with q_proj, k_proj and v_proj."""
    state = {}
    for name, tensor in base.items():
        if "query_key_value" in name:
            for letter, part in zip("qkv", tensor.unflatten(0, (heads, 3, -1)).unbind(1), strict=True):
                state[name.replace("query_key_value", f"{letter}_proj")] = part.flatten(0, 1).contiguous()
        else:
            state[name] = tensor
    return state


@pytest.fixture(scope="module")
def published(tmp_path_factory, checkpoint):
    folder = tmp_path_factory.mktemp("published")
    files, base = split_into_published_files(checkpoint, folder)
    phi = folder / "phi-2"
    phi.mkdir()
    (phi / "config.json").write_text((GOLDEN / "phi_config.json").read_text().replace("float32", "float16"))
    save_file(unfuse(base, heads=4), phi / "model.safetensors")
    return files, phi


def test_stack_of_partial_half_precision_files(published, checkpoint, batch, expected):
    files, phi = published
    stacked = load(*files, language_model=phi)
    whole = load()
    whole.model.load_state_dict({name: tensor.half().float() for name, tensor in whole.model.state_dict().items()})
    with torch.no_grad():
        ours = stacked.model(**batch, point_clouds=expected["points"])
        theirs = whole.model(**batch, point_clouds=expected["points"])
    assert ours.logits.dtype == torch.float32
    assert torch.equal(ours.logits, theirs.logits)
    report = {Path(file.name).name: file for file in stacked.report.files}
    assert {"ln_vision.weight", "t5_proj.weight"} < set(report["blip2.pth"].left_over)
    assert "Qformer.bert.encoder.layer.0.output.dense.weight" in report["blip2.pth"].left_over
    assert report["tinygpt.pth"].loaded == 0
    assert report["point_bert.pth"].replaced == report["point_bert_bare.pth"].replaced > 0


def test_missing_tensors_are_an_error_unless_allowed(published):
    files, phi = published
    without = [file for file in files if file.name != "blip2.pth"]
    with pytest.raises(CheckpointError, match=r"nothing for connector\.q.* and \d+ more; add the file"):
        load(*without, language_model=phi)
    allowed = load(*without, language_model=phi, allow_missing=["connector.qformer.*", "connector.query_tokens"])
    assert "connector.query_tokens" in allowed.report.missing
    assert any("missing: connector.* (" in line for line in allowed.report.lines())


def test_what_stage_one_starts_from(tmp_path, checkpoint):
    """Files from before MiniGPT-3D's training: no point MLP, and a Q-Former without LoRA."""
    later = ("point_2_Qformer_proj.", "alignment_projector.")
    state = {
        name: t
        for name, t in checkpoint.items()
        if not (name.startswith(later) or ("Qformer" in name and "lora_" in name))
    }
    save_file(state, tmp_path / "before.safetensors")
    imported = load(tmp_path / "before.safetensors", allow_missing=["connector.point_mlp."])
    linears = (0, 2)
    assert imported.report.missing == [
        f"connector.point_mlp.{i}.{kind}" for i in linears for kind in ("bias", "weight")
    ]
    assert imported.alignment_projector is None
    model = imported.model
    assert isinstance(model.language_model, PeftModel)
    assert not isinstance(model.connector.qformer, PeftModel)
    counts = prepare_parts(model, load_recipe("minigpt-3d-stage-2"))
    assert isinstance(model.connector.qformer, PeftModel)
    assert all(counts.values())


def test_missing_lora_of_one_layer_is_noticed(tmp_path, checkpoint):
    name = "llama_model.base_model.model.model.layers.2.self_attn.dense.lora_B.default.weight"
    save_file({n: t for n, t in checkpoint.items() if n != name}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.dense\.lora_B"):
        load(tmp_path / "c.safetensors")


def test_qformer_sizes_come_from_the_tensors(published):
    files, phi = published
    heads = {"num_attention_heads": 4, "model_type": "bert"}
    config = phi.parent / "heads.json"
    config.write_text(json.dumps(heads))
    qformer = load(*files, language_model=phi, qformer=config).model.config.connector_config.qformer_config
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.intermediate_size) == (48, 4, 96)
    assert (qformer.cross_attention_frequency, qformer.encoder_hidden_size) == (2, 1408)
    assert load(*files, language_model=phi, qformer=None).model.config.connector_config.qformer_config.hidden_size == 48


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch should_not_exist",)


def test_file_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Dangerous()}, tmp_path / "bad.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": Dangerous()}, protocol=2))
    for name in ("bad.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match=r"holds Python code or objects \(posix\.system\)") as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "should_not_exist").exists()


def test_broken_files_are_one_clear_line(tmp_path, published):
    files, phi = published
    for name in ("finetune.pth", "cut.safetensors"):
        whole = files[-1] if name.endswith("pth") else phi / "model.safetensors"
        (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
        with pytest.raises(CheckpointError, match="truncated"):
            load(tmp_path / name)
    with pytest.raises(CheckpointError, match="found no weights"):
        load(tmp_path / "absent.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match="no tensors"):
        load(tmp_path / "empty.pth")


def test_wrong_configurations(tmp_path):
    values = json.loads((GOLDEN / "phi_config.json").read_text())
    (tmp_path / "wide.json").write_text(json.dumps({**values, "intermediate_size": 80}))
    with pytest.raises(CheckpointError, match=r"has shape \(64, 32\) where the configuration has \(80, 32\)"):
        load(language_model=tmp_path / "wide.json")
    (tmp_path / "llama.json").write_text(json.dumps({**values, "model_type": "llama"}))
    with pytest.raises(ConfigError, match="of type 'llama'"):
        load(language_model=tmp_path / "llama.json")
    with pytest.raises(ConfigError, match="does not divide into 7 heads"):
        load(point_encoder_heads=7)
    (tmp_path / "shallow.json").write_text(json.dumps({**values, "num_hidden_layers": values["num_hidden_layers"] - 1}))
    with pytest.raises(
        CheckpointError, match=r"has \d+ blocks where its configuration has \d+; give the configuration"
    ):
        load(language_model=tmp_path / "shallow.json")
    (tmp_path / "words.json").write_text(json.dumps({**values, "num_attention_heads": "x"}))
    with pytest.raises(ConfigError, match=r"words\.json describes no Phi-2: "):
        load(language_model=tmp_path / "words.json")


def test_queries_keys_and_values_that_are_not_alike():
    def state(**rows: int) -> dict[str, torch.Tensor]:
        return {f"model.layers.0.self_attn.{letter}_proj.weight": torch.zeros(size, 8) for letter, size in rows.items()}

    assert fuse_query_key_value(state(q=8, k=8, v=8), 4).keys() == {"model.layers.0.self_attn.query_key_value.weight"}
    with pytest.raises(CheckpointError, match=r"and no model\.layers\.0\.self_attn\.k_proj\.weight; add the file"):
        fuse_query_key_value(state(q=8, v=8), 4)
    for rows in ({"q": 8, "k": 4, "v": 8}, {"q": 9, "k": 9, "v": 9}):
        with pytest.raises(CheckpointError, match="not of one shape that divides into 4 heads"):
            fuse_query_key_value(state(**rows), 4)


@pytest.mark.parametrize("name", ["num_groups", "group_size", "point_encoder_heads", "lora_alpha", "num_points"])
def test_numbers_that_no_model_has(name, tmp_path):
    files, options = [str(GOLDEN / "checkpoint.safetensors")], {**PARTS, **SIZES, "tokenizer": str(GOLDEN)}
    for value in (0, -4):
        with pytest.raises(ConfigError, match=f"{name} is {value}; give a number that is at least 1"):
            import_checkpoint("minigpt-3d", files, tmp_path / "out", **{**options, name: value})
    with pytest.raises(ConfigError, match="num_points is 8, fewer than the groups"):
        import_checkpoint("minigpt-3d", files, tmp_path / "out", **{**options, "num_points": 8, "num_groups": 9})
    assert not (tmp_path / "out").exists()


def test_import_gives_model_and_processor():
    options = {**PARTS, **SIZES}
    model, processor = import_minigpt3d([GOLDEN / "checkpoint.safetensors"], tokenizer=GOLDEN, **options)
    assert isinstance(model, PointAlignForConditionalGeneration)
    assert processor.num_point_tokens == model.config.num_point_tokens == 32


def test_command_writes_a_folder_and_refuses_others(tmp_path):
    files = [str(GOLDEN / "checkpoint.safetensors")]
    options = {**PARTS, **SIZES, "tokenizer": str(GOLDEN)}
    report = import_checkpoint("minigpt-3d", files, tmp_path / "out", **options)
    assert report.summary()["missing"] == []
    assert {"config.json", "model.safetensors", "alignment_projector.safetensors"} < set(os.listdir(tmp_path / "out"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="holds files of its own"):
        import_checkpoint("minigpt-3d", files, tmp_path / "mine", **options)
    import_checkpoint("minigpt-3d", files, tmp_path / "out", **{**options, "merge": True})
    shutil.copytree(GOLDEN, tmp_path / "golden")
    others = {**options, "language_model": str(tmp_path / "golden"), "tokenizer": str(tmp_path / "golden")}
    before = sorted(path.name for path in (tmp_path / "golden").iterdir())
    for out in ("golden", "golden/new", "."):
        with pytest.raises(CheckpointError, match="which is read, lie in each other; choose a new folder"):
            import_checkpoint("minigpt-3d", files, tmp_path / out, **others)
    (tmp_path / "phi").mkdir()
    for name, content in (("config.json", '{"model_type": "phi"}'), ("pytorch_model.bin", "")):
        (tmp_path / "phi" / name).write_text(content)
    with pytest.raises(CheckpointError, match="holds files of its own"):
        import_checkpoint("minigpt-3d", files, tmp_path / "phi", **options)
    (tmp_path / "out" / "evaluation").mkdir()
    (tmp_path / "out" / "evaluation" / "report.md").write_text("keep")
    with pytest.raises(CheckpointError, match=r"holds evaluation/report\.md, which no import writes"):
        import_checkpoint("minigpt-3d", files, tmp_path / "out", **options)
    assert sorted(path.name for path in (tmp_path / "golden").iterdir()) == before
    with pytest.raises(ConfigError, match="--language-model"):
        import_checkpoint("minigpt-3d", files, tmp_path / "new")
    with pytest.raises(ConfigError, match="choose minigpt-3d or pointllm"):
        import_checkpoint("minigpt", files, tmp_path / "new")


def test_released_prompt_and_question(imported):
    processor = with_released_prompt(imported.processor)
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, tokenize=False)
    points = processor.point_token * 32
    assert text == f"<s>[INST] <PC>{points}</PC> <s>[INST] What is this? [/INST]"
    ours = imported.processor.apply_chat_template(messages, tokenize=False)
    assert ours == f"<|endoftext|>[INST] <PC>{points}</PC> What is this? [/INST]"
    assert released_question("What's THIS, exactly? Tell me!") == "whats this exactly? tell me"
    assert released_question("a " * 60) == " ".join("a" * 50)


def test_released_prompt_of_a_model_with_another_prompt(processor):
    with pytest.raises(ConfigError, match="leave --as-released out"):
        with_released_prompt(processor)


def test_training_as_released(imported, batch, expected):
    human = {"from": "human", "value": "<point>\nWhat's THIS, exactly?"}
    answer = {"from": "gpt", "value": "A chair, really."}
    one, two = read_conversations(
        {"object_id": "a", "conversations": turns} for turns in ([human, answer], [human, answer] * 2)
    )
    points = {"a": {"point_clouds": expected["points"][0]}}
    dataset = ConversationDataset([one, two], imported.processor, points, 500, rewrite=released_messages)
    plain = ConversationDataset([one, two], imported.processor, points, 500)
    decode = imported.processor.tokenizer.decode
    assert decode(dataset[0]["input_ids"]).endswith("</PC> whats this exactly?  [/INST]A chair, really.###")
    assert decode(plain[0]["input_ids"]).endswith("</PC> What's THIS, exactly? [/INST]A chair, really.###")
    assert dataset[1]["input_ids"] == plain[1]["input_ids"], "a conversation of two turns was changed"

    positions = partial(released_alignment_mask, num_point_tokens=imported.model.config.num_point_tokens)
    samples = [
        {"input_ids": row[:length].tolist(), "labels": labels[:length].tolist(), "points": []}
        for row, labels, length in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].sum(1), strict=True)
    ]
    mask = Collator(imported.processor, positions)(samples)["alignment_mask"]
    assert torch.equal(mask, expected["released_span_mask"].bool())
