"""What the machine at hand computes well."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

# How many of the kernels that PyTorch makes for matrix products on a CPU are kept, one for each shape and a megabyte or so in
# size. Its own number is 1,024, which lets memory grow for as long as shapes are new (pytorch/pytorch issue 27971). The
# blocks of a language model share some ten on their way forward and some twenty back; a step took no longer with 32 kept
# (docs/LOG.md, 2026-11-26).
KEPT_KERNELS = 32
KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def native_bf16(device: torch.device | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices natively; elsewhere it is slower than float32.

    Args:
        device: CUDA where there is any, else the CPU, when None.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)


def own_accelerator() -> torch.device | None:
    """The accelerator of this process, one for each process of a machine by torchrun's `LOCAL_RANK`; None without any."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None:
        return None
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())


def machine_name(device: torch.device | None = None) -> str:
    """The GPU's name, or the CPU's with what of it decides how fast PyTorch computes: "AMD EPYC, AVX512, bfloat16, 2 cores".

    Args:
        device: CUDA where there is any, else the CPU, when None.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    parts = [_processor_name(), torch.backends.cpu.get_cpu_capability(), f"{os.cpu_count()} cores"]
    if native_bf16(torch.device("cpu")):
        parts.insert(2, "bfloat16")
    return ", ".join(parts)


def _processor_name() -> str:
    """The CPU's name where the system tells it, else its architecture."""
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def keep_few_kernels() -> None:
    """Bound what PyTorch keeps of kernels on a CPU, unless the environment says how much.

    oneDNN and its wrapper look at the environment at the first product that they take in this process, so it is to be called
    before that.
    """
    for name in KERNEL_CACHES:
        os.environ.setdefault(name, str(KEPT_KERNELS))
