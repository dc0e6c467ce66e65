"""What users of transformers do by habit: it works as they know it, or says why it cannot."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    GenerationConfig,
    MambaConfig,
    OPTConfig,
    Trainer,
    TrainingArguments,
)

from pointalign import PointAlignForConditionalGeneration
from pointalign.alignment import AlignmentRegularizer
from pointalign.config import LoraSettings
from pointalign.errors import ConfigError, DataError
from pointalign.models import checkpoint
from pointalign.models import pointalign as pointalign_module
from pointalign.models.pointalign import PointAlignConfig
from pointalign.parts import add_lora, select_parts
from pointalign.runs import cast_frozen
from randomness import randomize

GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": -1}


def chat(processor: Any, cloud: Tensor) -> Any:
    """A question about a cloud, as the model takes it."""
    content = [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]
    return processor.apply_chat_template([{"role": "user", "content": content}], points=cloud)


@pytest.fixture
def model(build_model: Any) -> Any:
    return build_model()


@pytest.fixture
def asked(processor: Any, clouds: Tensor) -> Any:
    return chat(processor, clouds[0])


def adapted(model: Any) -> Any:
    """With a LoRA that changes what the model says."""
    add_lora(model, LoraSettings(rank=2, alpha=4, dropout=0.0), train_norms=False)
    for name, weight in model.language_model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@torch.no_grad()
def logits(model: Any, asked: Any) -> Tensor:
    return model.eval()(**asked).logits


def reloaded(folder: Path, **options: Any) -> Any:
    return PointAlignForConditionalGeneration.from_pretrained(folder, **options)


# generate


def test_guessing_ahead_is_refused_where_a_cloud_is_and_right_elsewhere(
    model: Any, build_model: Any, asked: Any
) -> None:
    for guess in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build_model(seed=1).language_model}):
        with pytest.raises(ConfigError, match=f"{next(iter(guess))} gives other tokens where a prompt holds a cloud"):
            model.generate(**asked, **guess, **GREEDY)
        ids = torch.arange(12).unsqueeze(0)
        greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **guess, **GREEDY), greedy)
    with pytest.raises(ConfigError, match="prompt_lookup_num_tokens"):
        model.generate(**asked, generation_config=GenerationConfig(prompt_lookup_num_tokens=3, **GREEDY))


def test_text_without_a_cache_may_draw_the_clouds_token(model: Any) -> None:
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[model.config.point_token_id] = 10 * head.mean(dim=0)
    ids = torch.arange(12).unsqueeze(0)
    mask, point = torch.ones_like(ids), model.config.point_token_id
    options = {**GREEDY, "bad_words_ids": [[word] for word in range(260) if word != point]}
    assert model.generate(ids, attention_mask=mask, use_cache=False, **options)[0, 12:].tolist() == [point] * 6


def test_a_compiled_language_model_runs_compiled(model: Any, asked: Any) -> None:
    expected, ran = model.generate(**asked, **GREEDY), []

    def backend(graph: Any, _: Any) -> Any:
        ran.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.language_model = torch.compile(model.language_model, backend=backend)
    assert torch.equal(model.generate(**asked, **GREEDY), expected)
    assert ran


def test_inputs_is_another_name_of_the_ids(model: Any, asked: Any) -> None:
    expected = model.generate(**asked, **GREEDY)
    renamed = {"inputs": asked["input_ids"], **{name: value for name, value in asked.items() if name != "input_ids"}}
    assert torch.equal(model.generate(**renamed, **GREEDY), expected)


def test_an_empty_cache_does_not_hide_missing_clouds(model: Any, asked: Any) -> None:
    cache = DynamicCache()
    with pytest.raises(DataError, match="5 point placeholders but the clouds give 0"):
        model(input_ids=asked["input_ids"], past_key_values=cache)
    begun = model(**asked, past_key_values=cache)
    placeholder = torch.tensor([[model.config.point_token_id]])  # a token that was drawn stands for no cloud
    assert model(input_ids=placeholder, past_key_values=begun.past_key_values).logits.shape == (1, 1, 260)


def test_a_tuple_where_one_is_asked_for(model: Any, asked: Any) -> None:
    given = model(**asked, return_dict=False)
    assert isinstance(given, tuple)
    assert torch.equal(given[0], logits(model, asked))


# Any language model


def test_embeddings_narrower_than_the_blocks(build_around: Any, processor: Any, clouds: Tensor) -> None:
    config = OPTConfig(
        vocab_size=260,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    model = build_around(config)
    assert model.config.connector_config.output_size == 16
    batch = chat(processor, clouds[0])
    points = model.encode_points(batch["point_clouds"])
    embeds = model.embed_inputs(batch["input_ids"], points.point_tokens)
    assert torch.equal(embeds[batch["input_ids"] == 259], points.point_tokens[0])
    with pytest.raises(DataError, match="point tokens are 8 wide and the language model's embeddings 16"):
        model.embed_inputs(batch["input_ids"], points.point_tokens[..., :8])
    model.generate(**batch, **GREEDY)


def test_a_language_model_with_a_state_of_its_own_kind(build_around: Any, processor: Any, clouds: Tensor) -> None:
    model = build_around(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2, state_size=4))
    batch = chat(processor, clouds[0])
    row = model.generate(**batch, **GREEDY)[0]
    start, embeds = (
        batch["input_ids"].shape[1],
        model.embed_inputs(batch["input_ids"], model.encode_points(batch["point_clouds"]).point_tokens),
    )
    for place in range(start, start + 6):
        written = model.get_input_embeddings()(row[start:place]).unsqueeze(0)
        whole = model.language_model(inputs_embeds=torch.cat([embeds, written], dim=1)).logits
        assert int(whole[0, -1].argmax()) == int(row[place])
    labels = batch["input_ids"].clone()
    assert torch.isfinite(model(**batch, labels=labels).loss)


def test_a_model_of_several_parts_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match="a gemma3 model has several parts; name a language model that reads text alone"
    ):
        PointAlignConfig(text_config=Gemma3Config())


def test_the_vocabulary_grows(model: Any, asked: Any) -> None:
    before = logits(model, asked)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 300
    torch.testing.assert_close(logits(model, asked)[..., :260], before)


# Saving and loading


def test_trainer_saves_what_it_trained(model: Any, asked: Any, tmp_path: Path) -> None:
    adapted(model)
    sample = {**{name: value[0] for name, value in asked.items()}, "labels": asked["input_ids"][0]}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=0.1
    )
    trainer = Trainer(model, arguments, train_dataset=[sample] * 2)  # pyright: ignore[reportArgumentType]
    untrained = logits(model, asked)
    trainer.train()
    trained = logits(model, asked)
    assert not torch.allclose(trained, untrained, atol=0.1)
    torch.testing.assert_close(logits(reloaded(tmp_path / "checkpoint-2"), asked), trained)


def test_merged_after_training_in_bfloat16(model: Any, asked: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "start")
    model = reloaded(tmp_path / "start")
    untrained = logits(model, asked)
    adapted(model)
    select_parts(model, ["language_model_lora"])
    cast_frozen(model)
    model.merge_adapters()
    model.save_pretrained(tmp_path / "merged")
    found = logits(reloaded(tmp_path / "merged", dtype=torch.float32), asked)
    assert (found - untrained).abs().max() > 1
    torch.testing.assert_close(found, logits(model.float(), asked))


def test_a_head_that_is_the_embedding_stays_so(build_model: Any, asked: Any, tmp_path: Path) -> None:
    build_model(tied=True).save_pretrained(tmp_path / "start")
    model = reloaded(tmp_path / "start")
    before = logits(model, asked)
    adapted(model)
    select_parts(model, ["language_model_lora"])
    cast_frozen(model)
    gathered = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.save_pretrained(tmp_path / "gathered", state_dict=gathered)
    model.save_pretrained(tmp_path / "trained")
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "trained" / "model.safetensors")
    copied = load_file(tmp_path / "gathered" / "model.safetensors")
    head = copied.get("language_model.lm_head.weight")
    assert head is None or torch.equal(head, copied["language_model.model.embed_tokens.weight"])
    base = reloaded(tmp_path / "trained").language_model.get_base_model()
    assert base.lm_head.weight is base.get_input_embeddings().weight
    alone = reloaded(tmp_path / "trained")
    with alone.language_model.disable_adapter():
        torch.testing.assert_close(logits(alone, asked), before)


def test_an_adapter_that_no_folder_would_hold_is_refused(model: Any, tmp_path: Path) -> None:
    settings = LoraConfig(r=2, target_modules=["q_proj"])
    model.language_model.add_adapter(settings)
    with pytest.raises(ConfigError, match="is of an adapter that no folder would hold; put it on by"):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


@pytest.mark.parametrize("what", ["all of it", "inside the adapter", "one block", "the connector", "the whole model"])
def test_what_is_compiled_is_saved_as_it_is(model: Any, asked: Any, tmp_path: Path, what: str) -> None:
    compiled = partial(torch.compile, backend="eager")
    if what == "inside the adapter":
        model.language_model = compiled(model.language_model)
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    model.language_model = get_peft_model(model.language_model, settings)
    model.connector.qformer = get_peft_model(model.connector.qformer, LoraConfig(r=2, target_modules=["query"]))
    randomize(model.language_model, 3)
    randomize(model.connector.qformer, 4)
    expected, state = logits(model, asked), None
    if what == "all of it":
        model.language_model = compiled(model.language_model)
    elif what == "one block":
        blocks = model.language_model.get_base_model().model.layers
        blocks[1] = compiled(blocks[1])
    elif what == "the connector":
        model.connector = compiled(model.connector)
    elif what == "the whole model":
        state = compiled(model).state_dict()
    model.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(logits(reloaded(tmp_path), asked), expected)


def test_what_the_hub_is_asked_for(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path / "kept")
    fetched = []

    def fetch(name: str, **options: Any) -> str:
        fetched.append((name, options))
        return str(tmp_path / "kept")

    monkeypatch.setattr(checkpoint, "snapshot_download", fetch)
    reloaded("me/model", revision="v1", token="t", cache_dir="c")  # type: ignore[arg-type]
    assert fetched == [("me/model", {"revision": "v1", "token": "t", "cache_dir": "c"})]


def test_an_upload_holds_what_was_saved(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, uploaded = [], []

    def create(name: str, **options: Any) -> Any:
        made.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload(folder_path: Path, **options: Any) -> None:
        files = {path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*")}
        uploaded.append((options, "language_model_adapter/adapter_model.safetensors" in files))

    monkeypatch.setattr(pointalign_module, "create_repo", create)
    monkeypatch.setattr(pointalign_module, "upload_folder", upload)
    adapted(model).save_pretrained(tmp_path / "mine", push_to_hub=True, private=True, commit_message="First.")
    assert made == [("mine", {"exist_ok": True, "private": True})]
    assert uploaded == [({"repo_id": "me/mine", "token": None, "commit_message": "First."}, True)]
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, is_main_process=False)
    assert len(uploaded) == 1, "one process uploads"


def test_given_settings_of_answers_are_kept(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    settings = GenerationConfig(max_new_tokens=7, pad_token_id=3)
    found = reloaded(tmp_path, generation_config=settings).generation_config
    assert (found.max_new_tokens, found.pad_token_id) == (7, 3)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot read .*generation_config\.json"):
        reloaded(tmp_path)


def test_what_loading_found_out(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, told = reloaded(tmp_path, output_loading_info=True)
    assert type(again) is type(model)
    assert not told["missing_keys"]


def test_a_folder_without_its_language_model(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not say where the language model is"):
        model.save_pretrained(tmp_path / "half", self_contained=False)
    assert not (tmp_path / "half").exists()
    model.language_model.save_pretrained(tmp_path / "language")
    model.config.language_model = str(tmp_path / "language")
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    again, told = reloaded(tmp_path / "small", output_loading_info=True)
    assert again.config.language_model == str(tmp_path / "language")
    assert not told["missing_keys"]


def test_a_second_regulariser_is_refused(model: Any) -> None:
    first = AlignmentRegularizer(32, 24, layers=[2]).attach(model)
    with pytest.raises(ConfigError, match="the model has a regulariser already"):
        AlignmentRegularizer(32, 24, layers=[2]).attach(model)
    first.detach()
    AlignmentRegularizer(32, 24, layers=[2]).attach(model).detach()
