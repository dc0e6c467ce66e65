"""What the machine at hand computes well."""

from __future__ import annotations

import torch


def native_bf16(device: torch.device | None = None) -> bool:
    """Whether a device multiplies bfloat16 matrices natively; elsewhere it is slower than float32.

    Args:
        device: CUDA where there is any, else the CPU, when None.
    """
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    return any(check() for check in checks if check is not None)
