"""The sampling kernel without a GPU: run by Triton's interpreter, and compiled for cards that are not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pointalign import geometry
from pointalign.geometry import farthest_point_sample

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed, PyTorch for CPUs comes without it: `make test-kernels` brings it and runs this",
)


def run(code: str, tmp_path, **environment: str) -> str:
    """Triton settles when it is imported whether it interprets, so each way has its own process."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


INTERPRETED = """
import torch
from pointalign import kernels
from pointalign.geometry import farthest_point_sample
draw = torch.Generator().manual_seed(0)
cases = {
    "rounded coordinates": (torch.randn(2, 19, 3, generator=draw), 9, 3),
    "ties and repeated points": (torch.randint(-1, 2, (1, 12, 3), generator=draw).float(), 12, 1),
    "one place": (torch.full((1, 9, 3), 0.3), 5, 8),
    "one point": (torch.zeros(2, 1, 3), 1, 0),
    "one sample": (torch.zeros(1, 9, 3), 1, 4),
    "a strided view": (torch.randn(1, 3, 11, generator=draw).transpose(1, 2), 5, 0),
    "a large cloud": (torch.randn(1, 16_384, 3, generator=draw), 4, 16_383),
}
for name, (xyz, count, start) in cases.items():
    for tile in (kernels.TILE, 8):
        if tile == 8 and xyz.shape[1] > 100:
            continue
        kernels.TILE, whole = tile, kernels.TILE
        got = kernels.choose_farthest(xyz, count, start)
        kernels.TILE = whole
        assert got.dtype == torch.long
        assert torch.equal(got, farthest_point_sample(xyz, count, start)), (name, tile)
        print(name)
"""


@needs_triton
def test_the_interpreted_kernel_chooses_what_the_cpu_chooses(tmp_path):
    assert len(run(INTERPRETED, tmp_path, TRITON_INTERPRET="1").splitlines()) == 13


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pointalign import kernels
types = {"xyz": "*fp32", "nearest": "*fp32", "chosen": "*i64", "count": "i32", "num_samples": "i32", "start": "i32"}
source = ASTSource(kernels._choose, {**types, "TILE": "constexpr"}, constexprs={"TILE": kernels.TILE})
cards = (("cuda", 80, 32, "ptx"), ("cuda", 90, 32, "ptx"), ("hip", "gfx942", 64, "amdgcn"))
for *card, name in cards:
    options = {"num_warps": kernels.WARPS, "enable_fp_fusion": False}
    print(compile(source, target=GPUTarget(*card), options=options).asm[name])
"""


@needs_triton
def test_the_kernel_compiles_for_real_cards_and_rounds_as_a_cpu_does(tmp_path):
    assembly = run(COMPILED, tmp_path)
    assert ".target sm_80" in assembly
    assert ".target sm_90" in assembly
    assert "gfx942" in assembly
    assert "mul" in assembly
    assert "fma" not in assembly, "a fused multiply-add rounds once where a CPU rounds twice"


def test_where_triton_does_not_run_the_steps_are_taken_one_by_one(monkeypatch):
    """A device that calls itself CUDA without being it: the kernel's trial fails, once and with a word."""
    geometry._kernel_runs.cache_clear()
    with pytest.warns(UserWarning, match="farthest point sampling goes step by step, Triton does not run here: "):
        assert not geometry._kernel_runs(torch.device("cuda:99"))
    assert not geometry._kernel_runs(torch.device("cuda:99"))
    assert not geometry._kernel_runs(torch.device("mps"))
    geometry._kernel_runs.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [1, 31, 4096, 8192, 16_384, 40_000])
def test_the_kernel_on_a_gpu_chooses_what_the_cpu_chooses(count):
    if not geometry._kernel_runs(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("Triton does not run on this GPU")
    xyz = torch.randn(3, count, 3, generator=torch.Generator().manual_seed(count))
    samples = min(count, 512)
    assert torch.equal(
        farthest_point_sample(xyz.cuda(), samples, 1 % count).cpu(), farthest_point_sample(xyz, samples, 1 % count)
    )
