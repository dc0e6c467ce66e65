"""transformers' Trainer with a recipe's optimiser, schedule and batches, and with checkpoints of what trains."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pointalign.config import OptimizerSettings
from pointalign.errors import CheckpointError, ConfigError, PointAlignError
from pointalign.models.checkpoint import load_into, load_weights_file
from pointalign.sharding import allow_cpu, prepare_to_split, split_like, split_optimizer_state, whole

TRAINABLE_FILE = "trainable.safetensors"


def learning_rate_at(step: int, settings: OptimizerSettings) -> float:
    """Learning rate of a step, counted from 0: linear warm-up, then a cosine down to the minimum at the last step.

    Source: PointAlign (arXiv 2603.00412): 1e-7 to 3e-6 over 1,000 steps, cosine to 1e-7 over 10,000 steps.
    """
    peak, low = settings.learning_rate, settings.min_learning_rate
    if step < settings.warmup_steps:
        return settings.warmup_start + (peak - settings.warmup_start) * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(settings.max_steps - settings.warmup_steps, 1)
    return low + (peak - low) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices with weight decay, vectors and biases without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


class _Walked:
    """What a walk through a model's modules finds; a copy of the model copies it too, so no function stands in for it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.weights = model, list(model.parameters())
        self.awake: list[tuple[nn.Module, bool]] = []
        self.counted: dict[tuple[Any, ...], int] = {}

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """As `nn.Module.parameters`."""
        return iter(self.weights) if recurse else type(self.model).parameters(self.model, recurse=False)

    def train(self, mode: bool = True) -> nn.Module:
        """As `nn.Module.train`; nothing is done where all modules are as the last call left them."""
        if not mode or not self.awake or any(module.training is not now for module, now in self.awake):
            type(self.model).train(self.model, mode)
            self.awake = [(module, module.training) for module in self.model.modules()] if mode else []
        return self.model

    def num_parameters(self, *given: Any, **named: Any) -> int:
        """As `PreTrainedModel.num_parameters`."""
        key = (*given, *named.items())
        if key not in self.counted:
            model: Any = self.model
            self.counted[key] = type(model).num_parameters(model, *given, **named)
        return self.counted[key]


@contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model's modules are not walked again at every step; its weights, and which train, must stay.

    Trainer counts weights, looks for them to clip and to clear their gradients, and asks for training mode at every step:
    each is a walk through all modules, thousands of a language model in LoRA, and together as long as a GPU's step.
    """
    walked = _Walked(model)
    names = ["parameters", "train", *(["num_parameters"] if isinstance(model, PreTrainedModel) else [])]
    for name in names:
        setattr(model, name, getattr(walked, name))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


class RecipeTrainer(Trainer):
    """transformers' Trainer with a recipe's optimiser, schedule, batches, and checkpoints of what trains.

    Args:
        batches: builds the batch sampler from (number of batches, rank, world size).
        settings: the recipe's optimiser.
        kwargs: passed to `Trainer`.
    """

    def __init__(
        self, batches: Callable[[int, int, int], Iterable[list[Any]]], settings: OptimizerSettings, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.batches, self.settings = batches, settings
        # Every loss here is normalised over the whole accumulated, distributed batch, so Trainer must not divide it.
        self.model_accepts_loss_kwargs = True
        if self.is_fsdp_enabled:
            prepare_to_split(self.accelerator, self.model)  # pyright: ignore[reportArgumentType]
        self._sums: dict[str, float] = {}
        self._steps_summed = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`, without walking through all modules at every step; where FSDP splits weights, they change."""
        model: Any = self.model
        self._draw_apart()
        with nullcontext() if self.is_fsdp_enabled else walked_once(model):
            return super().train(*args, **kwargs)

    def _draw_apart(self) -> None:
        """Let each of several processes draw its own dropout, and another one from another step on."""
        args = self.args
        if args.world_size > 1:
            drawn = np.random.SeedSequence((args.seed, args.process_index, self.state.global_step))
            torch.manual_seed(int(drawn.generate_state(1)[0]))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As `Trainer`; processes that the checkpoint's run did not have begin anew from its step."""
        if checkpoint is not None:
            self._draw_apart()
        super()._load_rng_state(checkpoint)

    def create_accelerator_and_postprocess(self) -> None:
        """Also splits models on CPUs, where the arguments ask for FSDP."""
        super().create_accelerator_and_postprocess()
        plugin = self.args.fsdp_plugin_args
        if plugin is not None and not self.is_fsdp_enabled:
            allow_cpu(self.accelerator, plugin)
            self.is_fsdp_enabled = True

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process; sharded here, because the batches of a mixture differ in size."""
        count = self.settings.max_steps * self.settings.gradient_accumulation
        sampler = self.batches(count, self.args.process_index, self.args.world_size)
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,  # pyright: ignore[reportArgumentType]
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            # With workers a thread would pin what comes, and end a recording of CUDA graphs that is under way.
            pin_memory=self.args.device.type == "cuda" and not workers,
            num_workers=workers,
            # What reads the clouds is a closure, which no other way of starting a process can pass on.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_leave_stopping_to_parent if workers else None,
        )

    def _prepare_input(self, data: Any) -> Any:
        """As `Trainer`, without waiting for the device; batches of this process lie in pinned memory."""
        if isinstance(data, Tensor) and self.args.device.type == "cuda":
            pinned = data.pin_memory() if self.args.dataloader_num_workers else data
            return pinned.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one step, and how many items their losses are means over.

        Raises:
            PointAlignError: as the data, also where a worker reads them.
        """
        try:
            batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        except PointAlignError as error:
            lines = str(error).strip().splitlines()
            if not self.args.dataloader_num_workers or len(lines) == 1:
                raise
            # A worker's: the loader puts its traceback before what it says.
            raise type(error)(lines[-1].partition(": ")[2]) from error
        return batches, self.count_items(batches, device)

    def count_items(self, batches: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """What the losses of a step are divided by; here the number of batches."""
        return torch.tensor(len(batches)).to(device, non_blocking=True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW on the parameters that train."""
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(
                parameter_groups(self.model if model is None else model, self.settings.weight_decay),  # pyright: ignore
                lr=self.settings.learning_rate,
                betas=(0.9, self.settings.beta2),
                fused=self.args.device.type == "cuda" or None,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The recipe's warm-up and cosine."""
        if self.lr_scheduler is None:
            peak = self.settings.learning_rate
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: learning_rate_at(step, self.settings) / peak
            )
        return self.lr_scheduler

    def add_to_log(self, **values: Tensor) -> None:
        """Sum named losses until the next log line."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach()  # pyright: ignore

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean of each named loss since the last line; a loss that is not finite ends the run.

        Raises:
            PointAlignError: when the loss is NaN or infinite.
        """
        if "loss" in logs and self._sums:
            steps = max(self.state.global_step - self._steps_summed, 1)
            names = sorted(self._sums)
            means = torch.stack([torch.as_tensor(self._sums[name], dtype=torch.float32) for name in names]) / steps
            means = self.accelerator.reduce(means.to(self.args.device), reduction="mean")
            logs = {**logs, **dict(zip(names, means.tolist(), strict=True))}  # pyright: ignore
            self._sums, self._steps_summed = {}, self.state.global_step
            if not all(math.isfinite(logs[name]) for name in (*names, "loss")):
                raise PointAlignError(self._not_finite("the loss"))
        super().log(logs, start_time)

    def _not_finite(self, what: str) -> str:
        return (
            f"{what} is not finite at step {self.state.global_step}; lower optimizer.learning_rate or use precision fp32, and "
            "resume from the last checkpoint"
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights that train (and buffers of modules in training mode); the rest is the recipe's start.

        Raises:
            PointAlignError: when one of them is NaN or infinite; an earlier checkpoint is then the last.
        """
        own = trained_state(self.accelerator.unwrap_model(self.model))  # pyright: ignore[reportArgumentType]
        if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
            raise PointAlignError(self._not_finite("a weight"))
        state = whole(own)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(state, folder / TRAINABLE_FILE)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"cannot write checkpoint {self.state.global_step} into {self.args.output_dir} "
                f"({str(error).splitlines()[0]}); free some space and go on with --resume"
            ) from error

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # Trainer would write the whole model too, in files that only FSDP reads.
        state = whole(self.optimizer.state_dict())  # pyright: ignore[reportOptionalMemberAccess]
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # pyright: ignore

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        folder = Path(checkpoint or "")
        for file in (folder / OPTIMIZER_NAME, folder / SCHEDULER_NAME) if checkpoint is not None else ():
            if not is_zipfile(file):
                raise CheckpointError(
                    f"{file} is missing or cut short; delete its folder to go on from the checkpoint before"
                )
        if not self.is_fsdp_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        optimizer: Any = self.optimizer
        optimizer.load_state_dict(split_optimizer_state(state, optimizer))
        self.lr_scheduler.load_state_dict(schedule)  # pyright: ignore[reportOptionalMemberAccess]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINABLE_FILE
        target = self.model if model is None else model
        state = load_weights_file(path)
        own = trained_state(target)  # pyright: ignore[reportArgumentType]
        if own.keys() != state.keys():
            changed = sorted(own.keys() ^ state.keys())[:3]
            raise ConfigError(f"{path} was written by another recipe (differs in {changed}); start a new run folder")
        state = {name: split_like(tensor, own[name]) for name, tensor in state.items()}
        load_into(target, state, path, ignore="")  # pyright: ignore[reportArgumentType]
        self._steps_summed = int(Path(resume_from_checkpoint).name.rpartition("-")[2])


def _leave_stopping_to_parent(worker: int) -> None:
    """In a process that prepares batches: only its parent's SIGTERM ends it.

    One to all of a run's processes would end it first, and the run without its checkpoint.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS does not tell who sent a signal
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that train, and the buffers of the modules that hold them (batch norm's running statistics)."""
    state = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    for prefix, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{prefix}.{name}"] = buffer.detach().contiguous()
    return state
