"""From a recipe's data settings to clouds and conversations: nothing is left out unsaid."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pointalign.config import DataSet, DataSettings
from pointalign.data.conversations import CONVERSATION_TYPES, keep_fraction
from pointalign.data.household import MISSING_COLOR, load_household
from pointalign.data.household_split import household_sides
from pointalign.data.objaverse import BROKEN_OBJECTS, NumpyClouds
from pointalign.data.pack import pack_clouds
from pointalign.data.packed import PackedClouds
from pointalign.data.sources import HouseholdClouds, OptionalSizes, missing_color, open_training_data, unsized
from pointalign.errors import ConfigError, DataError


def make_entry(object_id, kind):
    return {
        "object_id": object_id,
        "conversation_type": kind,
        "conversations": [
            {"from": "human", "value": "<point>\nWhat?"},
            {"from": "gpt", "value": f"{object_id} {kind}"},
        ],
    }


@pytest.fixture
def world(tmp_path):
    """Clouds of objects 00 to 19, two instruction files about them, and settings that read both."""
    (tmp_path / "clouds").mkdir()
    for index in range(20):
        np.save(tmp_path / "clouds" / f"{index:02d}_8192.npy", np.full((4, 6), index / 20, dtype=np.float32))
    for name, kinds in (("brief", CONVERSATION_TYPES[:1]), ("complex", CONVERSATION_TYPES[1:])):
        entries = [make_entry(f"{index:02d}", kind) for index in range(20) for kind in kinds]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    return DataSettings(
        source=str(tmp_path / "clouds"),
        instructions=[str(tmp_path / "brief.json"), str(tmp_path / "complex.json")],
        sets=[DataSet(types=["simple_description"]), DataSet(types=["multi_round", "single_round"])],
    )


def add(settings, *object_ids):
    path = Path(settings.instructions[0])
    entries = json.loads(path.read_text())
    entries += [make_entry(object_id, "simple_description") for object_id in object_ids for _ in range(2)]
    path.write_text(json.dumps(entries))


def told(conversations):
    return [(conversation.object_id, conversation.kind) for conversation in conversations]


def test_all_files_and_the_types_that_are_mixed(world, capsys):
    clouds, conversations = open_training_data(world)
    assert isinstance(clouds, NumpyClouds)
    assert told(conversations) == [
        *((f"{index:02d}", "simple_description") for index in range(20)),
        *((f"{index:02d}", kind) for index in range(20) for kind in ("single_round", "multi_round")),
    ]
    assert capsys.readouterr().err == ""


def test_a_share_of_the_objects(world):
    world.fraction = 0.5
    _, half = open_training_data(world)
    assert len(half.object_ids) == 10
    assert len(half) == 30
    world.fraction = 0.1
    _, tenth = open_training_data(world)
    assert set(tenth.object_ids) < set(half.object_ids)


def test_packed_clouds_train_the_same(world, tmp_path):
    _, before = open_training_data(world)
    pack_clouds(world.source, tmp_path / "packed")
    world.source = str(tmp_path / "packed")
    clouds, after = open_training_data(world)
    assert isinstance(clouds, PackedClouds)
    assert list(after) == list(before)
    assert np.array_equal(clouds["07"], NumpyClouds(tmp_path / "clouds")["07"])


def test_objects_with_broken_colours_are_left_out_and_said(world, capsys):
    assert sorted(BROKEN_OBJECTS) == ["6760e543e1d645d5aaacd3803bcae524", "b91c0711149d460a8004f9c06d3b7f38"]
    _, before = open_training_data(world)
    add(world, *BROKEN_OBJECTS)
    _, after = open_training_data(world)
    assert list(after) == list(before)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "left out 4 conversations about 2 objects whose published colours are broken: "
        "6760e543e1d645d5aaacd3803bcae524, b91c0711149d460a8004f9c06d3b7f38"
    ]


def test_one_process_of_several_speaks(world, capsys, monkeypatch):
    add(world, *BROKEN_OBJECTS)
    monkeypatch.setenv("RANK", "1")
    _, conversations = open_training_data(world)
    assert len(conversations) == 60
    assert capsys.readouterr().err == ""


def test_missing_clouds_are_refused_by_name(world, tmp_path):
    add(world, "zz", "aa", "mm", "bb")
    with pytest.raises(DataError) as error:
        open_training_data(world, tmp_path / "run")
    message = str(error.value)
    assert f"4 of 24 objects have no cloud in {world.source} (first: aa, bb, mm); complete the folder" in message
    assert "data.skip_missing" in message
    assert f"all names are in {tmp_path / 'run' / 'missing_clouds.txt'}" in message
    assert "\n" not in message
    assert (tmp_path / "run" / "missing_clouds.txt").read_text() == "aa\nbb\nmm\nzz\n"
    with pytest.raises(DataError, match="`pointalign data check` lists them all"):
        open_training_data(world)


def test_a_run_without_them_says_so_and_lists_them(world, tmp_path, capsys):
    _, before = open_training_data(world)
    add(world, "zz", "aa")
    world.skip_missing = True
    _, after = open_training_data(world, tmp_path / "run")
    assert list(after) == list(before)
    said = capsys.readouterr().err
    assert "2 of 22 objects have no cloud" in said
    assert "(first: aa, zz); going on without them, all names are in" in said
    assert (tmp_path / "run" / "missing_clouds.txt").read_text() == "aa\nzz\n"
    assert list(open_training_data(world, tmp_path / "run")[1]) == list(before)


def test_a_run_goes_on_with_the_clouds_it_was_started_with(world, tmp_path):
    world.skip_missing = True
    open_training_data(world, tmp_path / "run")
    assert (tmp_path / "run" / "missing_clouds.txt").read_text() == ""
    (tmp_path / "clouds" / "03_8192.npy").rename(tmp_path / "03")
    with pytest.raises(
        ConfigError, match=r"started while other clouds were missing .*missing_clouds\.txt.*name another --out"
    ):
        open_training_data(world, tmp_path / "run")
    assert (tmp_path / "run" / "missing_clouds.txt").read_text() == ""
    (tmp_path / "03").rename(tmp_path / "clouds" / "03_8192.npy")
    open_training_data(world, tmp_path / "run")


def test_the_list_goes_when_the_folder_is_complete(world, tmp_path):
    (tmp_path / "clouds" / "03_8192.npy").rename(tmp_path / "03")
    with pytest.raises(DataError, match="1 of 20 objects"):
        open_training_data(world, tmp_path)
    (tmp_path / "03").rename(tmp_path / "clouds" / "03_8192.npy")
    open_training_data(world, tmp_path)
    assert not (tmp_path / "missing_clouds.txt").exists()


def test_no_cloud_at_all_is_refused_all_the_same(world, tmp_path):
    for path in (tmp_path / "clouds").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    world.skip_missing = True
    with pytest.raises(DataError, match="20 of 20 objects have no cloud"):
        open_training_data(world, tmp_path)


def test_only_the_objects_that_are_used_need_a_cloud(world, tmp_path):
    world.fraction = 0.5
    _, half = open_training_data(world)
    unused = next(f"{index:02d}" for index in range(20) if f"{index:02d}" not in half.object_ids)
    (tmp_path / "clouds" / f"{unused}_8192.npy").unlink()
    assert list(open_training_data(world)[1]) == list(half)


def test_a_folder_needs_instructions(world):
    world.instructions = []
    with pytest.raises(ConfigError, match=r"data\.instructions must name PointLLM-format JSON files"):
        open_training_data(world)


def test_household_is_its_training_split():
    clouds, conversations = open_training_data(DataSettings(sets=[DataSet(types=["simple_description"])]))
    assert isinstance(clouds, HouseholdClouds)
    assert len(conversations.object_ids) == 720
    assert all(object_id in clouds for object_id in conversations.object_ids)
    assert clouds[conversations.object_ids[0]].shape == (2048, 7)
    with pytest.raises(DataError, match="household has no object 'nobody'"):
        clouds["nobody"]


def test_missing_color_is_what_the_training_clouds_have_where_there_was_none():
    """The models of the railings have no material at all."""
    railings = [thing for thing in load_household("train") if "pedestrianrailing" in thing.id]
    assert len(railings) == 2
    for thing in railings:
        np.testing.assert_allclose(thing.points[:, 3:], np.tile(missing_color(DataSettings()), (2048, 1)), atol=1e-7)
    assert missing_color(DataSettings()) == MISSING_COLOR
    assert missing_color(DataSettings(source="clouds")) == (0, 0, 0)


def test_extra_objects_join_households_training_side(tmp_path, write_extra):
    path = write_extra(tmp_path / "extra.parquet", ["a wolf", "a bear"])
    clouds, conversations = open_training_data(DataSettings(extra=str(path)))
    assert {"extra-0", "extra-1"} < set(conversations.object_ids)
    assert len(set(conversations.object_ids)) == 722
    assert clouds["extra-1"].shape == (2048, 7)
    assert not clouds["extra-1"][:, 6].any(), "nobody says how large it is"
    assert any("bear" in str(talk.messages[-1]["content"]) for talk in conversations if talk.object_id == "extra-1")
    plain, _ = open_training_data(DataSettings())
    assert clouds.fingerprint != plain.fingerprint


def test_extra_objects_elsewhere_are_refused(world, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.extra joins household's objects"):
        open_training_data(replace(world, extra="extra.parquet"))
    with pytest.raises(DataError, match="absent"):
        open_training_data(DataSettings(extra=str(tmp_path / "absent.parquet")))


def test_a_fold_that_is_held_out_is_not_trained_on():
    held = {thing.id for thing in household_sides("fold-1")[1]}
    _, conversations = open_training_data(DataSettings(held_out="fold-1"))
    assert held.isdisjoint(conversations.object_ids)
    assert len(set(conversations.object_ids)) == 820 - len(held)


@pytest.mark.parametrize("kind", CONVERSATION_TYPES)
def test_a_share_of_household_is_of_the_same_objects_for_every_type(kind):
    settings = DataSettings(fraction=0.1, sets=[DataSet(types=[kind])])
    _, conversations = open_training_data(settings)
    assert set(conversations.object_ids) == keep_fraction((thing.id for thing in load_household("train")), 0.1)


def test_clouds_with_and_without_their_size(world):
    thing = load_household("test")[0]
    both = OptionalSizes(HouseholdClouds([thing]))
    assert thing.id in both
    assert unsized(thing.id) in both
    assert "nothing" not in both
    assert np.array_equal(both[thing.id], thing.sized_points)
    assert np.array_equal(both[unsized(thing.id)], thing.points)
    plain, _ = open_training_data(world)
    assert np.array_equal(OptionalSizes(plain)[unsized("03")], plain["03"])
    with pytest.raises(DataError, match="no object 'nothing'"):
        both[unsized("nothing")]


def test_the_fields_held_out_objects_are_not_trained_on(world, capsys):
    """Where their list lies beside the instructions, with or without a byte order mark."""
    brief = Path(world.instructions[0])
    brief.with_name("val_object_ids_3000.txt").write_text("07\n11\nnobody\n", encoding="utf-8-sig")
    _, conversations = open_training_data(world)
    about = {conversation.object_id for conversation in conversations}
    assert len(about) == 18
    assert not about & {"07", "11"}
    said = capsys.readouterr().err
    assert f"left out 2 conversations of {brief} about 2 held-out objects" in said
