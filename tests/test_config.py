"""Recipes: what is written is what is read, and what is wrong is named."""

import dataclasses
import typing

import pytest
import yaml

from pointalign.config import (
    AlignmentSettings,
    DataSet,
    OptimizerSettings,
    QFormerLoraSettings,
    Recipe,
    from_dict,
    load_recipe,
    recipe_head,
    recipe_names,
    to_yaml,
)
from pointalign.data.conversations import CONVERSATION_TYPES
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
    assert recipe.qformer_lora == QFormerLoraSettings(8, 16, 0.1, ["query", "key", "value"])
    assert recipe.query_experts.count == 0


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
        ("name: 2026-31-01", "is not YAML: month must be in 1..12"),
        ("[" * 2000, "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("? [1, 2]\n: 3", "is not YAML"),
        ("lora: !!map some", "is not YAML"),
        ("lora: {rank: 2}\nseed: 1\nlora: {alpha: 4}", "'lora' stands twice, the second time in line 3"),
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
    assert types <= set(CONVERSATION_TYPES)
    assert "caption" not in types or recipe.data.source == "household", "only its objects have them"


# What a recipe takes from another


def test_a_recipe_takes_from_its_base_what_it_does_not_say(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "name: base\ntrains: [connector]\nseed: 7\n"
        "data: {sets: [{types: [single_round]}, {types: [multi_round]}], fraction: 0.5}\n"
        "alignment: {weight: 0.3, layers: [4, 5]}\nmodel: {start_from: somewhere}\n"
    )
    (tmp_path / "middle.yaml").write_text("base: base.yaml\nname: middle\nalignment: {layers: [9]}\n")
    recipe = load_recipe(
        write(
            tmp_path,
            "base: middle.yaml\nalignment: {weight: 1e-1}\nmodel: {start_from: null}\ndata: {sets: [{odds: 2}]}\n",
        )
    )
    assert recipe.name == Recipe().name, "a name is not inherited"
    assert (recipe.trains, recipe.seed) == (["connector"], 7)
    assert recipe.alignment == AlignmentSettings(weight=0.1, layers=[9])
    assert recipe.data.sets == [DataSet(odds=2.0)], "lists are replaced"
    assert recipe.data.fraction == 0.5
    assert recipe.model.start_from is None
    resolved = to_yaml(recipe)
    assert "base" not in yaml.safe_load(resolved)
    assert load_recipe(write(tmp_path, resolved)) == recipe


def test_a_bundled_recipe_is_a_base_too(tmp_path):
    recipe = load_recipe(write(tmp_path, "base: pointalign\nname: mine\noptimizer: {learning_rate: 1e-5}\n"))
    expected = load_recipe("pointalign")
    expected.name, expected.optimizer.learning_rate = "mine", 1e-5
    assert recipe == expected


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"recipe": "base: nothing"}, r"recipe\.yaml: base: found no recipe 'nothing'"),
        ({"recipe": "base: pointaling"}, r"base: found no recipe 'pointaling'.*\(nearest: pointalign"),
        ({"recipe": "base: [pointalign]"}, r"recipe\.yaml: base is the name of one recipe; got \['pointalign'\]"),
        ({"recipe": "base: recipe.yaml"}, r"recipe\.yaml: base 'recipe\.yaml' leads back to itself"),
        (
            {"recipe": "base: a.yaml", "a": "base: b.yaml", "b": "base: a.yaml"},
            r"b\.yaml: base 'a\.yaml' leads back to itself; name a recipe that does not build on this one",
        ),
        ({"recipe": "base: a.yaml", "a": "sed: 1"}, r"a\.yaml: unknown key 'sed'; did you mean 'seed'\?"),
        ({"recipe": "base: a.yaml", "a": "- 1"}, r"a\.yaml must hold `key: value` lines"),
    ],
)
def test_a_wrong_base_is_named_in_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(error.value)


def test_a_head_is_the_comment_at_the_top(tmp_path):
    assert recipe_head(write(tmp_path, "# What it is.\n#\n#   a command\nseed: 1\n# not this\n")) == [
        "What it is.",
        "",
        "  a command",
    ]
    assert recipe_head(write(tmp_path, "seed: 1\n")) == []


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
