"""Recipes: every setting of a run, declared once, read from YAML and overridden from the command line.

A field's type, default and the text under it are what `pointalign train --help` shows. A recipe file holds only what
differs from the defaults, which are the published values of PointAlign (arXiv 2603.00412) where there is one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from pointalign.conversion import from_dict
from pointalign.errors import ConfigError


@dataclass
class PointEncoderSettings:
    """Sizes of a point encoder that is built from scratch."""

    num_groups: int = 512
    """Local groups of each cloud (G)."""
    group_size: int = 32
    """Points of each group (K)."""
    group_hidden_sizes: list[int] = field(default_factory=lambda: [128, 256, 512])
    """Widths inside the group encoder."""
    group_width: int = 256
    """Width of a group's feature."""
    hidden_size: int = 384
    """Width of the transformer."""
    num_hidden_layers: int = 12
    """Blocks of the transformer."""
    num_attention_heads: int = 6
    """Heads of each block."""
    metric_size: bool = False
    """Also tell the encoder how large an object is in metres, where that is known."""


@dataclass
class ConnectorSettings:
    """Sizes of a connector that is built from scratch."""

    kind: Literal["qformer", "mlp"] = "qformer"
    """Q-Former with learned queries, or an MLP on every point feature."""
    hidden_sizes: list[int] = field(default_factory=lambda: [768])
    """Hidden widths of the point MLP (qformer) or of the whole MLP (mlp)."""
    num_query_tokens: int = 32
    """Point tokens per cloud (Q)."""
    vision_width: int = 1408
    """Width of the point features that the Q-Former attends to."""
    qformer_hidden_size: int = 768
    """Width of the Q-Former."""
    qformer_layers: int = 12
    """Layers of the Q-Former."""
    qformer_heads: int = 12
    """Heads of the Q-Former."""
    qformer_intermediate_size: int = 3072
    """Hidden width of the Q-Former's MLPs."""
    qformer_dropout: float = 0.1
    """Dropout inside the Q-Former while it trains."""
    projection_size: int = 4096
    """Width between the two linears after the Q-Former."""


@dataclass
class ModelSettings:
    """What is trained: a checkpoint to start from, or parts to build."""

    start_from: str | None = None
    """Folder or Hub id of a PointAlign checkpoint, or a bundled model; when given, the sizes below are its own."""
    language_model: str = "smollm2-135m"
    """Name, Hub id or folder of the language model."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen language model's matrices in 4 bits (nf4) or 8 (int8) while LoRA trains: for cards with little memory.
    Needs bitsandbytes. A checkpoint that was trained so stays so."""
    point_token: str | None = None
    """Placeholder token for point tokens; chosen from the vocabulary when not given."""
    num_points: int = 8192
    """Points of each cloud (N)."""
    system_prompt: str | None = None
    """System message of every conversation; the chat template's own when not given."""
    point_encoder: PointEncoderSettings = field(default_factory=PointEncoderSettings)
    connector: ConnectorSettings = field(default_factory=ConnectorSettings)


@dataclass
class LoraSettings:
    """Low-rank adaptation of the language model."""

    rank: int = 64
    """Rank of the update."""
    alpha: int = 16
    """Scale of the update over its rank."""
    dropout: float = 0.05
    """Dropout on the update's input."""
    target_modules: list[str] | Literal["all-linear"] = "all-linear"
    """Names of the linears that are adapted."""


@dataclass
class QFormerLoraSettings(LoraSettings):
    """Low-rank adaptation of the Q-Former, made when `trains` names qformer_lora and the model has none."""

    rank: int = 8
    """Rank of the update."""
    alpha: int = 16
    """Scale of the update over its rank."""
    dropout: float = 0.1
    """Dropout on the update's input."""
    target_modules: list[str] | Literal["all-linear"] = field(default_factory=lambda: ["query", "key", "value"])
    """Names of the linears that are adapted, in self- and cross-attention."""


@dataclass
class QueryExpertSettings:
    """Several sets of queries and a router that weighs them for each cloud."""

    count: int = 0
    """Sets to make of the model's one set; 0 leaves the model as it is (8 in MiniGPT-3D's stage IV)."""
    noise: float = 0.02
    """Standard deviation of the noise on every new set but the first, so that the sets can part."""
    routing: Literal["sparse", "soft", "constant"] | None = None
    """How the sets' outputs are joined; the model's own way when not given."""
    num_chosen: int | None = None
    """Sets that sparse routing runs for each cloud; the model's own number when not given."""


@dataclass
class DataSet:
    """One of the sets that a run mixes; at each step one set is drawn."""

    types: list[str] = field(default_factory=lambda: ["simple_description"])
    """Conversation types: simple_description, detailed_description, single_round, multi_round; of household also caption."""
    odds: float = 1.0
    """Chance of being drawn, relative to the other sets'."""
    batch_size: int = 8
    """Conversations of a step when it is drawn."""


@dataclass
class DataSettings:
    """Which clouds and conversations."""

    source: str = "household"
    """`household` (bundled), a folder of {object_id}_8192.npy clouds, or what `pointalign data pack` made of one: a folder
    or its address (s3://..., any that fsspec knows)."""
    extra: str | None = None
    """A file that `pointalign data extra` built; its objects join household's training side."""
    instructions: list[str] = field(default_factory=list)
    """PointLLM-format JSON files, for a folder of clouds."""
    held_out: str = "test"
    """Household's objects that are not trained on: test (100 objects); fold-0 to fold-4 of all 820; or validation-0 to
    validation-4 of the training side, for choosing settings."""
    skip_missing: bool = False
    """Train without the objects that have no cloud, and list them in the run's missing_clouds.txt; else refuse."""
    sets: list[DataSet] = field(default_factory=lambda: [DataSet()])
    """The sets that are mixed."""
    fraction: float = 1.0
    """Share of the objects that is used, the first ones by a hash of their id."""
    augment: bool = False
    """Stage language: every time a cloud is shown it is turned, stretched and lit a little, shaken and thinned, so that what is
    said of it stays true; nothing can be read from a cache then. Stage encoder always changes clouds, and more."""
    balance: float = 0.0
    """Stage encoder: of objects that c captions describe in the same words, each is drawn 1/c^balance as often; 0 draws all
    objects equally often, 1 all descriptions."""
    size_told: float = 0.5
    """How often a model that can be told how large an object is (metric_size) is told it, so that it learns to do without."""
    max_length: int = 512
    """Longest conversation in tokens; longer ones are refused."""


@dataclass
class AlignmentSettings:
    """The alignment regulariser; a weight of 0 is plain fine-tuning."""

    weight: float = 0.0
    """Weight of the alignment loss (0.1 in the paper)."""
    layers: list[int] = field(default_factory=lambda: [15])
    """Hidden states that are aligned: k is the output of the k-th decoder block."""
    loss: Literal["cosine", "l1", "l2"] = "cosine"
    """Distance between projected hidden states and targets."""
    target: Literal["qformer", "point_encoder", "projector"] = "qformer"
    """What they are aligned with: Q-Former output, pooled point features, or the tokens that enter the model."""
    depth: int = 3
    """Linears of the alignment projector, 1 to 3."""
    positions: Literal["point_tokens", "released"] = "point_tokens"
    """Which hidden states are aligned: the point tokens', or those that the released code reads by mistake, the last ones of
    the padded prompt. `as_released` means the latter."""
    schedule: Literal["constant", "linear", "stop"] = "constant"
    """How the weight changes over training."""
    stop_fraction: float = 1.0
    """Share of training at which `linear` and `stop` reach zero."""


@dataclass
class OptimizerSettings:
    """Optimiser and schedule."""

    max_steps: int = 10_000
    """Optimiser steps."""
    learning_rate: float = 3e-6
    """Peak learning rate."""
    min_learning_rate: float = 1e-7
    """Learning rate at the end of the cosine."""
    warmup_steps: int = 1_000
    """Steps of linear warm-up."""
    warmup_start: float = 1e-7
    """Learning rate at the first step."""
    weight_decay: float = 0.05
    """Weight decay of matrices; vectors and biases have none."""
    beta2: float = 0.999
    """Second-moment decay of AdamW; the first is 0.9."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down; 0 never does."""
    gradient_accumulation: int = 1
    """Batches joined into one step."""


Stage = Literal["encoder", "language"]


@dataclass
class Recipe:
    """One training run."""

    name: str = "run"
    """Shown in logs and reports."""
    stage: Stage = "language"
    """`encoder` ties point encoder and connector to captions; `language` trains by next-token loss."""
    trains: list[str] = field(default_factory=lambda: ["language_model_lora", "language_model_norms"])
    """Parts that train; everything else is frozen. See `pointalign.parts.PARTS`."""
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    qformer_lora: QFormerLoraSettings = field(default_factory=QFormerLoraSettings)
    query_experts: QueryExpertSettings = field(default_factory=QueryExpertSettings)
    data: DataSettings = field(default_factory=DataSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    as_released: bool = False
    """Train as the released code does: its text of one-turn questions, its (wrong) positions of the alignment loss."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the device computes it natively, else fp32."""
    packing: bool = True
    """Lay the conversations of a step end to end instead of padding them, for models that keep them apart; the losses are
    the same. Released alignment positions pad."""
    compile: bool = False
    """Compile the decoder blocks in the first step, a minute or so; later steps take less time. Pays in long runs. On a GPU
    dropout then leaves out other places than without, by the same chances."""
    cuda_graphs: bool = False
    """On one GPU: record the decoder blocks' launches once for each rounded size of a step and send them off together, where
    the host is slower than the card. Takes some seconds when training begins, and memory for each size."""
    float8: bool = False
    """Multiply by the language model's frozen matrices in 8-bit floats while training, on a card that does (compute capability
    8.9 or later): products come out within some 4 %, and each of those weights takes two bytes more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    fsdp: bool = False
    """Split weights, gradients and optimiser over the processes (FSDP2), for a language model that one of them cannot hold;
    else each holds all. The result is the same, and a run can be resumed either way."""
    workers: int = 0
    """Processes that prepare batches while the device computes; pays on a GPU where clouds are changed at every draw. The
    result is the same with any number."""
    cache_features: bool = True
    """Compute the frozen parts once per object and read them from disk."""
    seed: int = 42
    """Of initial weights, batches and dropout."""
    save_steps: int = 500
    """Steps between checkpoints."""
    logging_steps: int = 10
    """Steps between logged metrics; what is saved is logged too."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers that transformers' Trainer knows."""


# What numbers of a recipe may be.
COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
COUNT, NONE_BELOW_ZERO, SHARE = (("at least", 1),), (("at least", 0),), (("at least", 0), ("at most", 1))
QFORMER_SIZES = ("hidden_size", "layers", "heads", "intermediate_size")
ENCODER_SIZES = tuple(
    f"point_encoder.{name}"
    for name in ("num_groups", "group_size", "group_width", "hidden_size", "num_hidden_layers", "num_attention_heads")
)
CONNECTOR_SIZES = tuple(
    f"connector.{name}"
    for name in ("num_query_tokens", "vision_width", *(f"qformer_{size}" for size in QFORMER_SIZES), "projection_size")
)
BOUNDS: dict[str, tuple[tuple[str, int], ...]] = {
    **dict.fromkeys(("optimizer.max_steps", "optimizer.gradient_accumulation", "logging_steps", "save_steps"), COUNT),
    **dict.fromkeys(("lora.rank", "qformer_lora.rank", "lora.alpha", "qformer_lora.alpha"), COUNT),
    **dict.fromkeys(("lora.dropout", "qformer_lora.dropout", "optimizer.beta2"), (("at least", 0), ("below", 1))),
    "optimizer.learning_rate": (("above", 0),),
    **dict.fromkeys(("optimizer.min_learning_rate", "optimizer.warmup_start"), NONE_BELOW_ZERO),
    **dict.fromkeys(("optimizer.weight_decay", "optimizer.max_grad_norm"), NONE_BELOW_ZERO),
    **dict.fromkeys(("optimizer.warmup_steps", "alignment.weight"), NONE_BELOW_ZERO),
    "data.fraction": (("above", 0), ("at most", 1)),
    **dict.fromkeys((f"model.{name}" for name in ("num_points", *ENCODER_SIZES, *CONNECTOR_SIZES)), COUNT),
    **dict.fromkeys(("alignment.stop_fraction", "data.size_told", "data.balance"), SHARE),
    "alignment.depth": (("at least", 1), ("at most", 3)),
    "data.max_length": COUNT,
}


def check_numbers(recipe: Recipe) -> None:
    """See that a recipe's numbers can be, and that something trains on something.

    Raises:
        ConfigError: when one cannot.
    """
    for key, bounds in BOUNDS.items():
        value: Any = operator.attrgetter(key)(recipe)
        if not math.isfinite(value) or not all(COMPARISONS[how](value, bound) for how, bound in bounds):
            wanted = " and ".join(f"{how} {bound}" for how, bound in bounds)
            raise ConfigError(f"{key} is {value}; give a number that is {wanted}")
    if not recipe.trains:
        raise ConfigError("trains names no part, so nothing would be trained; name some")
    if not recipe.data.sets:
        raise ConfigError("data.sets is empty, so there is nothing to train on; name a set of conversation types")
    for number, settings in enumerate(recipe.data.sets):
        if settings.batch_size < 1:
            raise ConfigError(
                f"data.sets.{number}.batch_size is {settings.batch_size}; give a number that is at least 1"
            )
    if recipe.alignment.weight and not recipe.alignment.layers:
        raise ConfigError(
            "alignment.layers is empty, so nothing would be aligned; name a layer, or set alignment.weight to 0"
        )
    encoder, connector = recipe.model.point_encoder, recipe.model.connector
    if len(encoder.group_hidden_sizes) != 3 or min(encoder.group_hidden_sizes) < 1:
        raise ConfigError(
            f"model.point_encoder.group_hidden_sizes is {encoder.group_hidden_sizes}; give three widths of 1 or more"
        )
    for name, width, heads in (
        ("point_encoder.hidden_size", encoder.hidden_size, encoder.num_attention_heads),
        ("connector.qformer_hidden_size", connector.qformer_hidden_size, connector.qformer_heads),
    ):
        if width % heads:
            raise ConfigError(
                f"model.{name} is {width}, no multiple of its {heads} attention heads; change one of them"
            )


def check_seed(seed: int) -> None:
    """See that a number can seed every generator that is used.

    Raises:
        ConfigError: when it is negative or needs more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} is out of range; give 0 to {2**32 - 1}")


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".yaml") for entry in _bundled_recipes().iterdir() if entry.name.endswith(".yaml")
    )


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe: a file, or the name of one that comes with the package.

    A recipe with `base: NAME` takes every value that it does not give from that recipe, which is a bundled one or a file
    beside it. Settings are joined key by key, lists are replaced, and the base's name is not taken.

    Raises:
        ConfigError: when it or its base does not exist, it is not YAML, bases go in a circle, or it holds an unknown key
            or a value of the wrong kind.
    """
    return from_dict(Recipe, _values(_find_recipe(name_or_path, Path()), ()), str(name_or_path))


def override_recipe(recipe: Recipe, values: dict[str, Any], where: str) -> Recipe:
    """A recipe with some of its values replaced: settings are joined key by key, lists are replaced.

    Args:
        recipe: left as it is.
        values: as a recipe file holds them.
        where: named in errors.

    Raises:
        ConfigError: for an unknown key or a value of the wrong kind.
    """
    from_dict(Recipe, values, where)
    return from_dict(Recipe, _joined(dataclasses.asdict(recipe), values), where)


def recipe_head(name_or_path: str | Path) -> list[str]:
    """The comment at a recipe's top, line by line: what it reproduces, and what it needs.

    Raises:
        ConfigError: when there is no such recipe.
    """
    lines = []
    for line in _read_text(_find_recipe(name_or_path, Path())).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" "))
    return lines


def _bundled_recipes() -> Any:
    return resources.files("pointalign") / "recipes"


def _find_recipe(name: str | Path, folder: Any, where: str = "") -> Any:
    """The file that a recipe's name means: one in the folder, or a bundled one."""
    bundled = _bundled_recipes() / f"{name}.yaml"
    for file in (folder / str(name), bundled):
        if file.is_file():
            return file
    near = difflib.get_close_matches(str(name), recipe_names(), n=3)
    hint = f" (nearest: {', '.join(near)})" if near else ""
    raise ConfigError(
        f"{where}found no recipe {str(name)!r}: give a YAML file, or one of those that `pointalign recipes` lists{hint}"
    )


def _read_text(file: Any) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}; give a YAML file in UTF-8") from error


class _OnceLoader(yaml.SafeLoader):
    """YAML whose keys stand once in each mapping: of two, the parser would drop the first without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: Any = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} stands twice, the second time in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return node


def read_yaml(text: str) -> Any:
    """What a YAML text says.

    Raises:
        yaml.YAMLError: when it is not YAML, a key stands twice in one mapping, or a date or number cannot be.
    """
    try:
        return yaml.load(text, Loader=_OnceLoader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def _values(file: Any, above: tuple[str, ...]) -> dict[str, Any]:
    """What a recipe file says, over what its base says; `above` are the files whose base it is."""
    try:
        values = read_yaml(_read_text(file)) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} must hold `key: value` lines, not a {type(values).__name__}")
    base = values.pop("base", None)
    from_dict(Recipe, values, str(file))  # here, so that a mistake is laid to the file it stands in
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base is the name of one recipe; got {base!r}")
    under = _find_recipe(base, file.parent, f"{file}: base: ")
    if str(under) in (*above, str(file)):
        raise ConfigError(f"{file}: base {base!r} leads back to itself; name a recipe that does not build on this one")
    inherited = _values(under, (*above, str(file)))
    return _joined({key: value for key, value in inherited.items() if key != "name"}, values)


def _joined(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    joined = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(joined.get(key), dict)
        joined[key] = _joined(joined[key], value) if both else value
    return joined


def to_yaml(recipe: Recipe) -> str:
    """A recipe with every value written out, as `load_recipe` reads it."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
