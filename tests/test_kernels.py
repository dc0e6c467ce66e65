"""The kernels without a GPU: run by Triton's interpreter, and compiled for cards that are not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from pointalign import geometry
from pointalign.geometry import farthest_point_sample, k_nearest_neighbors

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


NEIGHBORS = """
import torch
from pointalign import kernels
from pointalign.geometry import k_nearest_neighbors
draw = torch.Generator().manual_seed(0)
cases = {
    "rounded coordinates": (torch.randn(2, 5, 3, generator=draw), torch.randn(2, 19, 3, generator=draw), 4),
    "its own points, ties and repeated ones": (torch.randint(-1, 2, (1, 6, 3), generator=draw).float(),) + (
        torch.randint(-1, 2, (1, 40, 3), generator=draw).float(), 40),
    "one place": (torch.full((1, 2, 3), 0.3), torch.full((1, 9, 3), 0.3), 9),
    "one point": (torch.zeros(2, 3, 3), torch.zeros(2, 1, 3), 1),
    "a strided view": (torch.randn(1, 3, 4, generator=draw).transpose(1, 2), torch.randn(1, 17, 6, generator=draw)[..., :3], 3),
    "far apart": (torch.full((1, 1, 3), 3e19), torch.randn(1, 7, 3, generator=draw), 7),
    "a large cloud": (torch.randn(1, 2, 3, generator=draw), torch.randn(1, 8192, 3, generator=draw), 3),
}
for name, (queries, xyz, k) in cases.items():
    got = kernels.choose_nearest(queries, xyz, k)
    assert got.dtype == torch.long
    assert sorted(got[0, 0].tolist()) == sorted(set(got[0, 0].tolist())), name
    if name != "far apart":
        assert torch.equal(got, k_nearest_neighbors(queries, xyz, k)), name
    print(name)
"""


@needs_triton
def test_the_interpreted_kernel_finds_the_neighbours_that_the_cpu_finds(tmp_path):
    assert len(run(NEIGHBORS, tmp_path, TRITON_INTERPRET="1").splitlines()) == 7


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from pointalign import kernels
types = {"xyz": "*fp32", "nearest": "*fp32", "chosen": "*i64", "count": "i32", "num_samples": "i32", "start": "i32"}
near = {"queries": "*fp32", "xyz": "*fp32", "found": "*i64", "num_queries": "i32", "count": "i32", "k": "i32"}
cards = (("cuda", 80, 32, "ptx"), ("cuda", 90, 32, "ptx"), ("hip", "gfx942", 64, "amdgcn"))
for kernel, given, tile, warps in (
    (kernels._choose, types, kernels.TILE, kernels.WARPS), (kernels._choose_near, near, 8192, kernels.NEIGHBOR_WARPS)
):
    source = ASTSource(kernel, {**given, "TILE": "constexpr"}, constexprs={"TILE": tile})
    for *card, name in cards:
        options = {"num_warps": warps, "enable_fp_fusion": False}
        print(compile(source, target=GPUTarget(*card), options=options).asm[name])
"""


@needs_triton
def test_the_kernels_compile_for_real_cards_and_round_as_a_cpu_does(tmp_path):
    assembly = run(COMPILED, tmp_path)
    assert assembly.count(".target sm_80") == 2
    assert assembly.count(".target sm_90") == 2
    assert "gfx942" in assembly
    assert "mul" in assembly
    assert "fma" not in assembly, "a fused multiply-add rounds once where a CPU rounds twice"


def test_where_triton_does_not_run_the_steps_are_taken_one_by_one(monkeypatch):
    """A device that calls itself CUDA without being it: the kernel's trial fails, once and with a word."""
    geometry.kernel_runs.cache_clear()
    with pytest.warns(UserWarning, match="Triton does not run here, PyTorch's kernels stand in for ours: "):
        assert not geometry.kernel_runs(torch.device("cuda:99"))
    assert not geometry.kernel_runs(torch.device("cuda:99"))
    assert not geometry.kernel_runs(torch.device("mps"))
    geometry.kernel_runs.cache_clear()


@pytest.fixture
def gpu():
    """A GPU on which Triton runs."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if not geometry.kernel_runs(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("Triton does not run on this GPU")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("count", [1, 31, 4096, 8192, 16_384, 40_000])
def test_the_kernel_on_a_gpu_chooses_what_the_cpu_chooses(count):
    xyz = torch.randn(3, count, 3, generator=torch.Generator().manual_seed(count))
    samples = min(count, 512)
    assert torch.equal(
        farthest_point_sample(xyz.cuda(), samples, 1 % count).cpu(), farthest_point_sample(xyz, samples, 1 % count)
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("count", [1, 31, 4096, 8192, 16_384])
def test_the_kernel_on_a_gpu_finds_the_neighbours_that_the_cpu_finds(count):
    xyz = torch.randn(3, count, 3, generator=torch.Generator().manual_seed(count))
    near = min(count, 32)
    assert torch.equal(
        k_nearest_neighbors(xyz[:, :100].cuda(), xyz.cuda(), near).cpu(), k_nearest_neighbors(xyz[:, :100], xyz, near)
    )
