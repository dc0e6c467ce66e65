"""Recipes: every setting of a run, declared once, read from YAML and overridden from the command line.

A field's type, default and the text under it are what `pointalign train --help` shows. A recipe file holds only what
differs from the defaults, which are the published values of PointAlign (arXiv 2603.00412) where there is one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from pointalign.errors import ConfigError

T = TypeVar("T")


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
    """Folder or Hub id of a PointAlign checkpoint; when given, the sizes below are its own."""
    language_model: str = "smollm2-135m"
    """Name, Hub id or folder of the language model."""
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
class DataSet:
    """One of the sets that a run mixes; at each step one set is drawn."""

    types: list[str] = field(default_factory=lambda: ["simple_description"])
    """Conversation types it holds: simple_description, detailed_description, single_round, multi_round."""
    odds: float = 1.0
    """Chance of being drawn, relative to the other sets'."""
    batch_size: int = 8
    """Conversations of a step when it is drawn."""


@dataclass
class DataSettings:
    """Which clouds and conversations."""

    source: str = "household"
    """`household` (bundled), or a folder of {object_id}_8192.npy clouds."""
    instructions: list[str] = field(default_factory=list)
    """PointLLM-format JSON files, for a folder of clouds."""
    sets: list[DataSet] = field(default_factory=lambda: [DataSet()])
    """The sets that are mixed."""
    fraction: float = 1.0
    """Share of the objects that is used, the first ones by a hash of their id."""
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
    data: DataSettings = field(default_factory=DataSettings)
    alignment: AlignmentSettings = field(default_factory=AlignmentSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    as_released: bool = False
    """Train as the released code does: its text of one-turn questions, its (wrong) positions of the alignment loss."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 where the device computes it natively, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    cache_features: bool = True
    """Compute the frozen parts once per object and read them from disk."""
    seed: int = 42
    """Of initial weights, batches and dropout."""
    save_steps: int = 500
    """Steps between checkpoints."""
    logging_steps: int = 10
    """Steps between logged metrics."""
    report_to: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers that transformers' Trainer knows."""


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("pointalign") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe: a file, or the name of one that comes with the package.

    Raises:
        ConfigError: when there is none, it is not YAML, or it holds an unknown key or a value of the wrong kind.
    """
    path = Path(name_or_path)
    if not path.is_file():
        bundled = resources.files("pointalign") / "recipes" / f"{name_or_path}.yaml"
        if not bundled.is_file():
            known = ", ".join(recipe_names())
            raise ConfigError(f"found no recipe {str(name_or_path)!r}: give a YAML file, or one of {known}")
        text = bundled.read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}; give a YAML file in UTF-8") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{name_or_path} must hold `key: value` lines, not a {type(values).__name__}")
    return from_dict(Recipe, values, str(name_or_path))


def from_dict(kind: type[T], values: dict[str, Any], where: str) -> T:
    """Build a settings dataclass from plain values, converting each by its declared type.

    Args:
        kind: the dataclass.
        values: as YAML gives them; `1e-4`, which YAML reads as text, becomes a number where one is declared.
        where: named in errors.

    Raises:
        ConfigError: for an unknown key (with the nearest right one) or a value of the wrong kind.
    """
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{where}: unknown key {key!r}; {hint}")
    return kind(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} holds settings of its own, so write `key: value` lines under it")
        return from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is a list; got {value!r}")
        return [_convert(arguments[0], item, where) for item in value]
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is one of {', '.join(map(str, arguments))}; got {value!r}")
        return value
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
    raise ConfigError(f"{where} cannot be {value!r}")


def _convert_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif kind is int and isinstance(value, str):
        try:
            return int(value.replace("_", ""))
        except ValueError:
            pass
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is a {kind.__name__}; got {value!r}")


def to_yaml(recipe: Recipe) -> str:
    """A recipe with every value written out, as `load_recipe` reads it."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True)
