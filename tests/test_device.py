"""What the machine at hand is told."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from pointalign.device import KEPT_KERNELS, KERNEL_CACHES, keep_few_kernels, machine_name, native_bf16, own_accelerator

# As many shapes as are kept and half as many more, and then the first one again.
PRODUCTS = """
import torch
from pointalign.device import KEPT_KERNELS, keep_few_kernels

if {few}:
    keep_few_kernels()
matrix = torch.randn(32, 16).to_mkldnn()
for rows in [*range(1, KEPT_KERNELS * 3 // 2), 1]:
    torch._C._nn.mkldnn_linear(torch.randn(rows, 16).to_mkldnn(), matrix)
"""


def _made(few: bool) -> int:
    """How many kernels oneDNN makes for the products above, by what it says itself."""
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
    ran = subprocess.run(
        [sys.executable, "-c", PRODUCTS.format(few=few)],
        env=environment | {"ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    return sum("create:cache_miss" in line and ",mb1ic16" in line for line in ran.stdout.splitlines())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")
def test_kernels_of_many_shapes_are_not_kept() -> None:
    assert (_made(few=False), _made(few=True)) == (1, 2)


def test_a_process_has_an_accelerator_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert own_accelerator() is None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_accelerator() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_accelerator() == torch.device("cuda", 3)


def test_a_cpu_is_called_by_what_it_can() -> None:
    told = machine_name(torch.device("cpu"))
    assert torch.backends.cpu.get_cpu_capability() in told
    assert told.endswith(f"{os.cpu_count()} cores")
    assert ("bfloat16" in told) == native_bf16(torch.device("cpu"))


def test_what_the_environment_says_of_kept_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = KERNEL_CACHES
    monkeypatch.setenv(own, "7")
    monkeypatch.setenv(other, "")  # so that it is as it was afterwards
    monkeypatch.delenv(other)
    keep_few_kernels()
    assert (os.environ[own], os.environ[other]) == ("7", str(KEPT_KERNELS))
