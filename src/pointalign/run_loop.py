"""The loop that every training run goes through: arguments, progress, metrics, and a clean stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from pointalign.config import Recipe
from pointalign.device import native_bf16
from pointalign.errors import ConfigError, PointAlignError
from pointalign.progress import progress, say
from pointalign.recipe_trainer import RecipeTrainer
from pointalign.run_folder import RunFolder

SAME_COMMAND = "give the same command again to go on"
TENSORBOARD_VARIABLE = "TENSORBOARD_LOGGING_DIR"


class RunStopped(PointAlignError):
    """The run was asked to stop (Ctrl-C or SIGTERM) and has written a checkpoint to go on from.

    Args:
        done: how far it came.
        remedy: how to go on.
    """

    def __init__(self, done: str, remedy: str = "add --resume to go on") -> None:
        super().__init__(f"{done}; {remedy}")
        self.done = done


def uses_bf16(recipe: Recipe) -> bool:
    """Whether a recipe computes in bfloat16 on this machine."""
    return recipe.precision == "bf16" or (recipe.precision == "auto" and native_bf16())


def check_trackers(names: Sequence[str]) -> None:
    """See that transformers' Trainer knows the trackers, and that they are installed.

    Raises:
        ConfigError: when one is not.
    """
    try:
        for callback in get_reporting_integration_callbacks(list(names)):
            callback()
    except (ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(
            f"report_to {', '.join(names)}: {str(error).strip().splitlines()[0]}; install it, or name another tracker or none"
        ) from error


def training_arguments(recipe: Recipe, folder: RunFolder) -> TrainingArguments:
    """transformers' arguments for a recipe."""
    settings = recipe.optimizer
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=settings.max_steps,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        bf16=uses_bf16(recipe),
        use_cpu=not torch.accelerator.is_available(),
        dataloader_num_workers=recipe.workers,
        gradient_checkpointing=recipe.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        save_total_limit=2,
        seed=recipe.seed,
        report_to=recipe.report_to or "none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        fsdp=recipe.fsdp and int(os.environ.get("WORLD_SIZE", "1")) > 1,  # pyright: ignore[reportArgumentType]
        fsdp_config={"version": 2},
        remove_unused_columns=False,
        label_names=["labels"],
    )
    if arguments.n_gpu > 1:
        # Trainer would split each batch over them, packed conversations too.
        say(
            f"one of {arguments.n_gpu} GPUs trains; `torchrun --nproc-per-node {arguments.n_gpu} -m pointalign train` uses all"
        )
        arguments._n_gpu = 1
    return arguments


class RunCallback(TrainerCallback):
    """Writes metrics, moves the progress bar, and stops at the next step when a signal asks any of the processes for it."""

    def __init__(self, folder: RunFolder, advance: Callable[[int], None]) -> None:
        self.folder, self.advance = folder, advance
        self.stop_asked = False
        self.last_losses = "no loss yet"
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A checkpoint's are those of the run that wrote it.
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps
        if args.world_size > 1:
            # What the processes tell one another goes from CPU to CPU: no device is waited for.
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)
        if self._all_stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True  # a loss that is not finite ends the run before it is saved

    def _all_stop(self) -> bool:
        """Whether any process was asked to stop; all find the same, and so stop after the same step."""
        if self._group is None:
            return self.stop_asked
        asked = torch.tensor(int(self.stop_asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.last_losses = "  ".join(
            f"{k} {logs[k]:.3f}"
            for k in ("lm_loss", "alignment_loss", "contrastive_loss", "word_loss", "loss")
            if k in logs
        )
        self.folder.add_metrics({"step": state.global_step, **logs})


@contextmanager
def curves_in(folder: RunFolder) -> Iterator[None]:
    """A run's TensorBoard files lie in its own folder, unless the environment names another."""
    if TENSORBOARD_VARIABLE in os.environ:
        yield
        return
    os.environ[TENSORBOARD_VARIABLE] = str(folder.path / "tensorboard")
    try:
        yield
    finally:
        del os.environ[TENSORBOARD_VARIABLE]


@contextmanager
def stop_on_signal(callback: RunCallback) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run after the step in hand, with a checkpoint; the second ends it at once."""
    previous = {}

    def ask(number: int, frame: Any) -> None:
        if callback.stop_asked:
            raise KeyboardInterrupt
        callback.stop_asked = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    except ValueError:
        pass  # Signals reach the main thread alone; elsewhere the caller's own handling stays.
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_trainer(
    recipe: Recipe, folder: RunFolder, build: Callable[[TrainingArguments, list[Any]], RecipeTrainer]
) -> RecipeTrainer:
    """Train to the end from the last checkpoint, with progress, metrics and a clean stop on signals.

    Raises:
        RunStopped: when a signal stopped it before the end.
    """
    checkpoint = folder.last_checkpoint()
    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    arguments = training_arguments(recipe, folder)
    if arguments.process_index == 0:
        folder.forget_metrics_after(done)
    with ExitStack() as stack:
        stack.enter_context(curves_in(folder))
        callback = RunCallback(folder, lambda steps: None)
        trainer = build(arguments, [callback])
        trainer.remove_callback(PrinterCallback)
        if trainer.is_world_process_zero():
            callback.advance = stack.enter_context(
                progress(recipe.name, recipe.optimizer.max_steps, lambda: callback.last_losses, before=done)
            )
        stack.enter_context(stop_on_signal(callback))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < recipe.optimizer.max_steps:
        raise RunStopped(f"stopped at step {trainer.state.global_step} of {recipe.optimizer.max_steps}")
    return trainer
