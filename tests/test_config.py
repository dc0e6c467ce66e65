"""Recipes: what is written is what is read, and what is wrong is named."""

import dataclasses
import typing

import pytest
import yaml

from pointalign.config import (
    AlignmentSettings,
    DataSet,
    OptimizerSettings,
    Recipe,
    from_dict,
    load_recipe,
    recipe_names,
    to_yaml,
)
from pointalign.errors import ConfigError


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_round_trip_of_every_value(tmp_path):
    recipe = Recipe(
        name="größe",
        trains=["connector"],
        alignment=AlignmentSettings(weight=0.1, layers=[4, 15], loss="l2"),
        optimizer=OptimizerSettings(learning_rate=1e-4, warmup_start=3e-7, max_grad_norm=0),
    )
    recipe.data.sets = [DataSet(types=["single_round"], odds=2.5, batch_size=6), DataSet()]
    recipe.lora.target_modules = ["q_proj", "dense"]
    recipe.model.system_prompt = "Be brief: answer # in one line\n"
    recipe.model.start_from = "123"
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe
    assert load_recipe(write(tmp_path, to_yaml(Recipe()))) == Recipe()
    assert load_recipe(write(tmp_path, "")) == Recipe()
    assert load_recipe(str(write(tmp_path, "# nothing but a comment\n"))) == Recipe()


def test_the_defaults_are_the_published_values():
    recipe = Recipe()
    assert recipe.optimizer == OptimizerSettings(10_000, 3e-6, 1e-7, 1_000, 1e-7, 0.05, 0.999, 1.0, 1)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (64, 16, 0.05)
    assert (recipe.alignment.layers, recipe.alignment.loss, recipe.alignment.depth) == ([15], "cosine", 3)
    assert recipe.alignment.target == "qformer"
    assert recipe.trains == ["language_model_lora", "language_model_norms"]
    assert recipe.seed == 42


def test_numbers_that_yaml_reads_as_text(tmp_path):
    text = "optimizer: {learning_rate: 1e-4, max_steps: '10_000', weight_decay: 0, warmup_start: 1.e-7}\nseed: 0x10\n"
    assert yaml.safe_load("x: 1e-4")["x"] == "1e-4", "the reason for the conversion"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.optimizer.learning_rate == 1e-4
    assert recipe.optimizer.max_steps == 10_000
    assert isinstance(recipe.optimizer.weight_decay, float)
    assert recipe.optimizer.warmup_start == 1e-7
    assert recipe.seed == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 1", r"unknown key 'sed'; did you mean 'seed'\?"),
        ("optimizer: {learning_rat: 1}", r"optimizer: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
        ("data: {sets: [{odd: 1}]}", r"unknown key 'odd'; did you mean 'odds'\?"),
        ("model: {connector: {kindd: mlp}}", r"did you mean 'kind'\?"),
        ("alignment: {zzz: 1}", "unknown key 'zzz'; known are weight, layers"),
        ("3: 1", "unknown key 3"),
        ("seed: 1.5", "seed is a int; got 1.5"),
        ("seed: many", "seed is a int; got 'many'"),
        ("seed: true", "seed is a int; got True"),
        ("seed:", "seed is a int; got None"),
        ("optimizer: {learning_rate: fast}", "learning_rate is a float; got 'fast'"),
        ("optimizer: {learning_rate: false}", "learning_rate is a float; got False"),
        ("optimizer: {learning_rate: [1]}", "learning_rate is a float"),
        ("optimizer: 3", "optimizer holds settings of its own"),
        ("name: 3", "name is a str; got 3"),
        ("gradient_checkpointing: 1", "gradient_checkpointing is a bool; got 1"),
        ("gradient_checkpointing: 'yes'", "gradient_checkpointing is a bool"),
        ("trains: connector", "trains is a list; got 'connector'"),
        ("trains: [1]", "trains is a str; got 1"),
        ("stage: third", "stage is one of encoder, language; got 'third'"),
        ("alignment: {loss: [cosine]}", "loss is one of cosine, l1, l2"),
        ("lora: {target_modules: some}", "target_modules cannot be 'some'"),
        ("model: {start_from: 5}", "start_from cannot be 5"),
        ("- 1", "must hold `key: value` lines, not a list"),
        ("just words", "must hold `key: value` lines, not a str"),
        ("a: [1", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(error.value)
    assert "recipe.yaml" in str(error.value)


@pytest.mark.parametrize("content", [b"name: \xff\xfe", b"name: \x00"])
def test_a_file_that_is_no_text(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)


def test_a_recipe_that_does_not_exist(tmp_path):
    for name in ("no-such-recipe", tmp_path):
        with pytest.raises(ConfigError, match="found no recipe") as error:
            load_recipe(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_is_read_and_written(tmp_path, name):
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe
    types = {kind for part in recipe.data.sets for kind in part.types}
    assert types <= {"simple_description", "detailed_description", "single_round", "multi_round"}


def dataclasses_of(kind):
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from dataclasses_of(inner)


def test_every_setting_has_help():
    """A field's help is the string literal under it."""
    import ast
    import inspect

    for kind in set(dataclasses_of(Recipe)):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        for statement, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                nested = dataclasses.is_dataclass(typing.get_type_hints(kind)[statement.target.id])
                assert told or nested or statement.target.id in ("alignment",), f"{kind.__name__}.{statement.target.id}"


def test_lists_of_defaults_are_not_shared():
    first, second = Recipe(), from_dict(Recipe, {}, "here")
    first.data.sets[0].types.append("x")
    first.alignment.layers.append(3)
    assert second == Recipe()
