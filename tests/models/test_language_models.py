"""Any causal language model of transformers: training with alignment, answering, saving and loading, without its name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pointalign.alignment import AlignmentRegularizer, find_decoder_layers
from pointalign.config import Recipe, from_dict
from pointalign.models.phi import PhiVariantConfig
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.runs import train

LAYERS, ALIGNED = 4, 2
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True),
    "phi": PhiConfig(**SIZES),
    "phi3": Phi3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, layer_types=WINDOWS),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=8, layer_types=WINDOWS),
    "phi variant": PhiVariantConfig(**SIZES),
    "gpt2": GPT2Config(**SIZES, n_inner=40),  # learned positions, and matrices the other way round
}
QUESTIONS = ("What is this?", "Is it made of wood, and where would it stand?", "Why?")


def write_data(folder: Path) -> None:
    (folder / "clouds").mkdir()
    rng = np.random.default_rng(0)
    entries = []
    for name in ("chair", "lamp", "sofa"):
        np.save(folder / "clouds" / f"{name}_8192.npy", rng.random((60, 6)).astype(np.float32))
        turns = [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": f"A {name}."}]
        entries.append({"object_id": name, "conversations": turns})
    (folder / "instructions.json").write_text(json.dumps(entries))


def recipe_of(folder: Path) -> Recipe:
    """Every stack has as many layers as the language model, so that its blocks are not found by their number alone."""
    values = {
        "model": {
            "language_model": str(folder / "language_model"),
            "num_points": 48,
            "point_encoder": {
                "num_groups": 8,
                "group_size": 6,
                "group_hidden_sizes": [8, 12, 16],
                "group_width": 10,
                "hidden_size": 16,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
            },
            "connector": {
                "num_query_tokens": 5,
                "hidden_sizes": [20],
                "vision_width": 18,
                "qformer_hidden_size": 24,
                "qformer_layers": LAYERS,
                "qformer_heads": 2,
                "qformer_intermediate_size": 32,
                "projection_size": 28,
            },
        },
        "trains": ["connector", "language_model_lora", "language_model_norms"],
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            "source": str(folder / "clouds"),
            "instructions": [str(folder / "instructions.json")],
            "sets": [{"batch_size": 3}],
        },
        "alignment": {"weight": 0.5, "layers": [ALIGNED]},
        "optimizer": {"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 1, "warmup_start": 1e-3},
        "precision": "fp32",
        "logging_steps": 1,
        "report_to": [],
    }
    return from_dict(Recipe, values, "test")


@pytest.fixture(scope="module", params=MODELS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, build_tokenizer: Any
) -> tuple[Path, dict[str, Any], PointAlignForConditionalGeneration]:
    """A run's folder, what the run told, and the very model that it trained."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[request.param]).save_pretrained(folder / "language_model")
    build_tokenizer().save_pretrained(folder / "language_model")
    write_data(folder)
    saved: list[Any] = []
    save = PointAlignForConditionalGeneration.save_pretrained

    def remember(model: Any, *arguments: Any, **options: Any) -> None:
        saved.append(model)
        save(model, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(folder / "cache"))
        patch.setattr(PointAlignForConditionalGeneration, "save_pretrained", remember)
        summary = train(recipe_of(folder), folder / "run")
    return folder / "run", summary, saved[0].eval()


def prompts(folder: Path) -> tuple[Any, Tensor, list[Any]]:
    """The processor, three clouds, and three conversations of unequal length."""
    processor = load_processor(str(folder / "model"))
    clouds = torch.rand(3, 60, 6, generator=torch.Generator().manual_seed(5))
    content = [[{"type": "point_cloud"}, {"type": "text", "text": question}] for question in QUESTIONS]
    return processor, clouds, [[{"role": "user", "content": parts}] for parts in content]


def test_two_steps_train_everything_that_they_should(trained: Any) -> None:
    folder, summary, model = trained
    assert summary["steps"] == 2
    assert math.isfinite(summary["lm_loss"])
    assert summary["alignment_loss"] > 0
    moved = [name for name, p in model.named_parameters() if ".lora_B." in name and p.abs().max() > 0]
    adapted = [name for name, _ in model.named_parameters() if ".lora_B." in name]
    assert len(adapted) >= 4 * LAYERS
    assert moved == adapted
    state = load_file(folder / "model" / "alignment_projector.safetensors")
    fresh = AlignmentRegularizer(32, 24, layers=[ALIGNED], seed=42).state_dict()
    assert state.keys() == fresh.keys()
    assert all((state[name] - fresh[name]).abs().max() > 0 for name in fresh)
    assert all(count > 0 for count in summary["trained"].values())


def test_alignment_reads_the_block_it_names(trained: Any) -> None:
    """Its gradient reaches the projector and the LoRA up to that block, and nothing behind it."""
    folder, _, _ = trained
    model = PointAlignForConditionalGeneration.from_pretrained(folder / "model", is_trainable=True)
    blocks = find_decoder_layers(model)
    decoder = model.get_decoder()
    assert list(blocks) == list(decoder.h if hasattr(decoder, "h") else decoder.layers)
    processor, clouds, conversations = prompts(folder)
    inputs = processor.apply_chat_template(conversations, points=clouds, padding_side="right")
    regularizer = AlignmentRegularizer(32, 24, layers=[ALIGNED]).attach(model)
    outputs = model(
        **inputs,
        alignment_mask=inputs["input_ids"] == model.config.point_token_id,
        alignment_target=lambda output: output.points.qformer_output,
        output_hidden_states=True,
    )
    term = regularizer.take()
    mask = inputs["input_ids"] == model.config.point_token_id
    projected = regularizer.projectors[str(ALIGNED)](outputs.hidden_states[ALIGNED][mask])
    similarity = torch.cosine_similarity(projected, outputs.points.qformer_output.flatten(0, 1), dim=-1)
    torch.testing.assert_close(term.mean, (1 - similarity).mean())
    term.mean.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in regularizer.parameters())
    for number, block in enumerate(blocks, 1):
        gradients = [p.grad for name, p in block.named_parameters() if ".lora_B." in name]
        reached = [gradient is not None and float(gradient.abs().max()) > 0 for gradient in gradients]
        assert gradients
        assert all(reached) if number <= ALIGNED else not any(reached), number
    regularizer.detach()


def test_a_left_padded_batch_answers_as_single_prompts_do(trained: Any) -> None:
    folder, _, model = trained
    processor, clouds, conversations = prompts(folder)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 256}
    batch = processor.apply_chat_template(conversations, points=clouds)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for row, conversation in enumerate(conversations):
        single = processor.apply_chat_template(conversation, points=clouds[row])
        alone = model.generate(**single, **options)[0, single["input_ids"].shape[1] :]
        assert together[row].tolist() == alone.tolist()


@torch.no_grad()
@pytest.mark.parametrize("self_contained", [False, True])
def test_a_saved_model_gives_the_same_logits(trained: Any, tmp_path: Path, self_contained: bool) -> None:
    folder, _, model = trained
    processor, clouds, conversations = prompts(folder)
    batch = processor.apply_chat_template(conversations, points=clouds)
    expected = model(**batch).logits
    loaded = PointAlignForConditionalGeneration.from_pretrained(folder / "model")
    assert torch.equal(loaded(**batch).logits, expected)
    loaded.save_pretrained(tmp_path / "again", self_contained=self_contained)
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch).logits, expected)
    merged = PointAlignForConditionalGeneration.from_pretrained(folder / "model")
    merged.merge_adapters()
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-3, atol=1e-4)
    at_once = PointAlignForConditionalGeneration.from_pretrained(folder / "model", merged=True)
    assert at_once.config.language_model is None
    weights = dict(merged.named_parameters())
    assert {name: torch.equal(weights[name], w) for name, w in at_once.named_parameters()} == dict.fromkeys(
        weights, True
    )
