"""The core of answering: batches, sampling, streams and label probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pointalign.answering import generation
from pointalign.answering.answerer import Answerer, about_cloud
from pointalign.data.files import PointCloud
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.judges import CLASS_STEM, label_log_likelihoods
from pointalign.models.processing import PointAlignProcessor
from pointalign.options import Decoding

SHORT = Decoding(max_new_tokens=9)


@pytest.fixture
def answerer(model: Any, processor: Any) -> Answerer:
    return Answerer(model, processor, "tiny")


@pytest.fixture
def prepared(answerer: Answerer) -> list[torch.Tensor]:
    return [answerer.prepare(points) for points in np.random.default_rng(0).random((4, 60, 6))]


def test_a_batch_of_different_lengths_answers_as_one_by_one(answerer: Answerer, prepared: list[Any]) -> None:
    talks = [
        [about_cloud("What is this?")],
        [about_cloud("Colour?"), {"role": "assistant", "content": "red"}, {"role": "user", "content": "Are you sure?"}],
        [{"role": "user", "content": "No cloud here."}],
        [about_cloud("x" * 70)],
    ]
    shown = [prepared[:1], prepared[1:2], [], prepared[2:3]]
    together = answerer.reply(talks, [cloud for clouds in shown for cloud in clouds], SHORT)
    alone = [answerer.reply([talk], clouds, SHORT)[0] for talk, clouds in zip(talks, shown, strict=True)]
    assert together == alone
    assert len({said.text for said in alone}) == 4


def test_a_read_cloud_and_its_array_are_the_same(answerer: Answerer) -> None:
    points = np.random.default_rng(1).random((60, 6)).astype(np.float32)
    read = PointCloud(points[:, :3], points[:, 3:], "x.ply")
    assert torch.equal(answerer.prepare(read), answerer.prepare(points))
    plain = PointCloud(points[:, :3], None, "x.ply")
    assert torch.equal(answerer.prepare(plain), answerer.prepare(points[:, :3]))
    with pytest.raises(DataError, match=r"^x.ply: the cloud has 3 points"):
        answerer.prepare(PointCloud(points[:3, :3], None, "x.ply"))


def test_a_model_that_was_told_of_sizes_reads_the_unit(answerer: Answerer, tokenizer: Any) -> None:
    xyz = np.array([[0, 0, 0], [0, 3, 0]], dtype=np.float32).repeat(30, axis=0)
    sized = PointAlignProcessor(tokenizer, num_points=60, num_point_tokens=5, min_points=6, metric_size=True)
    read = PointCloud(xyz, None, "x.glb", unit=0.1)
    told = Answerer(answerer.model, sized).prepare(read)
    torch.testing.assert_close(told[:, 6], torch.full((60,), 0.15))
    assert not Answerer(answerer.model, sized).prepare(replace(read, unit=None))[:, 6].any()
    assert answerer.prepare(read).shape[1] == 6


def test_an_answer_stops_at_the_end_symbol_and_says_so(answerer: Answerer, prepared: list[Any]) -> None:
    cut = answerer.ask(prepared[:1], "What?", SHORT)[0]
    assert cut.truncated
    assert cut.tokens == 9
    ids = answerer.inputs([[about_cloud("What?")]], prepared[:1])
    first = int(answerer.model(**ids).logits[0, -1].argmax())
    answerer.model.generation_config.eos_token_id = first
    assert answerer.ask(prepared[:1], "What?", SHORT)[0][1:] == (1, False)


@pytest.mark.parametrize("refill", [True, False])
def test_an_end_symbol_that_is_an_ordinary_word_is_no_part_of_the_answer(
    answerer: Answerer, prepared: list[Any], monkeypatch: pytest.MonkeyPatch, refill: bool
) -> None:
    """Imported models end at words that hold "###", which decoding does not skip."""
    if not refill:
        monkeypatch.setattr(generation, "can_refill", lambda *_: False)
    talk, model, tokenizer = [about_cloud("What?")], answerer.model, answerer.processor.tokenizer
    inputs = answerer.inputs([talk] * 4, prepared)
    ids = model.generate(**inputs, max_new_tokens=9)[:, inputs["input_ids"].shape[1] :].tolist()
    end = ids[0][4]
    cut = [row[: row.index(end)] if end in row else row for row in ids]
    assert 0 < len(cut[0]) < 9
    model.generation_config.eos_token_id = [end]
    expected = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]
    assert [said.text for said in answerer.ask(prepared, "What?", SHORT)] == expected
    assert answerer.ask(prepared[:1], "What?", SHORT)[0].text == expected[0]
    assert "".join(answerer.stream(talk, prepared[:1], SHORT)) == expected[0]


def test_an_end_symbol_that_the_tokenizer_alone_knows_ends_answers(answerer: Answerer, prepared: list[Any]) -> None:
    talk, model, tokenizer = [about_cloud("What?")], answerer.model, answerer.processor.tokenizer
    whole = answerer.stream(talk, prepared[:1], SHORT)
    list(whole)
    ids = whole.output.sequences[0, -SHORT.max_new_tokens :].tolist()
    end = ids[4]
    model.generation_config.eos_token_id = None
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    stream = answerer.stream(talk, prepared[:1], SHORT)
    said = "".join(stream)
    assert said == answerer.ask(prepared[:1], "What?", SHORT)[0].text
    assert len(whole.output.sequences[0]) - len(stream.output.sequences[0]) == len(ids) - ids.index(end) - 1


def test_likelihoods_that_are_no_numbers_are_refused(answerer: Answerer, prepared: list[Any]) -> None:
    answerer.model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(
        DataError, match="the labels' likelihoods are no finite numbers; compute in bfloat16 or float32"
    ):
        answerer.probabilities(prepared, ["lamp", "chair"])


def test_chance_is_repeated_by_its_seed_and_leaves_the_callers_alone(answerer: Answerer, prepared: list[Any]) -> None:
    warm = Decoding(max_new_tokens=9, temperature=1.0, seed=3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = answerer.ask(prepared, "What?", warm)
    assert torch.equal(torch.rand(3), expected)
    assert answerer.ask(prepared, "What?", warm) == first
    assert answerer.ask(prepared, "What?", warm, number=1) != first
    assert answerer.ask(prepared, "What?", Decoding(max_new_tokens=9, temperature=1.0, seed=4)) != first


@pytest.mark.parametrize("decoding", [SHORT, Decoding(max_new_tokens=9, temperature=0.8, top_p=0.9, seed=1)])
def test_a_stream_is_the_answer_in_pieces(answerer: Answerer, prepared: list[Any], decoding: Decoding) -> None:
    for question in ("What?", "Colour?", "Tell me more."):
        pieces = list(answerer.stream([about_cloud(question)], prepared[:1], decoding))
        assert "".join(pieces) == answerer.ask(prepared[:1], question, decoding)[0].text
        assert len(pieces) > 1


def test_a_stream_that_nobody_reads_any_more_stops(answerer: Answerer, prepared: list[Any]) -> None:
    stream = answerer.stream([about_cloud("What?")], prepared[:1], Decoding(max_new_tokens=400))
    pieces = iter(stream)
    next(pieces)
    pieces.close()
    assert 1 <= stream.output.sequences.shape[1] - stream.arguments["input_ids"].shape[1] < 300
    assert stream.text


def test_what_goes_wrong_while_streaming_reaches_the_reader(answerer: Answerer, prepared: list[Any]) -> None:
    stream = answerer.stream([about_cloud("What?")], prepared[:1], SHORT)
    stream.arguments["point_clouds"] = stream.arguments["point_clouds"][:, :, :4]
    with pytest.raises(RuntimeError):
        list(stream)


def test_a_full_device_ends_a_stream_with_one_line(
    answerer: Answerer, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for name in ("get_input_embeddings", "generate"):
        stream = answerer.stream([about_cloud("What?")], prepared[:1], SHORT)
        with monkeypatch.context() as patch:
            patch.setattr(answerer.model, name, full)
            with pytest.raises((DataError, torch.OutOfMemoryError), match="memory"):
                list(stream)
    stream = answerer.stream([about_cloud("What?")], prepared[:1], SHORT)
    monkeypatch.setattr(answerer.model, "generate", full)
    with pytest.raises(DataError, match="the memory of the device does not hold 1 objects at a time"):
        list(stream)


def test_probabilities_are_the_softmax_of_evaluations_scores(answerer: Answerer, prepared: list[Any]) -> None:
    labels = ["chair", "table", "a lamp of glass"]
    found = answerer.probabilities(prepared, labels)
    scores = label_log_likelihoods(
        answerer.model,
        answerer.processor,
        prepared,
        "Which class of object is this?",
        CLASS_STEM,
        [" chair.", " table.", " a lamp of glass."],
    )
    torch.testing.assert_close(found, scores.softmax(dim=1))
    torch.testing.assert_close(found.sum(dim=1), torch.ones(4))
    alone = torch.cat([answerer.probabilities([cloud], labels) for cloud in prepared])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answerer.probabilities(prepared, ["chair"]), torch.ones(4, 1))


def test_clouds_must_fit_the_messages_and_messages_the_context(answerer: Answerer, prepared: list[Any]) -> None:
    with pytest.raises(DataError, match="1 point_cloud parts for 2 clouds"):
        answerer.reply([[about_cloud("What?")]], prepared[:2], SHORT)
    with pytest.raises(DataError, match="more than the language model's 512; shorten the question"):
        answerer.ask(prepared[:1], "x" * 600, SHORT)
    with pytest.raises(DataError, match="max_new_tokens"):
        answerer.ask(prepared[:1], "What?", Decoding(max_new_tokens=512))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "leaves no room"),
        ({"temperature": -1}, "give 0 .no chance. to 100"),
        ({"temperature": float("nan")}, "out of range"),
        ({"top_p": 0}, "more than 0 and at most 1"),
        ({"seed": -1}, "give 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Decoding(**settings)


def test_a_batch_too_large_for_the_memory_is_told(
    answerer: Answerer, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 GiB")

    monkeypatch.setattr(torch.nn.functional, "linear", full)
    for asked in (lambda: answerer.ask(prepared, "What?", SHORT), lambda: answerer.probabilities(prepared, ["a", "b"])):
        with pytest.raises(DataError, match=r"does not hold 4 objects at a time; lower batch_size$"):
            asked()
    with pytest.raises(DataError, match="compute elsewhere"):
        answerer.ask(prepared[:1], "What?", SHORT)
