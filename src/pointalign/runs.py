"""From a recipe to a trained model: build or load it, cache the frozen half, train, and write the model's folder."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from pointalign.alignment import AlignmentRegularizer, check_layers
from pointalign.augmentation import AugmentedConversations
from pointalign.config import ModelSettings, Recipe, check_numbers, check_seed, load_recipe, recipe_names
from pointalign.contrastive import train_encoder
from pointalign.data.conversations import ConversationDataset, PointCloudSource, count_clouds
from pointalign.data.features import FeatureCache, weights_fingerprint
from pointalign.data.household_split import check_part
from pointalign.data.sources import OptionalSizes, check_paths, missing_color, open_training_data, read_clouds, unsized
from pointalign.device import keep_few_kernels, own_accelerator
from pointalign.errors import ConfigError
from pointalign.models.chat_text import choose_point_token
from pointalign.models.checkpoint import fit_embeddings, is_adapters, local_checkpoint, resolve_model
from pointalign.models.language_model import load_language_model, load_tokenizer
from pointalign.models.losses import IGNORED
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor, load_processor
from pointalign.parts import check_names, prepare_parts
from pointalign.progress import is_first_process, progress, say
from pointalign.recipe_trainer import RecipeTrainer
from pointalign.released import released_messages
from pointalign.run_folder import RunFolder
from pointalign.run_loop import check_trackers, run_trainer, uses_bf16
from pointalign.sharding import gather_weights
from pointalign.storage import cache_dir, remove_unfinished, written_folder
from pointalign.training import build_regularizer, build_trainer

PROJECTOR_FILE = "alignment_projector.safetensors"
ENCODE_BATCH = 16
# Conversations that are looked at to see whether they show clouds.
LOOKED_AT = 200
# 400 MB of clouds of 8,192 points; 660K of them would fill any memory.
KEPT_CLOUDS = 2000


def build_model(
    settings: ModelSettings, missing_color: Sequence[float]
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """A model and its processor: from a checkpoint, or new parts around a pretrained language model.

    Args:
        settings: the recipe's.
        missing_color: what a new model's processor gives clouds without colour; a checkpoint's keeps its own.

    Raises:
        CheckpointError: when a checkpoint or the language model cannot be loaded.
        ConfigError: when another language model than a checkpoint's is asked for.
    """
    quantize = None if settings.quantize == "none" else settings.quantize
    if settings.start_from is not None:
        start = resolve_model(settings.start_from)
        model = PointAlignForConditionalGeneration.from_pretrained(
            start, is_trainable=True, quantize=quantize, dtype=torch.float32
        )
        _check_sizes(settings, start, model.config.language_model)
        return model, load_processor(start)
    tokenizer = load_tokenizer(settings.language_model)
    language_model: Any = load_language_model(settings.language_model, quantize, dtype=torch.float32)
    token = choose_point_token(tokenizer, language_model.get_input_embeddings().weight.shape[0], settings.point_token)
    fit_embeddings(language_model, tokenizer.convert_tokens_to_ids(token) + 1)
    config = model_config(settings, language_model.config, tokenizer.convert_tokens_to_ids(token))
    config.quantize = quantize
    model = PointAlignForConditionalGeneration(config, language_model=language_model)
    generation = language_model.generation_config
    generation.suppress_tokens = [config.point_token_id]
    model.generation_config = generation
    processor = PointAlignProcessor(
        tokenizer,
        num_points=settings.num_points,
        num_point_tokens=config.num_point_tokens,
        min_points=settings.point_encoder.group_size,
        point_token=token,
        system_prompt=settings.system_prompt,
        missing_color=missing_color,
        metric_size=settings.point_encoder.metric_size,
    )
    generation.eos_token_id = ends_of(processor, generation.eos_token_id)
    return model, processor


def _check_sizes(settings: ModelSettings, start: str, language_model: str | None) -> None:
    """See that no other language model is asked for than a checkpoint's; sizes that count for new models alone are told.

    Args:
        settings: the recipe's; what is as by default asks for nothing.
        start: the checkpoint.
        language_model: the name of its language model, or None where it holds the weights itself.

    Raises:
        ConfigError: when another one is.
    """
    default = ModelSettings()
    asked = [name for name, value in vars(settings).items() if value != getattr(default, name)]
    if "language_model" in asked and settings.language_model != language_model:
        has = f"the language model {language_model}" if language_model else "its own language model"
        raise ConfigError(
            f"model.language_model is {settings.language_model}, but {start} has {has}; leave it out, or begin with a first "
            "stage, which makes a model (`pointalign recipes` lists them)"
        )
    sizes = [f"model.{name}" for name in asked if name not in ("start_from", "language_model", "quantize")]
    if sizes:
        say(f"{', '.join(sizes)}: not used, for {start} has its own")


def ends_of(processor: PointAlignProcessor, known: int | list[int] | None) -> int | list[int] | None:
    """Where answers end: as the language model's own settings say, and where its chat template ends the assistant's turn.

    A base model's settings may name the end of a text, where its template has a special token of its own for a turn's.
    """
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    last = [label for label in processor.encode(turns)["labels"] if label != IGNORED][-1]
    ends: list[int] = list(known) if isinstance(known, list) else [] if known is None else [known]
    added = processor.tokenizer.added_tokens_decoder.get(last)
    if last in ends or added is None or not added.special:
        return known
    return [*ends, last] if ends else last


def model_config(settings: ModelSettings, text_config: Any, point_token_id: int) -> PointAlignConfig:
    """The configuration of a model that is built from a recipe's sizes around a language model."""
    part = settings.connector
    connector = {
        "kind": part.kind,
        "hidden_sizes": part.hidden_sizes,
        "num_query_tokens": part.num_query_tokens,
        "projection_size": part.projection_size,
        "qformer_config": {
            "hidden_size": part.qformer_hidden_size,
            "num_hidden_layers": part.qformer_layers,
            "num_attention_heads": part.qformer_heads,
            "intermediate_size": part.qformer_intermediate_size,
            "encoder_hidden_size": part.vision_width,
            "hidden_dropout_prob": part.qformer_dropout,
            "attention_probs_dropout_prob": part.qformer_dropout,
        },
    }
    return PointAlignConfig(
        point_encoder_config=asdict(settings.point_encoder),
        connector_config=connector,
        text_config=text_config,
        point_token_id=point_token_id,
        language_model=os.path.abspath(named) if os.path.isdir(named := settings.language_model) else named,
    )


class PreparedClouds:
    """Clouds by object id, prepared when they are first asked for; the first ones are kept in memory.

    Args:
        clouds: as they are.
        prepare: from one of them to the tensor that is wanted.
    """

    def __init__(self, clouds: PointCloudSource, prepare: Callable[[Any], Tensor]) -> None:
        self.clouds, self.prepare = clouds, prepare
        self._ready: dict[str, Tensor] = {}

    def __getitem__(self, object_id: str) -> dict[str, Tensor]:
        prepared = self._ready.get(object_id)
        if prepared is None:
            prepared = self.prepare(self.clouds[object_id])
            if len(self._ready) < KEPT_CLOUDS:
                self._ready[object_id] = prepared
        return {"point_clouds": prepared}


def frozen_fields(trains: list[str], target: str | None, has_qformer: bool) -> tuple[str, ...]:
    """Which features a run can read from a cache: what the frozen parts give, as far as training needs it.

    The Q-Former's output is kept with and without alignment, so that a baseline and an aligned run share one cache.

    Args:
        trains: the recipe's parts.
        target: the alignment target, or None without alignment.
        has_qformer: whether the connector has a Q-Former.
    """
    if any(name == "point_encoder" for name in trains):
        return ()
    if any(not name.startswith("language_model") for name in trains):
        return ("point_features",)
    if target == "point_encoder":
        return ("point_tokens", "point_features")
    return ("point_tokens", "qformer_output") if has_qformer else ("point_tokens",)


def cached_features(
    model: PointAlignForConditionalGeneration,
    processor: PointAlignProcessor,
    clouds: PointCloudSource,
    object_ids: list[str],
    fields: tuple[str, ...],
) -> FeatureCache:
    """The frozen parts' outputs for all objects, computed where they are not on disk yet."""
    frozen = [model.point_encoder] + ([] if fields == ("point_features",) else [model.connector])
    cache = FeatureCache(
        cache_dir() / "features",
        object_ids,
        {
            "weights": weights_fingerprint(frozen),
            "sizes": (model.point_encoder.config.to_json_string(), model.config.connector_config.to_json_string()),  # pyright: ignore
            "clouds": clouds.fingerprint,
            "num_points": processor.num_points,
            "missing_color": processor.missing_color,
            "fields": fields,
        },
    )
    if cache.is_full:
        return cache
    was_training = model.training
    model.eval()

    @torch.inference_mode()
    def compute(names: list[str]) -> dict[str, Tensor]:
        batch = torch.stack([processor.prepare_points(points) for points in read_clouds(clouds, names)])
        batch = batch.to(next(model.point_encoder.parameters()).device)
        if fields == ("point_features",):
            return {"point_features": model.point_encoder(batch)}
        points = model.encode_points(batch)
        return {field: points[field] for field in fields}

    with on_accelerator(frozen), progress("encoding clouds", len(object_ids)) as advance:
        cache.fill(compute, ENCODE_BATCH, advance)
    model.train(was_training)
    return cache


@contextmanager
def on_accelerator(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Parts that lie on the CPU are on this process's accelerator while this lasts, where there is one."""
    before = {part: next(part.parameters()).device for part in parts}
    accelerator = own_accelerator()
    moved = [part for part in parts if accelerator is not None and before[part].type == "cpu"]
    for part in moved:
        part.to(accelerator)
    try:
        yield
    finally:
        for part in moved:
            part.to(before[part])


def train(recipe: Recipe, out: str | Path, resume: bool = False) -> dict[str, Any]:
    """Run a recipe.

    Args:
        recipe: what to do.
        out: the run's folder; the trained model lies in its `model` folder afterwards.
        resume: go on with the run that lies there; with none there, start it.

    Returns:
        A summary: folder, steps, trained weights by part, seconds, last losses.

    Raises:
        PointAlignError: for anything expected that goes wrong; `RunStopped` when it was asked to stop.
    """
    quiet()
    folder = RunFolder(out)
    with folder.claimed() if is_first_process() else nullcontext():
        finished = (folder.model / "config.json").is_file()
        if not finished:
            check_recipe(recipe)
        if is_first_process():
            folder.open(recipe, resume)
        if finished:
            return _summary(recipe, folder, None, 0.0)
        if is_first_process():
            remove_unfinished(folder.model)
        start = time.monotonic()
        set_seed(recipe.seed)
        counts = _train(recipe, folder)
        if is_first_process():
            from pointalign.figures import draw_losses  # matplotlib takes memory that training has use for

            draw_losses(folder.metrics(), folder.path / "losses.png", recipe.name)
        return _summary(recipe, folder, counts, time.monotonic() - start)


def quiet() -> None:
    """Keep libraries from speaking over our progress bars."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    # Nothing changes in place what the model gives back.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # Blocks are recorded on a stream of their own.
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")


def check_recipe(recipe: Recipe) -> None:
    """See what can be seen of a recipe's mistakes before a model is loaded, or anything asked of the Hub.

    Raises:
        ConfigError: when its seed, parts, held-out part, layers or processes cannot be, or what it starts from is not there.
        DataError: when its data are not there.
        CheckpointError: when what it starts from is there and broken.
    """
    check_seed(recipe.seed)
    check_names(recipe.trains)
    if recipe.workers < 0:
        raise ConfigError(f"workers {recipe.workers} is no number of processes; give 0 or more")
    if recipe.workers and "fork" not in multiprocessing.get_all_start_methods():
        raise ConfigError("workers need a system whose processes can be forked; leave workers at 0 here")
    check_numbers(recipe)
    check_trackers(recipe.report_to)
    if recipe.stage == "encoder":
        _check_encoder_stage(recipe)
    start = recipe.model.start_from
    if starts_from_nothing(start):
        bundled = recipe.name in recipe_names() and load_recipe(recipe.name).model.start_from == start
        hint = f"`pointalign recipes {recipe.name}` tells how to make it, or " if bundled else ""
        raise ConfigError(
            f"recipe {recipe.name} starts from {start}, which is not there; {hint}name another with --model.start-from"
        )
    if recipe.data.source == "household":
        check_part(recipe.data.held_out)
    check_paths(recipe.data)
    folder = local_checkpoint(resolve_model(start)) if start is not None else None
    if folder is not None and recipe.alignment.weight and recipe.stage == "language":
        text: Any = PointAlignConfig.from_pretrained(folder).text_config
        check_layers(recipe.alignment.layers, text.get_text_config(decoder=True).num_hidden_layers)


def _check_encoder_stage(recipe: Recipe) -> None:
    """See that a recipe of stage encoder asks for nothing that belongs to the language model's.

    Raises:
        ConfigError: when it does.
    """
    if recipe.fsdp:
        raise ConfigError("fsdp splits a language model; stage encoder trains none: leave fsdp out")
    if named := [name for name in recipe.trains if name.startswith("language_model")]:
        raise ConfigError(f"stage encoder trains no language model; leave {', '.join(named)} out of trains")
    for name in ("gradient_checkpointing", "compile", "cuda_graphs", "float8"):
        if getattr(recipe, name):
            raise ConfigError(f"{name} is about a language model's blocks; stage encoder trains none: leave {name} out")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("stage encoder contrasts the clouds of a batch with each other, so one process trains it")


def starts_from_nothing(start: str | None) -> bool:
    """Whether a folder that a recipe starts from is not there; a Hub id, which has one slash, may be."""
    return start is not None and start.count("/") >= 2 and not Path(start).is_dir()


def _train(recipe: Recipe, folder: RunFolder) -> dict[str, int]:
    model, processor = build_model(recipe.model, missing_color(recipe.data))
    counts = prepare_parts(model, recipe)
    came_from = model.config.language_model
    if changes_base(model):
        model.config.language_model = None
    if recipe.stage == "encoder":
        trainer, regularizer = train_encoder(recipe, folder, model, processor), None
    else:
        if uses_bf16(recipe):
            cast_frozen(model, came_from)
        trainer, regularizer = train_language(recipe, folder, model, processor)
    gather_weights(model)
    if regularizer is not None:
        counts["alignment_projector"] = sum(p.numel() for p in regularizer.parameters())
        regularizer.detach()
    if trainer.is_world_process_zero():
        with written_folder(folder.model) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
            if regularizer is not None:
                save_file(regularizer.state_dict(), temporary / PROJECTOR_FILE)
    trainer.accelerator.wait_for_everyone()
    return counts


def train_language(
    recipe: Recipe, folder: RunFolder, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor
) -> tuple[RecipeTrainer, AlignmentRegularizer | None]:
    """Train a model whose parts are chosen by next-token loss and, where the recipe asks for it, the alignment loss.

    Args:
        recipe: the run.
        folder: its folder.
        model: see `prepare_parts`; its frozen half is computed once per object, if the recipe says so.
        processor: its processor.

    Returns:
        The trainer at its end, and the regulariser, which is still attached, or None.

    Raises:
        PointAlignError: as `train`.
    """
    keep_few_kernels()
    dataset = _open_dataset(recipe, folder.path, model, processor)
    regularizer = build_regularizer(model, recipe.alignment, recipe.seed)
    trainer = run_trainer(
        recipe,
        folder,
        lambda arguments, callbacks: build_trainer(
            model, processor, dataset, recipe, regularizer, arguments, callbacks
        ),
    )
    return trainer, regularizer


def _open_dataset(
    recipe: Recipe, folder: Path, model: PointAlignForConditionalGeneration, processor: PointAlignProcessor
) -> ConversationDataset:
    """What a run trains on; clouds are in memory after this only where they are needed at every step."""
    clouds, conversations = open_training_data(recipe.data, folder)
    options: dict[str, Any] = {
        "conversations": conversations,
        "processor": processor,
        "max_length": recipe.data.max_length,
    }
    if recipe.as_released:
        options["rewrite"] = released_messages
    first = [conversations[number] for number in range(min(LOOKED_AT, len(conversations)))]
    if not any(count_clouds(conversation.messages) for conversation in first):
        say(f"none of the first {len(first)} conversations shows a cloud (<point>): they train as text alone")
    if recipe.data.augment:
        points = PreparedClouds(clouds, processor.clean_points)
        return AugmentedConversations(recipe.data.size_told, recipe.seed, points=points, **options)
    return _plain_dataset(recipe, model, clouds, options)


def _plain_dataset(
    recipe: Recipe, model: PointAlignForConditionalGeneration, clouds: PointCloudSource, options: dict[str, Any]
) -> ConversationDataset:
    """Conversations about clouds as they are, or about what the frozen half computed of them."""
    processor, conversations = options["processor"], options["conversations"]
    target = recipe.alignment.target if recipe.alignment.weight else None
    has_qformer = model.config.connector_config.kind == "qformer"  # pyright: ignore
    fields = frozen_fields(recipe.trains, target, has_qformer) if recipe.cache_features else ()
    object_ids = conversations.object_ids
    if processor.metric_size:
        clouds = OptionalSizes(clouds)
        object_ids = [*object_ids, *map(unsized, object_ids)]
        # So that the model also answers about clouds of unknown size.
        told = np.random.default_rng(recipe.seed).random(len(conversations)) < recipe.data.size_told
        options["cloud_name"] = lambda object_id, number: object_id if told[number] else unsized(object_id)
    points: Any = PreparedClouds(clouds, processor.prepare_points)
    if fields:
        points = cached_features(model, processor, clouds, object_ids, fields)
    return ConversationDataset(points=points, **options)


def changes_base(model: PointAlignForConditionalGeneration) -> bool:
    """Whether training changes language model weights outside its adapter, so that a checkpoint must hold them."""
    return any(
        parameter.requires_grad and not is_adapters(name) for name, parameter in model.language_model.named_parameters()
    )


def cast_frozen(model: PointAlignForConditionalGeneration, came_from: str | None = None) -> None:
    """Keep the language model's frozen matrices in bfloat16, as they are multiplied; what trains stays float32.

    Vectors stay too: a norm cannot have its weight in one precision and its bias in another; and so does a frozen adapter,
    which is saved as it is. They are copied, because one that still lies in the mapped file of weights keeps the whole file
    in memory. The language model's own are saved as they came.

    Args:
        model: see above.
        came_from: name or folder of its language model, where that is not in the model's own folder.
    """
    model.rounded_from = came_from or model.weights_folder
    for name, parameter in model.language_model.named_parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            is_matrix = parameter.ndim >= 2 and not is_adapters(name)
            parameter.data = parameter.data.to(torch.bfloat16) if is_matrix else parameter.data.clone()


def _summary(recipe: Recipe, folder: RunFolder, counts: dict[str, int] | None, seconds: float) -> dict[str, Any]:
    lines = folder.metrics()
    last = lines[-1] if lines else {}
    return {
        "run": str(folder.path),
        "model": str(folder.model),
        "steps": recipe.optimizer.max_steps,
        "trained": counts,
        "seconds": round(seconds, 1),
        **{name: last[name] for name in ("lm_loss", "alignment_loss", "contrastive_loss", "word_loss") if name in last},
    }
