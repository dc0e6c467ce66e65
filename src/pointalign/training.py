"""Training the language side: next-token loss, and beside it the alignment loss while a regulariser is attached."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from pointalign.alignment import AlignmentRegularizer, pool_target
from pointalign.config import AlignmentSettings, Recipe
from pointalign.cuda_graphs import graphed_blocks, why_not_graphed
from pointalign.data.conversations import Collator, ConversationDataset
from pointalign.data.mixture import MixtureBatchSampler, NumberedBatches
from pointalign.decoder_blocks import compiled_blocks
from pointalign.dropout import hashed_dropout
from pointalign.errors import ConfigError
from pointalign.float8 import float8_products, why_not_float8
from pointalign.lora_scaling import early_scaling
from pointalign.models.packing import packed_positions, packing_attention, rounded_up
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.progress import say
from pointalign.recipe_trainer import RecipeTrainer
from pointalign.released import released_alignment_mask

ALIGNMENT_FIELDS = {"qformer": "qformer_output", "point_encoder": "point_features", "projector": "point_tokens"}


def alignment_target(points: Any, target: str, count: int) -> Tensor:
    """The tensor that point tokens are aligned with, one row per point token.

    Args:
        points: a mapping or `PointFeatures` with the fields that `encode_points` gives.
        target: "qformer", "point_encoder" (class token left out and neighbours averaged where counts differ) or
            "projector".
        count: point tokens per cloud.

    Raises:
        ConfigError: when the model has no such output.
    """
    features = points.get(ALIGNMENT_FIELDS[target])
    if features is None:
        raise ConfigError(f"this model has no {target} output to align with; choose point_encoder or projector")
    if target == "point_encoder" and features.shape[1] != count:
        return pool_target(features[:, 1:], count)
    return features


class AlignmentTrainer(RecipeTrainer):
    """Next-token loss plus, while a regulariser is attached, the alignment loss at the point tokens.

    Both losses are means over the whole batch: over all its labels and all its point tokens, whatever the accumulation
    and the number of processes.

    Args:
        regularizer: attached to the model, or None for plain fine-tuning.
        target: what the point tokens are aligned with, see `alignment_target`.
        packing: lay conversations end to end instead of padding them, if the language model keeps them apart.
        compile: compile the decoder blocks, see `compiled_blocks`.
        cuda_graphs: record them, see `graphed_blocks`.
        float8: multiply by their frozen matrices in 8-bit floats, see `float8_products`.
        kwargs: passed to `RecipeTrainer`.
    """

    def __init__(
        self,
        regularizer: AlignmentRegularizer | None = None,
        target: str = "qformer",
        packing: bool = False,
        compile: bool = False,
        cuda_graphs: bool = False,
        float8: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.regularizer, self.target, self.packing, self.compile = regularizer, target, packing, compile
        self.cuda_graphs, self.float8 = cuda_graphs, float8
        self.unwrapped: Any = self.model
        self._num_point_tokens: Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, on packed conversations and compiled blocks where that is asked for and can be."""
        with ExitStack() as stack:
            if self.packing:
                language_model, device = self.unwrapped.language_model, self.args.device
                if stack.enter_context(packing_attention(language_model, bool(self.args.bf16), device)):
                    self.data_collator.packing = packed_positions  # pyright: ignore
                else:
                    say("this language model does not keep packed conversations apart; they are padded instead")
            self.float8 = self.float8 and self._can_round()
            stack.enter_context(float8_products(self.unwrapped, self.float8))
            device, fusing = self.args.device, self.compile and self._computes_on_gpu()
            stack.enter_context(hashed_dropout(self.unwrapped, fusing, device))
            stack.enter_context(early_scaling(self.unwrapped, fusing))
            stack.enter_context(compiled_blocks(self.unwrapped, self.compile, device))
            self.cuda_graphs = self.cuda_graphs and self._can_record()
            stack.enter_context(graphed_blocks(self.unwrapped, self.cuda_graphs))
            return super().train(*args, **kwargs)

    def _computes_on_gpu(self) -> bool:
        """Whether compiled blocks gain by hashed dropout and by scaling LoRA early; on a CPU they do not."""
        return self.args.device.type == "cuda"

    def _can_round(self) -> bool:
        """Whether products can be taken in 8-bit floats; why not is said."""
        reason = why_not_float8(self.unwrapped, split=self.is_fsdp_enabled)
        if reason:
            say(f"float8 does nothing here: {reason}")
        elif self.args.device.type == "cpu":
            say("float8: on a CPU products in 8-bit floats take longer than others")
        return reason is None

    def _can_record(self) -> bool:
        """Whether CUDA graphs can be recorded; why not is said."""
        args = self.args
        reason = why_not_graphed(
            args.device.type,
            args.world_size,
            args.gradient_accumulation_steps,
            packed=self.data_collator.packing is not None,  # pyright: ignore
            checkpointing=bool(args.gradient_checkpointing),
            trains=any(weight.requires_grad for weight in self.unwrapped.language_model.parameters()),
        )
        if reason:
            say(f"cuda_graphs does nothing here: {reason}")
        return reason is None

    def count_items(self, batches: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """The number of labels over all processes; the number of point tokens is kept for the second loss."""
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        tokens = sum(int(batch["alignment_mask"].sum()) for batch in batches)
        counts = torch.tensor([labels, tokens], dtype=torch.float32).to(device, non_blocking=True)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")  # pyright: ignore
        self._num_point_tokens = counts[1].clamp(min=1)
        return counts[0].clamp(min=1)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch on the device; where its point tokens stand is looked up before, so that the device is not waited for."""
        config = self.unwrapped.config
        if self.cuda_graphs:
            inputs = rounded_up(inputs, filler=config.filler_token_id)
        placeholders = inputs["input_ids"] == config.point_token_id
        aligned = inputs["alignment_mask"].flatten().nonzero().flatten()
        found = {"point_positions": placeholders.flatten().nonzero().flatten(), "alignment_mask": aligned}
        return super()._prepare_inputs({**inputs, **found})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The step's loss of one batch; `lm_loss` and `alignment_loss` are logged apart."""
        inputs = dict(inputs)
        features = {name: inputs.pop(name) for name in ALIGNMENT_FIELDS.values() if name in inputs}
        mask = inputs.pop("alignment_mask")
        if self.regularizer is not None:
            self.regularizer.progress = self.state.global_step / self.settings.max_steps
            has_clouds = bool(features) or "point_clouds" in inputs
            target = self._target(features) if has_clouds else torch.empty(0, self.regularizer.target_size)
            inputs["alignment_mask"], inputs["alignment_target"] = mask, target
        # The deepest features that are there enter the model; those before them were needed for the target alone.
        for name in ("point_tokens", "point_features"):
            if name in features:
                inputs[name] = features[name]
                break
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, use_cache=False)
        world = self.args.world_size
        loss = outputs.loss * world
        self.add_to_log(lm_loss=loss)
        if self.regularizer is not None:
            term = self.regularizer.take()
            count = max(term.count, 1) if self._num_point_tokens is None else self._num_point_tokens
            alignment = term.total / count * world
            self.add_to_log(alignment_loss=alignment)
            loss = loss + term.weight * alignment
        return (loss, outputs) if return_outputs else loss

    def _target(self, features: dict[str, Tensor]) -> Any:
        config = self.unwrapped.config
        if features.get(ALIGNMENT_FIELDS[self.target]) is not None:
            return alignment_target(features, self.target, config.num_point_tokens)
        return lambda output: alignment_target(output.points, self.target, config.num_point_tokens)


def build_regularizer(
    model: PointAlignForConditionalGeneration, settings: AlignmentSettings, seed: int
) -> AlignmentRegularizer | None:
    """The regulariser that a recipe asks for, attached to the model; None for a weight of 0.

    Raises:
        ConfigError: when a layer or the target does not exist in this model.
    """
    if settings.weight == 0:
        return None
    connector: Any = model.config.connector_config
    if settings.target == "qformer" and connector.kind != "qformer":
        raise ConfigError("alignment.target qformer needs a Q-Former; choose point_encoder or projector for this model")
    encoder: Any = model.config.point_encoder_config
    widths = {
        "qformer": connector.qformer_config.hidden_size,
        "point_encoder": encoder.hidden_size,
        "projector": connector.output_size,
    }
    regularizer = AlignmentRegularizer(
        hidden_size=connector.output_size,
        target_size=widths[settings.target],
        layers=settings.layers,
        weight=settings.weight,
        loss=settings.loss,
        depth=settings.depth,
        schedule=settings.schedule,
        stop_fraction=settings.stop_fraction,
        seed=seed,
    )
    return regularizer.attach(model)


def mixture(dataset: ConversationDataset, recipe: Recipe) -> Callable[[int, int, int], MixtureBatchSampler]:
    """The recipe's sets over a dataset, as a function of the number of batches and the process."""
    indices = [dataset.conversations.of_types(settings.types) for settings in recipe.data.sets]
    kind = NumberedBatches if recipe.data.augment else MixtureBatchSampler
    return lambda count, rank, world: kind(indices, recipe.data.sets, count, recipe.seed, rank, world)


def build_trainer(
    model: PointAlignForConditionalGeneration,
    processor: Any,
    dataset: ConversationDataset,
    recipe: Recipe,
    regularizer: AlignmentRegularizer | None,
    arguments: TrainingArguments,
    callbacks: list[Any],
) -> AlignmentTrainer:
    """The trainer of a recipe's language stage, with the regulariser that is attached to the model, if any."""
    count: Any = model.config.num_point_tokens
    released = recipe.as_released or recipe.alignment.positions == "released"
    positions = partial(released_alignment_mask, num_point_tokens=count) if released else None
    return AlignmentTrainer(
        regularizer=regularizer,
        target=recipe.alignment.target,
        packing=recipe.packing and not released,
        compile=recipe.compile,
        cuda_graphs=recipe.cuda_graphs,
        float8=recipe.float8,
        batches=mixture(dataset, recipe),
        settings=recipe.optimizer,
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(processor, positions),
        callbacks=callbacks,
    )
