"""The processor: what the model reads of clouds and chats, and what it is taught to write."""

import warnings

import numpy as np
import pytest
import torch

from pointalign.data.files import PointCloud
from pointalign.errors import CheckpointError, ConfigError, DataError
from pointalign.models.chat_text import choose_point_token
from pointalign.models.processing import PointAlignProcessor, load_processor

Q, POINT, PAD, END = 5, 259, 256, 258
CHAT = [
    {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A red mug."},
    {"role": "user", "content": "How big?"},
    {"role": "assistant", "content": " Small; holds\ntea. "},
]
ANSWERS = ["A red mug.<|im_end|>", " Small; holds\ntea. <|im_end|>"]


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


# Chats


def test_segments_join_to_the_template_and_mark_the_answers(processor, tokenizer):
    segments = processor.render(CHAT)
    assert [s.text for s in segments if s.is_answer] == ANSWERS
    rendered = tokenizer.apply_chat_template(
        [{**CHAT[0], "content": "<point>" * Q + "\nWhat is it?"}, *CHAT[1:]], tokenize=False
    )
    assert "".join(s.text for s in segments) == rendered
    assert segments[0].text == f"<|im_start|>user\n{'<point>' * Q}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"


def test_labels_are_the_answers_and_the_end_of_their_turns(processor, tokenizer):
    encoded = processor.encode(CHAT)
    assert len(encoded["input_ids"]) == len(encoded["labels"])
    pairs = list(zip(encoded["input_ids"], encoded["labels"], strict=True))
    assert all(label in (-100, token) for token, label in pairs)
    assert text_of(tokenizer, [token for token, label in pairs if label != -100]) == "".join(ANSWERS)
    assert [token for token, _ in pairs].count(POINT) == Q
    assert POINT not in encoded["labels"]
    assert encoded["labels"].count(END) == 2


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_prompts_have_the_same_ids_in_training_and_in_answering(build_tokenizer, system):
    processor = PointAlignProcessor(build_tokenizer(), num_points=8, num_point_tokens=Q, system_prompt=system)
    training = processor.encode(CHAT)
    for turns in (1, 3):
        prompt = processor.encode(CHAT[:turns], add_generation_prompt=True)
        assert training["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
        assert training["labels"][len(prompt["input_ids"])] != -100
        assert training["labels"][len(prompt["input_ids"]) - 1] == -100
        assert set(prompt["labels"]) == ({-100} if turns == 1 else {-100, *prompt["labels"]})


def test_training_and_apply_chat_template_agree(processor, clouds):
    prompt = processor.apply_chat_template(CHAT[:1], points=clouds[0])
    training = processor.encode(CHAT)["input_ids"]
    assert prompt["input_ids"][0].tolist() == training[: prompt["input_ids"].shape[1]]
    assert prompt["point_clouds"].shape == (1, 48, 6)


def test_a_system_prompt_is_put_in_front_unless_there_is_one(tokenizer):
    processor = PointAlignProcessor(tokenizer, num_point_tokens=1, system_prompt="Be brief.")
    text = processor.apply_chat_template(CHAT[2:3], tokenize=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHow big?")
    own = [{"role": "system", "content": "Be long."}, CHAT[2]]
    text = processor.apply_chat_template(own, tokenize=False)
    assert "Be brief." not in text
    assert text.count("system") == 1
    empty = PointAlignProcessor(tokenizer, num_point_tokens=1, system_prompt="")
    assert empty.apply_chat_template(CHAT[2:3], tokenize=False).startswith("<|im_start|>system\n<|im_end|>")


def test_prefix_and_suffix_surround_the_cloud(tokenizer):
    processor = PointAlignProcessor(tokenizer, num_point_tokens=2, point_prefix="<PC>", point_suffix="</PC> ")
    assert processor.apply_chat_template(CHAT[:1], tokenize=False).startswith(
        "<|im_start|>user\n<PC><point><point></PC> What is it?"
    )


def test_the_default_template_for_tokenizers_without_one(build_tokenizer):
    processor = PointAlignProcessor(build_tokenizer(chat_template=None), num_point_tokens=2)
    chat = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert [(s.text, s.is_answer) for s in processor.render(chat)] == [
        ("<|im_start|>Be brief.\n[INST] <point><point>\nWhat is it? [/INST]", False),
        ("A red mug.<|im_end|>", True),
        ("[INST] How big? [/INST]", False),
        (" Small; holds\ntea. <|im_end|>", True),
    ]


def test_a_chat_template_that_rewrites_earlier_turns_is_refused(build_tokenizer):
    rewriting = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and not loop.last %}<|im_start|>assistant\n..."
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = PointAlignProcessor(build_tokenizer(chat_template=rewriting), num_point_tokens=1)
    processor.render(CHAT[:2])
    with pytest.raises(DataError, match=r"^this tokenizer's chat template rewrites earlier turns, [^\n]+$"):
        processor.render(CHAT)
    # An answer to it is written all the same: nothing is learnt from the earlier turns.
    asked = processor.render(CHAT[:3], add_generation_prompt=True)
    assert [(s.text, s.is_answer) for s in asked] == [(processor.apply_chat_template(CHAT[:3], tokenize=False), False)]
    assert "assistant\n..." in asked[0].text
    assert asked[0].text.endswith("<|im_start|>user\nHow big?<|im_end|>\n<|im_start|>assistant\n")
    own = PointAlignProcessor(
        build_tokenizer(chat_template=rewriting), num_point_tokens=1, chat_template=build_tokenizer().chat_template
    )
    assert [s.text for s in own.render(CHAT) if s.is_answer] == ANSWERS


@pytest.mark.parametrize("content", ["what is <point>?", [{"type": "text", "text": "what is <point>?"}]])
def test_words_that_spell_the_point_token_are_refused(processor, content):
    with pytest.raises(DataError, match=r"^a text holds <point>, the token that stands for a cloud; [^\n]+$"):
        processor.render([{"role": "user", "content": content}])


def test_an_answer_that_ends_in_the_generation_prompt(processor):
    chat = [*CHAT[:3], {"role": "assistant", "content": ""}]
    assert [s.text for s in processor.render(chat) if s.is_answer] == [ANSWERS[0], "<|im_end|>"]


# Batches


def test_padding_sides(processor, clouds):
    chats = [CHAT[:1], [{"role": "user", "content": "Hi"}]]
    left = processor.apply_chat_template(chats, points=[clouds[0]])
    right = processor.apply_chat_template(chats, points=[clouds[0]], padding_side="right")
    short = processor.encode(chats[1], add_generation_prompt=True)["input_ids"]
    width = left["input_ids"].shape[1]
    assert left["input_ids"][1].tolist() == [PAD] * (width - len(short)) + short
    assert left["attention_mask"][1].tolist() == [0] * (width - len(short)) + [1] * len(short)
    assert right["input_ids"][1].tolist() == short + [PAD] * (width - len(short))
    assert right["attention_mask"][1].tolist() == [1] * len(short) + [0] * (width - len(short))
    assert left["attention_mask"][0].tolist() == [1] * width


def test_padding_without_a_pad_token_uses_the_end(build_tokenizer):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    processor = PointAlignProcessor(tokenizer, num_point_tokens=1)
    assert processor.pad([[1, 2], [3]], "right").tolist() == [[1, 2], [3, END]]
    assert processor.pad([[1, 2], [3]], "left", -100).tolist() == [[1, 2], [-100, 3]]


def test_calling_with_text_writes_each_placeholder_out(processor, clouds, tokenizer):
    batch = processor(text=["<point>What?", "Two: <point><point>"], points=list(clouds[:3]))
    assert text_of(tokenizer, batch["input_ids"][0].tolist()).endswith("<point>" * Q + "What?")
    assert text_of(tokenizer, batch["input_ids"][1].tolist()) == "Two: " + "<point>" * 2 * Q
    assert batch["point_clouds"].shape == (3, 48, 6)
    assert torch.equal(batch["point_clouds"][1], processor.prepare_points(clouds[1]))
    assert "point_clouds" not in processor(text="no cloud")


def test_wrong_numbers_of_clouds_are_refused(processor, clouds):
    with pytest.raises(DataError, match="the prompts hold 1 <point> but 2 clouds were given"):
        processor(text="<point> x", points=list(clouds[:2]))
    with pytest.raises(DataError, match="a point_cloud part has no points and none are left"):
        processor.apply_chat_template(CHAT[:1])
    with pytest.raises(DataError, match="1 clouds are left over"):
        processor.apply_chat_template(CHAT[:1], points=list(clouds[:2]))


def test_clouds_may_lie_in_their_messages(processor, clouds):
    chat = [
        {
            "role": "user",
            "content": [{"type": "point_cloud", "points": clouds[0].numpy()}, {"type": "text", "text": "a"}],
        }
    ]
    mixed = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "point_cloud", "points": clouds[2]}]}]
    batch = processor.apply_chat_template([chat, mixed], points=[clouds[1]])
    for got, wanted in zip(batch["point_clouds"], clouds[:3], strict=True):
        assert torch.equal(got, processor.prepare_points(wanted))


def test_unknown_options_are_refused(processor):
    with pytest.raises(ConfigError, match="no option 'images'"):
        processor(text="x", images=[1])
    with pytest.raises(ConfigError, match="no option 'max_length'"):
        processor.apply_chat_template(CHAT[2:3], max_length=3)


# Clouds


def test_a_cloud_is_centred_scaled_and_keeps_its_colours(processor, clouds):
    moved = clouds[0].clone()
    moved[:, :3] = moved[:, :3] * 7 + 3
    got = processor.prepare_points(moved.double().numpy())
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, clouds[0], rtol=0, atol=1e-6)


def test_more_points_are_cut_by_farthest_point_sampling(processor):
    generator = torch.Generator().manual_seed(0)
    cloud = torch.cat([torch.randn(100, 3, generator=generator), torch.rand(100, 3, generator=generator)], dim=1)
    got = processor.prepare_points(cloud)
    chosen, distances = [0], (cloud[:, :3] - cloud[0, :3]).double().square().sum(1)
    while len(chosen) < 48:
        chosen.append(int(distances.argmax()))
        distances = torch.minimum(distances, (cloud[:, :3] - cloud[chosen[-1], :3]).double().square().sum(1))
    assert torch.equal(got[:, 3:], cloud[chosen, 3:])
    xyz = cloud[chosen, :3] - cloud[chosen, :3].mean(0)
    torch.testing.assert_close(got[:, :3], xyz / xyz.norm(dim=1).max(), rtol=0, atol=1e-6)


def test_fewer_points_are_filled_up_from_the_first_on(processor, clouds):
    got = processor.prepare_points(clouds[0, :20])
    assert got.shape == (48, 6)
    assert torch.equal(got[:20], got[20:40])
    assert torch.equal(got[:8], got[40:])
    assert torch.equal(got[:20, 3:], clouds[0, :20, 3:])


def test_missing_colours(tokenizer, clouds):
    processor = PointAlignProcessor(tokenizer, num_points=48, missing_color=(0.25, 0.5, 0.75))
    got = processor.prepare_points(clouds[0, :, :3])
    assert got.shape == (48, 6)
    assert torch.equal(got[:, 3:], torch.tensor([0.25, 0.5, 0.75]).expand(48, 3))


def test_colours_up_to_255_are_scaled_with_a_warning(processor, clouds):
    bytes_ = clouds[0].clone()
    bytes_[:, 3:] = (bytes_[:, 3:] * 255).round()
    with pytest.warns(UserWarning, match="are taken as 0-255 and divided by 255"):
        got = processor.prepare_points(bytes_)
    torch.testing.assert_close(got[:, 3:], bytes_[:, 3:] / 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.prepare_points(clouds[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:, :4], r"shape \(points, 3\) or \(points, 6\).* \(48, 4\)"),
        (lambda c: c[None], r"this one has \(1, 48, 6\)"),
        (lambda c: c[0], r"this one has \(6,\)"),
        (lambda c: c[:0], "the cloud has 0 points; this model needs at least 6"),
        (lambda c: c[:5], "the cloud has 5 points; this model needs at least 6"),
        (lambda c: [], "this one has"),
        (lambda c: [[1.0, 2.0, 3.0], [1.0]], "shape"),
        (lambda c: "cloud.npy", "shape"),
        (lambda c: [["a", "b", "c"]] * 10, "number"),
        (lambda c: c * torch.tensor([1, 1, 1, -1, 1, 1]), "colours lie between"),
        (lambda c: c * torch.tensor([1, 1, 1, 500, 1, 1]), "colours lie between"),
        (lambda c: c * torch.tensor([1, 1, 1, 1.9, 1, 1]), "colours lie between"),
    ],
)
def test_bad_clouds_are_refused_in_one_line(processor, clouds, change, message):
    with pytest.raises(DataError, match=message) as error:
        processor.prepare_points(change(clouds[0]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_are_not_finite_are_refused(processor, clouds, value):
    cloud = clouds[0].double().numpy()
    cloud[7, 1] = cloud[9, 4] = value
    with pytest.raises(DataError, match=r"2 of 48 points hold NaN or infinite values \(first: row 7\)"):
        processor.prepare_points(cloud)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c[::-1].copy()[::-1],
        lambda c: c.astype(">f4"),
        lambda c: c.astype(np.float16),
        lambda c: np.asfortranarray(c),
        lambda c: c.tolist(),
        lambda c: torch.tensor(c, dtype=torch.bfloat16),
        lambda c: torch.tensor(c, requires_grad=True),
    ],
    ids=["negative strides", "big-endian", "half", "fortran", "list", "bfloat16", "with gradient"],
)
def test_clouds_of_any_memory_layout(processor, clouds, change):
    cloud = clouds[0].numpy()
    got = processor.prepare_points(change(cloud))
    assert not got.requires_grad
    torch.testing.assert_close(got, processor.prepare_points(cloud), rtol=0, atol=1e-2)


def test_the_callers_cloud_is_left_as_it_was(processor, clouds):
    cloud = clouds[0].numpy().copy()
    cloud.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor.prepare_points(cloud)
    assert np.array_equal(cloud, clouds[0].numpy())


# Saving, and the placeholder


def sized_processor(tokenizer):
    return PointAlignProcessor(tokenizer, num_points=40, num_point_tokens=5, min_points=6, metric_size=True)


def test_the_radius_in_metres_of_a_cloud_whose_unit_is_known(tokenizer):
    sized = sized_processor(tokenizer)
    # Two points 80 cm apart, in centimetres and far from the origin: a radius of 40 cm.
    ends = np.array([[1000, 0, 0], [1080, 0, 0]], dtype=np.float32).repeat(20, axis=0)
    cloud = np.concatenate([ends, np.full((40, 3), 0.5), np.full((40, 1), 0.01)], axis=1)
    prepared = sized.prepare_points(cloud)
    assert prepared.shape == (40, 7)
    torch.testing.assert_close(prepared[:, 6], torch.full((40,), 0.4))
    torch.testing.assert_close(prepared[:, 0].abs(), torch.ones(40))
    in_metres = np.concatenate([ends / 100, cloud[:, 3:6], np.ones((40, 1))], axis=1)
    torch.testing.assert_close(sized.prepare_points(in_metres), prepared)


def test_without_a_unit_the_radius_is_unknown_and_without_sizes_the_unit_is_dropped(tokenizer, processor, clouds):
    sized = sized_processor(tokenizer)
    for cloud in (clouds[0], clouds[0][:, :3]):
        assert not sized.prepare_points(cloud)[:, 6].any()
    known = np.concatenate([np.asarray(clouds[0]), np.full((len(clouds[0]), 1), 0.01)], axis=1)
    assert torch.equal(processor.prepare_points(known), processor.prepare_points(clouds[0]))


def test_a_cloud_that_was_read_from_a_file_is_taken_as_it_is(tokenizer, processor, clouds):
    points = clouds[0].numpy()
    read = PointCloud(points[:, :3], None, "a.stl", unit=0.01)
    batch = sized_processor(tokenizer)("<point>What?", points=read)
    assert (batch["point_clouds"][0, :, 6] > 0).all(), "the size of a cloud without colour"
    assert torch.equal(
        processor("<point>What?", points=[read])["point_clouds"][0], processor.prepare_points(points[:, :3])
    )
    with pytest.raises(DataError, match=r"^a\.stl: the cloud has 2 points"):
        processor.prepare_points(PointCloud(points[:2, :3], None, "a.stl"))


@pytest.mark.parametrize("unit", [[-0.01], [0.01, 0.02], [np.nan]])
def test_units_that_cannot_be(tokenizer, clouds, unit):
    column = np.resize(unit, (len(clouds[0]), 1))
    with pytest.raises(DataError, match="seventh column" if np.isfinite(unit).all() else "NaN"):
        sized_processor(tokenizer).prepare_points(np.concatenate([np.asarray(clouds[0]), column], axis=1))


def test_save_and_load(build_tokenizer, tmp_path, clouds):
    processor = PointAlignProcessor(
        build_tokenizer(),
        num_points=48,
        num_point_tokens=Q,
        min_points=6,
        point_prefix="<PC>",
        point_suffix="</PC> ",
        system_prompt="Be brief.",
        missing_color=(0.1, 0.2, 0.3),
    )
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    again = load_processor(str(tmp_path))
    settings = ["num_points", "num_point_tokens", "min_points", "point_token", "point_token_id"]
    for name in [*settings, "point_prefix", "point_suffix", "system_prompt", "missing_color"]:
        assert getattr(again, name) == getattr(processor, name), name
    assert again.encode(CHAT) == processor.encode(CHAT)
    assert torch.equal(again.prepare_points(clouds[0, :, :3]), processor.prepare_points(clouds[0, :, :3]))


def test_default_template_is_saved_too(build_tokenizer, tmp_path):
    processor = PointAlignProcessor(build_tokenizer(chat_template=None), num_points=8, num_point_tokens=2)
    processor.save_pretrained(tmp_path)
    assert PointAlignProcessor.from_pretrained(tmp_path).encode(CHAT) == processor.encode(CHAT)


def test_a_folder_without_a_processor(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="processor") as error:
        load_processor(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "share"),
    [
        ("tokenizer.json", 0.5),
        ("processor_config.json", 0.5),
        ("chat_template.jinja", 0.5),
        ("chat_template.jinja", 0.0),
    ],
)
def test_a_processor_that_is_cut_short(processor, tmp_path, file, share):
    processor.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="again") as error:
        load_processor(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_the_point_token_is_refused(build_tokenizer):
    with pytest.raises(ConfigError, match=r"does not know the point token '<point>'"):
        PointAlignProcessor(build_tokenizer(special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"]))


BARE = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def test_choose_the_token_that_the_user_wants(build_tokenizer):
    tokenizer = build_tokenizer(special_tokens=BARE)
    assert choose_point_token(tokenizer, 1000, wanted="<pc>") == "<pc>"
    assert tokenizer("<pc><pc>")["input_ids"] == [259, 259]
    assert "<point>" not in tokenizer.get_vocab()
    before = len(tokenizer)
    assert choose_point_token(tokenizer, 0, wanted="<|im_end|>") == "<|im_end|>"
    assert len(tokenizer) == before


def test_choose_point_where_the_vocabulary_has_it(build_tokenizer):
    tokenizer = build_tokenizer(special_tokens=[*BARE, "<reserved>", "<point>"])
    before = len(tokenizer)
    assert choose_point_token(tokenizer, before) == "<point>"
    assert len(tokenizer) == before


def test_choose_point_in_an_unused_row(build_tokenizer):
    tokenizer = build_tokenizer(special_tokens=[*BARE, "<reserved>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<reserved>"]})
    assert choose_point_token(tokenizer, 261) == "<point>"
    assert tokenizer("<point>")["input_ids"] == [260]
    assert tokenizer("<reserved>")["input_ids"] == [259]
    assert "<reserved>" in tokenizer.all_special_tokens, "tokens that had a role keep it"


def test_choose_a_reserved_token_where_no_row_is_free(build_tokenizer):
    special = [*BARE, "<r0>", "<r1>", "<r2>"]
    tokenizer = build_tokenizer(special_tokens=special, chat_template="{{ '<r2>' }}{{ messages[0]['content'] }}")
    assert choose_point_token(tokenizer, 262) == "<r1>"
    assert len(tokenizer) == 262
    assert tokenizer("<r1>")["input_ids"] == [260]


def test_choose_a_new_row_at_last_and_the_model_grows(build_tokenizer, build_model):
    from pointalign.models.checkpoint import fit_embeddings

    tokenizer = build_tokenizer(special_tokens=BARE)
    model = build_model(vocab_size=259)
    assert choose_point_token(tokenizer, model.get_input_embeddings().weight.shape[0]) == "<point>"
    assert tokenizer.convert_tokens_to_ids("<point>") == 259
    assert tokenizer("<|im_end|><point>")["input_ids"] == [258, 259]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    fit_embeddings(model.language_model, len(tokenizer))
    assert model.get_input_embeddings().weight.shape[0] == 260
