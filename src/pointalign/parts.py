"""Who trains: the parts of a model that a recipe can name, and the new ones it asks for (LoRA, query experts)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pointalign.config import LoraSettings, QueryExpertSettings, Recipe
from pointalign.errors import ConfigError
from pointalign.models.connector import QFormerConnector
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.progress import say

# What a recipe's `trains` can name, and the parameters it means (PAPER terms; MiniGPT-3D's and PointAlign's stages).
PARTS: dict[str, Callable[[str], bool]] = {
    "point_encoder": lambda name: name.startswith("point_encoder."),
    "point_mlp": lambda name: name.startswith("connector.point_mlp."),
    "query_tokens": lambda name: name == "connector.query_tokens",
    "qformer": lambda name: name.startswith("connector.qformer.") and ".lora_" not in name,
    "qformer_lora": lambda name: name.startswith("connector.qformer.") and ".lora_" in name,
    "qformer_norms": lambda name: name.startswith("connector.qformer.") and _is_norm(name) and name.endswith("weight"),
    "language_projection": lambda name: name.startswith("connector.language_projection."),
    "connector": lambda name: name.startswith("connector."),
    "language_model": lambda name: name.startswith("language_model.") and ".lora_" not in name,
    "language_model_lora": lambda name: name.startswith("language_model.") and ".lora_" in name,
    "language_model_norms": lambda name: (
        name.startswith("language_model.") and _is_norm(name) and name.endswith("weight")
    ),
    "query_router": lambda name: name.startswith("connector.query_router."),
}


def _is_norm(name: str) -> bool:
    """Whether a parameter belongs to a normalisation layer, inside peft's copy of it or not; GPT-2 calls one `ln_1`."""
    layer = name.lower().partition(".modules_to_save.")[0].removesuffix(".weight").rpartition(".")[2]
    return "norm" in layer or layer.startswith("ln_")


def norm_modules(model: nn.Module) -> list[str]:
    """Names, relative to the model, of its normalisation layers: modules whose own weights are all vectors.

    Found by shape, so that LayerNorm and every model's own RMSNorm count, whatever they are called.
    """
    names = []
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if weights and "norm" in type(module).__name__.lower() and all(weight.ndim == 1 for weight in weights):
            names.append(name)
    return names


def add_lora(model: PointAlignForConditionalGeneration, settings: LoraSettings, train_norms: bool) -> None:
    """Put a new LoRA around the language model, unless it has one.

    Norm weights that train are copied into the adapter (peft's `modules_to_save`), so that the saved adapter is complete
    and the base model stays as it was.

    Raises:
        ConfigError: when the settings name no linear of this language model.

    Source: PointAlign (arXiv 2603.00412): r=64, alpha=16, dropout 0.05 on the attention's linears; norm weights train.
    """
    if isinstance(model.language_model, PeftModel):
        _say_if_other(model.language_model, settings, "language model", "lora")
        return
    model.language_model = _adapted(
        model.language_model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            modules_to_save=norm_modules(model.language_model) if train_norms else None,
        ),
        "lora",
    )


def _adapted(part: Any, settings: LoraConfig, name: str) -> Any:
    """A part with a new LoRA around it.

    Raises:
        ConfigError: when peft finds nothing to adapt.
    """
    try:
        return get_peft_model(part, settings)
    except ValueError as error:
        raise ConfigError(
            f"{name}.target_modules {settings.target_modules} fit no linear of this model "
            f"({str(error).splitlines()[0][:100]}); name some, or all-linear"
        ) from error


def add_qformer_lora(model: PointAlignForConditionalGeneration, settings: LoraSettings, train_norms: bool) -> None:
    """Put a new LoRA around the Q-Former, unless it has one; as `add_lora`.

    Raises:
        ConfigError: when the connector has no Q-Former.

    Source: MiniGPT-3D (arXiv 2405.01413): r=8, alpha=2r on query, key and value of self- and cross-attention; norm weights
    train.
    """
    connector = _qformer_connector(model, "trains: qformer_lora")
    if isinstance(connector.qformer, PeftModel):
        _say_if_other(connector.qformer, settings, "Q-Former", "qformer_lora")
        return
    connector.qformer = _adapted(
        connector.qformer,
        LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=settings.target_modules,
            modules_to_save=norm_modules(connector.qformer) if train_norms else None,
        ),
        "qformer_lora",
    )


def _say_if_other(adapted: PeftModel, settings: LoraSettings, part: str, name: str) -> None:
    """Tell people when a part's LoRA, which goes on training as it is, differs from what the recipe would make."""
    own: Any = adapted.peft_config["default"]
    if (own.r, own.lora_alpha, own.lora_dropout) != (settings.rank, settings.alpha, settings.dropout):
        say(
            f"the {part} has a LoRA already (rank {own.r}, alpha {own.lora_alpha}, dropout {own.lora_dropout:g}); it goes on "
            f"training, and {name} of the recipe, which describes a new one, is not used"
        )


def set_query_experts(model: PointAlignForConditionalGeneration, settings: QueryExpertSettings) -> None:
    """Make the query experts that a recipe asks for, unless the model has as many, and route as it says.

    Raises:
        ConfigError: when the model has another number of them, has none to route between, or has no Q-Former.
    """
    if settings == QueryExpertSettings():
        return
    connector = _qformer_connector(model, "query_experts")
    config: Any = connector.config
    if settings.count not in (0, config.num_query_experts):
        connector.add_query_experts(settings.count, settings.noise)
    if not config.num_query_experts:
        raise ConfigError("query_experts: this model has one set of queries, so nothing is routed; set its count too")
    config.routing = settings.routing or config.routing
    chosen = settings.num_chosen or config.num_chosen_experts
    if not 1 <= chosen <= config.num_query_experts:
        raise ConfigError(f"query_experts.num_chosen is 1 to {config.num_query_experts} for this model; got {chosen}")
    config.num_chosen_experts = chosen


def _qformer_connector(model: PointAlignForConditionalGeneration, where: str) -> QFormerConnector:
    if not isinstance(model.connector, QFormerConnector):
        raise ConfigError(f"{where} needs a Q-Former, which this model's connector has not; leave it out")
    return model.connector


def prepare_parts(model: PointAlignForConditionalGeneration, recipe: Recipe) -> dict[str, int]:
    """Give a model the new parts that a recipe asks for, and let the recipe's parts train.

    Returns:
        Number of trained weights per part, see `select_parts`.

    Raises:
        ConfigError: when the recipe names parts that this model cannot have.
    """
    if any(name.startswith("language_model_") for name in recipe.trains):
        add_lora(model, recipe.lora, "language_model_norms" in recipe.trains)
    if "qformer_lora" in recipe.trains:
        add_qformer_lora(model, recipe.qformer_lora, "qformer_norms" in recipe.trains)
    set_query_experts(model, recipe.query_experts)
    return select_parts(model, recipe.trains)


def check_names(names: Iterable[str]) -> None:
    """See that names of parts are keys of `PARTS`.

    Raises:
        ConfigError: when one is not.
    """
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"trains: unknown part {name!r}; known are {', '.join(PARTS)}")


def select_parts(model: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Let the named parts train and freeze everything else; trained weights are kept in float32.

    Of a module that peft has copied into an adapter, the copy is meant: the original computes nothing.

    Args:
        model: the whole model.
        names: keys of `PARTS`.

    Returns:
        Number of trained weights per name, each weight counted under the first name that means it.

    Raises:
        ConfigError: for an unknown name, or one that means no weight of this model.
    """
    check_names(names := list(names))
    counts = dict.fromkeys(names, 0)
    for parameter_name, parameter in model.named_parameters():
        copied = ".original_module." in parameter_name
        owner = None if copied else next((name for name in counts if PARTS[name](parameter_name)), None)
        if owner is not None and not parameter.is_floating_point():
            raise ConfigError(f"trains: {owner} is quantised and cannot train; leave model.quantize at none")
        parameter.requires_grad_(owner is not None)
        if owner is not None:
            parameter.data = parameter.data.float()
            counts[owner] += parameter.numel()
    if empty := [name for name, count in counts.items() if not count]:
        raise ConfigError(f"trains: this model has no weights in {', '.join(empty)}; leave the name out")
    return counts
