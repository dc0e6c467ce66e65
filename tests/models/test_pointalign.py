"""The whole model: loss, generation, and that a folder gives back what was saved."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    OPTConfig,
    TextIteratorStreamer,
)

from pointalign.alignment import AlignmentRegularizer
from pointalign.config import LoraSettings
from pointalign.errors import CheckpointError, DataError
from pointalign.models.checkpoint import fit_embeddings, plain_state_dict
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor
from pointalign.parts import add_lora, select_parts

POINT, PAD, Q = 259, 256, 5


def cloud_ids(count=Q):
    return [POINT] * count


PROMPTS = [
    [10, *cloud_ids(), 11, 12],
    [*cloud_ids(), 20, 21, 22, 23],
    [13, *cloud_ids(), 14, *cloud_ids(), 15],
]


def batch_of(prompts, side="left"):
    length = max(map(len, prompts))
    ids, mask = torch.full((len(prompts), length), PAD), torch.zeros(len(prompts), length, dtype=torch.long)
    for row, ones, prompt in zip(ids, mask, prompts, strict=True):
        span = slice(length - len(prompt), length) if side == "left" else slice(0, len(prompt))
        row[span], ones[span] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def with_lora(model, seed=5, targets=("q_proj", "v_proj", "up_proj")):
    """LoRA and norm weights that all differ from the base model."""
    add_lora(model, LoraSettings(rank=2, alpha=4, target_modules=list(targets)), train_norms=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if ".lora_" in name or ".modules_to_save." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits_of(model, clouds):
    batch = batch_of(PROMPTS)
    return model(**batch, point_clouds=clouds).logits[batch["attention_mask"].bool()]


@torch.no_grad()
def greedy_by_hand(model, prompt, clouds, steps):
    """The whole sequence through the model at every step: no cache, no padding, no generate."""
    ids = torch.tensor([prompt])
    for _ in range(steps):
        logits = model(input_ids=ids, point_clouds=clouds, use_cache=False).logits[0, -1]
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


# What the model computes


@pytest.mark.parametrize("point", [0, 1, 259])
def test_what_fills_rows_up_is_no_point_token(point):
    config = PointAlignConfig(point_token_id=point)
    assert config.filler_token_id != point
    assert "filler_token_id" not in config.to_dict()


def test_every_part_matters_to_the_logits(model, clouds):
    before = logits_of(model, clouds)
    for part in (
        "point_encoder.group_encoder",
        "point_encoder.class_token",
        "connector.point_mlp",
        "connector.qformer",
    ):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.startswith(part):
                    parameter.mul_(1.3)
        assert (logits_of(model, clouds) - before).abs().max() > 1e-3, part
        model.load_state_dict(state)


def test_point_tokens_take_their_placeholders_in_order(model, clouds):
    tokens = model.encode_points(clouds).point_tokens
    batch = batch_of(PROMPTS)
    embeds = model.embed_inputs(batch["input_ids"], tokens)
    table = model.get_input_embeddings().weight
    seen = 0
    for row, ids in zip(embeds, batch["input_ids"].tolist(), strict=True):
        for vector, token in zip(row, ids, strict=True):
            if token == POINT:
                assert torch.equal(vector, tokens[seen // Q, seen % Q])
                seen += 1
            else:
                assert torch.equal(vector, table[token])
    assert seen == 4 * Q


def test_clouds_features_and_tokens_give_the_same_logits(model, clouds):
    batch = batch_of(PROMPTS)
    points = model.encode_points(clouds)
    assert points.point_features.shape == (4, 9, 16)
    assert points.qformer_output.shape == (4, Q, 24)
    assert points.point_tokens.shape == (4, Q, 32)
    from_clouds = model(**batch, point_clouds=clouds)
    assert torch.equal(from_clouds.points.point_tokens, points.point_tokens)
    assert torch.equal(model(**batch, point_features=points.point_features).logits, from_clouds.logits)
    assert torch.equal(model(**batch, point_tokens=points.point_tokens).logits, from_clouds.logits)
    other = model(**batch, point_clouds=clouds.flip(0)).logits
    assert (other - from_clouds.logits).abs().max() > 1e-2


def test_the_mlp_connector_hands_on_every_feature(build_model, clouds):
    model = build_model(kind="mlp")
    assert model.config.num_point_tokens == 9
    points = model.encode_points(clouds)
    assert points.qformer_output is None
    first, second = model.connector.language_projection[0], model.connector.language_projection[2]
    hidden = nn.functional.gelu(points.point_features @ first.weight.T + first.bias)
    torch.testing.assert_close(points.point_tokens, hidden @ second.weight.T + second.bias)
    ids = torch.tensor([[10, *cloud_ids(9), 11]])
    out = model(input_ids=ids, point_clouds=clouds[:1]).logits
    assert (out - model(input_ids=ids, point_clouds=clouds[1:2]).logits).abs().max() > 1e-2
    generated = model.generate(
        input_ids=ids, point_clouds=clouds[:1], max_new_tokens=5, do_sample=False, eos_token_id=-1
    )
    assert generated[0, -5:].tolist() == greedy_by_hand(model, ids[0].tolist(), clouds[:1], 5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_ones(model, clouds, side):
    batch = batch_of(PROMPTS, side)
    together = model(**batch, point_clouds=clouds).logits
    first = 0
    for row, prompt, mask in zip(together, PROMPTS, batch["attention_mask"].bool(), strict=True):
        count = prompt.count(POINT) // Q
        alone = model(input_ids=torch.tensor([prompt]), point_clouds=clouds[first : first + count]).logits[0]
        torch.testing.assert_close(row[mask], alone, rtol=1e-4, atol=1e-5)
        first += count


def test_loss_is_the_mean_over_shifted_labels(model, clouds):
    batch = batch_of(PROMPTS, "right")
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == POINT) | (batch["attention_mask"] == 0), -100)
    output = model(**batch, point_clouds=clouds, labels=labels)
    log_probabilities = output.logits.double().log_softmax(-1)
    terms = [
        -log_probabilities[row, column - 1, labels[row, column]]
        for row in range(3)
        for column in range(1, labels.shape[1])
        if labels[row, column] != -100
    ]
    assert output.loss.item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-6)
    summed = model(**batch, point_clouds=clouds, labels=labels, num_items_in_batch=7).loss
    assert summed.item() == pytest.approx(sum(terms).item() / 7, rel=1e-6)


def test_kept_logits_score_the_same_labels(model, clouds):
    batch = batch_of(PROMPTS, "right")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[0, 6:8], labels[1, 7], labels[2, 11:13] = torch.tensor([11, 12]), 22, torch.tensor([POINT, 15])
    full = model(**batch, point_clouds=clouds, labels=labels)
    full.loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    keep = (labels[:, 1:] != -100).any(dim=0).nonzero().flatten()
    assert keep.tolist() == [5, 6, 10, 11]
    kept = model(**batch, point_clouds=clouds, labels=labels, logits_to_keep=keep)
    assert kept.logits.shape == (3, 4, 260)
    torch.testing.assert_close(kept.logits, full.logits[:, keep], rtol=1e-5, atol=1e-5)
    assert kept.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)
    kept.loss.backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-3, atol=1e-5)
    last = model(**batch, point_clouds=clouds, labels=labels, logits_to_keep=3)
    assert last.logits.shape == (3, 3, 260)
    assert last.loss.item() == pytest.approx(
        nn.functional.cross_entropy(full.logits[2, 10:12], labels[2, 11:13]).item(), rel=1e-5
    )


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_clouds_is_refused(model, clouds, count):
    given = torch.cat([clouds, clouds])[:count] if count else None
    message = rf"^the prompts hold 20 point placeholders but the clouds give {count * Q} point tokens; [^\n]+$"
    with pytest.raises(DataError, match=message):
        model(**batch_of(PROMPTS), point_clouds=given)
    with pytest.raises(DataError, match=message):
        model.generate(**batch_of(PROMPTS), point_clouds=given, max_new_tokens=2)


def test_neither_ids_nor_embeddings(model):
    with pytest.raises(DataError, match="needs input_ids or inputs_embeds"):
        model()


def test_a_language_model_that_is_passed_in_keeps_its_weights(model):
    before = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    again = PointAlignForConditionalGeneration(model.config, language_model=model.language_model)
    assert again.language_model is model.language_model
    for name, tensor in again.language_model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_language_model_that_is_wrapped_stays_causal(model):
    """Wrapping a loaded model's configuration must not take its attention away: transformers would build no causal mask."""
    language_model = model.language_model
    config = PointAlignConfig(
        point_encoder_config=model.config.point_encoder_config.to_dict(),
        connector_config=model.config.connector_config.to_dict(),
        text_config=language_model.config,
        point_token_id=POINT,
    )
    wrapped = PointAlignForConditionalGeneration(config, language_model=language_model).eval()
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    assert torch.equal(wrapped(first).logits[:, :3], wrapped(second).logits[:, :3])
    assert wrapped.language_model.config._attn_implementation == "sdpa"


def test_text_alone_is_the_language_model(model):
    ids = torch.tensor([[10, 11, 12, 13]])
    assert torch.equal(model(input_ids=ids).logits, model.language_model(input_ids=ids).logits)


# Generation


def test_greedy_generation_equals_a_loop_without_cache(model, clouds):
    answers = set()
    for number, prompt in enumerate(PROMPTS[:2]):
        cloud = clouds[number : number + 1]
        got = model.generate(
            input_ids=torch.tensor([prompt]), point_clouds=cloud, max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
        assert got[0, : len(prompt)].tolist() == prompt
        assert got[0, len(prompt) :].tolist() == greedy_by_hand(model, prompt, cloud, 12)
        answers.add(tuple(got[0, len(prompt) :].tolist()))
    assert len(answers) == 2


def test_generation_depends_on_the_cloud(model, clouds):
    answers = {tuple(greedy_by_hand(model, PROMPTS[0], cloud[None], 6)) for cloud in clouds}
    assert len(answers) > 1, "else the other generation tests would not notice a lost cloud"


def test_generation_without_cache_equals_generation_with_it(model, clouds):
    inputs = {"input_ids": torch.tensor([PROMPTS[0]]), "point_clouds": clouds[:1], "max_new_tokens": 6}
    cached = model.generate(**inputs, do_sample=False, eos_token_id=-1)
    assert torch.equal(model.generate(**inputs, do_sample=False, eos_token_id=-1, use_cache=False), cached)


def test_a_left_padded_batch_generates_what_single_prompts_do(model, clouds):
    batch = batch_of(PROMPTS)
    got = model.generate(**batch, point_clouds=clouds, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    assert torch.equal(got[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    first = 0
    for row, prompt in zip(got, PROMPTS, strict=True):
        count = prompt.count(POINT) // Q
        assert row[-8:].tolist() == greedy_by_hand(model, prompt, clouds[first : first + count], 8)
        first += count


def test_generation_from_tokens_and_stop_at_the_end(model, clouds):
    tokens = model.encode_points(clouds[:1]).point_tokens
    ids = torch.tensor([PROMPTS[0]])
    answer = greedy_by_hand(model, PROMPTS[0], clouds[:1], 8)
    stop = answer.index(answer[4])
    got = model.generate(input_ids=ids, point_tokens=tokens, max_new_tokens=8, do_sample=False, eos_token_id=answer[4])
    assert got[0, len(PROMPTS[0]) :].tolist() == answer[: stop + 1]


def test_beams_with_two_clouds_in_one_prompt(model, clouds):
    """Each beam's score must be the sum of log probabilities that the model itself gives its words."""
    prompts = [PROMPTS[2], [*cloud_ids(), 30, *cloud_ids(), 31, 32, 33]]
    batch = batch_of(prompts)
    out = model.generate(
        **batch,
        point_clouds=clouds,
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    width = batch["input_ids"].shape[1]
    assert out.sequences.shape == (4, width + 5)
    for index, (row, score) in enumerate(zip(out.sequences, out.sequences_scores.tolist(), strict=True)):
        prompt, new = prompts[index // 2], row[width:].tolist()
        own = clouds[2 * (index // 2) :][:2]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + new]), point_clouds=own).logits[0].log_softmax(-1)
        wanted = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(new))
        assert score == pytest.approx(wanted, abs=1e-3)
    assert out.sequences_scores[0] >= out.sequences_scores[1]
    alone = model.generate(
        input_ids=torch.tensor([prompts[1]]),
        point_clouds=clouds[2:],
        num_beams=3,
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
        length_penalty=0.0,
    )
    assert alone[0, -5:].tolist() == out.sequences[2, -5:].tolist()


def test_streaming_gives_the_answer_word_by_word(model, clouds, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(
        input_ids=torch.tensor([PROMPTS[0]]),
        point_clouds=clouds[:1],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=-1,
        streamer=streamer,
    )
    assert "".join(streamer) == tokenizer.decode(greedy_by_hand(model, PROMPTS[0], clouds[:1], 6))


def test_sampling_follows_the_seed(model, clouds):
    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(
            input_ids=torch.tensor([PROMPTS[0]]), point_clouds=clouds[:1], do_sample=True, max_new_tokens=10
        ).tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


# Who trains


def test_frozen_parts_stay_in_evaluation_while_the_rest_trains(build_model, clouds):
    model = build_model(qformer_dropout=0.5)
    expected = model.encode_points(clouds)
    statistics = model.point_encoder.group_encoder.norm1.running_mean.clone()
    select_parts(model, ["language_projection"])
    model.train()
    assert model.training
    assert model.connector.language_projection.training
    for _ in range(2):
        again = model.encode_points(clouds)
        assert torch.equal(again.qformer_output, expected.qformer_output)
        assert torch.equal(again.point_features, expected.point_features)
    assert torch.equal(model.point_encoder.group_encoder.norm1.running_mean, statistics)
    # and the same parts do move once they train
    select_parts(model, ["qformer", "point_encoder"])
    model.train()
    noisy = model.encode_points(clouds)
    assert not torch.equal(noisy.qformer_output, model.encode_points(clouds).qformer_output)
    assert not torch.equal(model.point_encoder.group_encoder.norm1.running_mean, statistics)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_frozen_qformer_stays_in_evaluation_when_only_its_neighbours_train(build_model, clouds):
    model = build_model(qformer_dropout=0.5)
    select_parts(model, ["point_mlp", "query_tokens"])
    model.train()
    assert torch.equal(model.encode_points(clouds).qformer_output, model.encode_points(clouds).qformer_output)


def test_a_frozen_language_model_drops_nothing_out(model, clouds):
    lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj"], init_lora_weights=False)
    model.language_model = get_peft_model(model.language_model, lora)
    expected = logits_of(model.eval(), clouds)
    select_parts(model, ["language_projection"])
    model.train()
    assert torch.equal(logits_of(model, clouds), expected)
    model.language_model.gradient_checkpointing_enable()
    model.train()
    assert any(module.training for module in model.language_model.modules())  # which recompute in training mode alone
    assert torch.equal(logits_of(model, clouds), expected)
    model.language_model.gradient_checkpointing_disable()
    select_parts(model, ["language_model_lora"])
    model.train()
    assert not torch.equal(logits_of(model, clouds), expected)


def test_blocks_that_drop_out_by_themselves_rest_while_they_are_recomputed(build_around):
    sizes = {"vocab_size": 260, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 40, "num_hidden_layers": 2}
    config = OPTConfig(**sizes, num_attention_heads=4, dropout=0.5, pad_token_id=256, init_std=0.2)
    model = build_around(config)
    ids = torch.arange(3, 12).unsqueeze(0)
    expected = model.eval()(input_ids=ids, use_cache=False).logits
    model.language_model.gradient_checkpointing_enable()
    select_parts(model, ["language_projection"])
    blocks = list(model.get_decoder().layers)
    for _ in range(2):
        model.train()
        assert all(block.training for block in blocks)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    model.eval()
    assert {block.dropout for block in blocks} == {0.5}, "as it was"


@pytest.mark.parametrize(
    ("names", "prefixes"),
    [
        (["point_mlp"], ("connector.point_mlp.",)),
        (["language_projection", "query_tokens"], ("connector.language_projection.", "connector.query_tokens")),
        (["language_model_lora"], None),
        (["language_model_lora", "language_model_norms"], None),
    ],
)
def test_gradient_reaches_only_what_trains(model, clouds, names, prefixes):
    with_lora(model)
    select_parts(model, names)
    model.train()
    batch = batch_of(PROMPTS)
    model(
        **batch, point_clouds=clouds, labels=batch["input_ids"].masked_fill(batch["input_ids"] == POINT, -100)
    ).loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    every_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    if prefixes is not None:
        wanted = {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    else:
        wanted = {n for n, _ in model.named_parameters() if ".lora_" in n}
        if "language_model_norms" in names:
            wanted |= {n for n, _ in model.named_parameters() if ".modules_to_save." in n}
            assert sum(".modules_to_save." in n for n in wanted) == 2 * 4 + 1
    assert every_gradient == wanted
    assert with_gradient == wanted


# Saving and loading


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["qformer", "mlp"])
def test_round_trip_self_contained(build_model, clouds, tmp_path, kind, tied):
    model = build_model(kind=kind, tied=tied)
    prompts = [[10, *cloud_ids(model.config.num_point_tokens), 11]]
    with torch.no_grad():
        expected = model(**batch_of(prompts), point_clouds=clouds[:1]).logits
    model.save_pretrained(tmp_path / "m")
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert not again.training
    assert torch.equal(again(**batch_of(prompts), point_clouds=clouds[:1]).logits, expected)
    embedding, head = again.get_input_embeddings().weight, again.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_self_contained_with_lora(build_model, clouds, tmp_path, tied):
    model = build_model(tied=tied)
    base = logits_of(model, clouds)
    with_lora(model)
    expected = logits_of(model, clouds)
    assert (expected - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "m")
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert torch.equal(logits_of(again, clouds), expected)
    assert not any(p.requires_grad for n, p in again.language_model.named_parameters() if ".lora_" in n)
    again.save_pretrained(tmp_path / "n")
    assert torch.equal(logits_of(PointAlignForConditionalGeneration.from_pretrained(tmp_path / "n"), clouds), expected)
    shutil.rmtree(tmp_path / "n" / "language_model_adapter")
    assert torch.equal(logits_of(PointAlignForConditionalGeneration.from_pretrained(tmp_path / "n"), clouds), base)
    trainable = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m", is_trainable=True)
    assert all(p.requires_grad for n, p in trainable.language_model.named_parameters() if ".lora_" in n)


def save_base(model, folder):
    model.language_model.save_pretrained(folder)
    model.config.language_model = str(folder)
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_round_trip_by_reference(build_model, clouds, tmp_path, lora, tied):
    model = build_model(tied=tied)
    save_base(model, tmp_path / "base")
    if lora:
        with_lora(model)
    expected = logits_of(model, clouds)
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path / "m")
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    own = sum(p.numel() for part in (model.point_encoder, model.connector) for p in part.parameters())
    assert size < 4 * own + 40_000
    assert json.loads((tmp_path / "m" / "config.json").read_text())["language_model"] == str(tmp_path / "base")
    again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert torch.equal(logits_of(again, clouds), expected)
    assert again.generation_config.max_new_tokens == 77
    assert not again.training
    # asked for, the same model becomes a folder that needs no other
    again.save_pretrained(tmp_path / "whole", self_contained=True)
    assert again.config.language_model == str(tmp_path / "base")
    shutil.rmtree(tmp_path / "base")
    whole = PointAlignForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert whole.config.language_model is None
    assert torch.equal(logits_of(whole, clouds), expected)
    with pytest.raises(CheckpointError, match="base"):
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")


def test_reduced_precision_reaches_every_part(model, clouds, tmp_path):
    for folder in ("whole", "by reference"):
        if folder == "by reference":
            save_base(model, tmp_path / "base")
        model.save_pretrained(tmp_path / folder)
        again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}, folder
        close = logits_of(again, clouds).float()
        exact = logits_of(model, clouds)
        assert (close - exact).norm() / exact.norm() < 0.1


def test_the_adapter_loads_with_plain_peft(model, tmp_path, clouds):
    base = save_base(model, tmp_path / "base")
    with_lora(model)
    model.save_pretrained(tmp_path / "m")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "m" / "language_model_adapter")
    )
    ids = torch.tensor([[10, 11, 12, 13]])
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    untouched = AutoModelForCausalLM.from_pretrained(base)(input_ids=ids).logits
    assert (untouched - model(input_ids=ids).logits).abs().max() > 1e-2


def test_a_guest_is_not_saved(model, clouds, tmp_path):
    expected = logits_of(model, clouds)
    names = set(plain_state_dict(model))
    AlignmentRegularizer(32, 24, layers=(2,)).attach(model)
    assert set(plain_state_dict(model)) == names
    model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits_of(PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m"), clouds), expected)


def test_grown_embeddings_come_back(build_model, clouds, tmp_path):
    for tied in (False, True):
        model = build_model(tied=tied)
        folder = tmp_path / f"base {tied}"
        save_base(model, folder)
        before = model.language_model(input_ids=torch.tensor([[1, 2, 3]])).logits
        fit_embeddings(model.language_model, 270)
        model.config.text_config.vocab_size = 270
        assert model.get_input_embeddings().weight.shape[0] == 270
        assert model.get_input_embeddings().weight[260:].abs().max() == 0
        assert model.get_output_embeddings().weight[260:].abs().max() == 0
        grown = model.language_model(input_ids=torch.tensor([[1, 2, 3]])).logits
        torch.testing.assert_close(grown[..., :260], before)
        expected = logits_of(model, clouds)
        for name, whole in (("by reference", False), ("whole", True)):
            model.save_pretrained(tmp_path / f"{name} {tied}", self_contained=whole)
            again = PointAlignForConditionalGeneration.from_pretrained(tmp_path / f"{name} {tied}")
            assert torch.equal(logits_of(again, clouds), expected), name


def test_an_adapter_of_a_grown_vocabulary_holds_the_adapter_alone(build_model, tmp_path):
    model = build_model()
    save_base(model, tmp_path / "base")
    fit_embeddings(model.language_model, 270)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model.language_model = get_peft_model(model.language_model, lora)
    model.save_pretrained(tmp_path / "m", self_contained=False)
    names = load_file(tmp_path / "m" / "language_model_adapter" / "adapter_model.safetensors").keys()
    assert names
    assert all(".lora_" in name for name in names)


def test_transformers_auto_classes_know_it(model, processor, tmp_path, clouds):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, clouds), logits_of(model, clouds))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), PointAlignProcessor)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), PointAlignConfig)


def truncate(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("share", [0.6, 0.0, 0.001])
def test_truncated_weights(model, tmp_path, by_reference, share):
    if by_reference:
        save_base(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "m")
    truncate(tmp_path / "m" / "model.safetensors", share)
    with pytest.raises(CheckpointError, match=r"copy (it|the checkpoint) again") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


@pytest.mark.parametrize("by_reference", [False, True])
def test_missing_weights_file(model, tmp_path, by_reference):
    if by_reference:
        save_base(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"copy (it|the checkpoint) again") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


@pytest.mark.parametrize("by_reference", [False, True])
@pytest.mark.parametrize("fault", ["lacks a tensor", "has another shape", "has one too many"])
def test_weights_that_do_not_fit(model, tmp_path, by_reference, fault):
    from safetensors.torch import load_file, save_file

    if by_reference:
        save_base(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    state = load_file(path)
    name = "connector.language_projection.0.weight"
    if fault == "lacks a tensor":
        del state[name]
    elif fault == "has another shape":
        state[name] = state[name][:-1].contiguous()
    else:
        state["connector.language_projection.7.weight"] = state[name].clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


def test_missing_config_and_missing_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config\.json") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)
    with pytest.raises(CheckpointError, match="found no checkpoint") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "nowhere")
    assert one_line(error)


def test_broken_config(model, tmp_path):
    model.save_pretrained(tmp_path / "m")
    truncate(tmp_path / "m" / "config.json", 0.5)
    with pytest.raises(CheckpointError) as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


@pytest.mark.parametrize("by_reference", [False, True])
def test_a_generation_config_that_is_cut_short(model, tmp_path, by_reference):
    if by_reference:
        save_base(model, tmp_path / "base")
    model.save_pretrained(tmp_path / "m")
    truncate(tmp_path / "m" / "generation_config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json.*copy the checkpoint again") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("share", [0.5, None])
def test_truncated_or_missing_adapter_file(model, tmp_path, file, share):
    with_lora(model)
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / "language_model_adapter" / file
    if share is None:
        path.unlink()
    else:
        truncate(path, share)
    with pytest.raises(CheckpointError, match="adapter") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)


def test_an_adapter_of_another_size(model, build_model, tmp_path):
    with_lora(model)
    model.save_pretrained(tmp_path / "m")
    other = with_lora(build_model(intermediate_size=48))
    other.save_pretrained(tmp_path / "n")
    shutil.rmtree(tmp_path / "m" / "language_model_adapter")
    shutil.copytree(tmp_path / "n" / "language_model_adapter", tmp_path / "m" / "language_model_adapter")
    with pytest.raises(CheckpointError, match="adapter") as error:
        PointAlignForConditionalGeneration.from_pretrained(tmp_path / "m")
    assert one_line(error)
