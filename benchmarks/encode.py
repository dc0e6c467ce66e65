"""Clouds per second from points to tokens: our encoder against the published one written out plainly in PyTorch.

    python benchmarks/encode.py                    # the household encoder: 1,024 points to 65 tokens
    python benchmarks/encode.py --size paper       # 8,192 points to 513 tokens, random weights; --check: exit 1 on a miss
    python benchmarks/encode.py --procedure ours   # or published: one alone
    python benchmarks/encode.py --size tiny        # the same path in seconds
    python benchmarks/encode.py --growth           # 1, 4, 16 times the clouds and the points: seconds and memory

Each procedure is a process of its own with the same weights and clouds; they take turns, so that a busy machine slows both.
On a shared machine `speedup_in_cpu_seconds` is steadier. Before anything is timed they are held against each other on the
first clouds: the points that a loop with the same order of sums samples, neighbours as near but for rounding, and of the same
groups tokens that differ by at most 1e-4 of the largest; exit 1 if not.

The published procedure samples in a loop of torch, measures every centre against every point, runs 1x1 convolutions and
normalisations one by one over all groups, and holds the attention of every token to every other one. All is float32.
Targets for `speedup`: 1.5 on a CPU, 5 on a GPU. It ends in one line of JSON; with `--growth` in one that holds the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from measuring import PROCEDURES, Worker, device_name, own_output, peak_memory, quartiles, synchronize
from torch import Tensor

from pointalign.config import Recipe, load_recipe
from pointalign.geometry import farthest_point_sample, gather_points, k_nearest_neighbors, normalize_point_cloud
from pointalign.models.point_encoder import PointEncoder, PointEncoderConfig
from pointalign.run_folder import environment

TARGETS = {"cpu": 1.5, "cuda": 5.0}
TOLERANCE, ROUNDING = 1e-4, 1e-6
# Clouds of a round and rounds, on a CPU and on a GPU.
ROUNDS = {
    "cpu": {"household": (16, 9), "paper": (2, 5), "tiny": (2, 3)},
    "cuda": {"household": (512, 9), "paper": (64, 9)},
}
PARTS = ("sampling", "grouping", "group_encoder", "transformer")
GROWTH = (1, 4, 16)
POINTS = 8192


def make(size: str, count: int) -> tuple[PointEncoder, Tensor]:
    """An encoder of a size with random weights and statistics, and random clouds in the unit ball."""
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # or a GPU would convolve with ten bits
    config, points = PointEncoderConfig(), POINTS
    if size == "household":
        settings = load_recipe("household-encoder").model
        config, points = PointEncoderConfig(**asdict(settings.point_encoder)), settings.num_points
    elif size == "tiny":
        config, points = PointEncoderConfig(num_groups=16, group_size=8, num_hidden_layers=2), 128
    encoder = PointEncoder(config).eval().requires_grad_(False)
    for norm in (encoder.group_encoder.norm1, encoder.group_encoder.norm3):
        norm.running_mean.normal_(std=0.2)  # pyright: ignore[reportOptionalMemberAccess]
        norm.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return encoder.to(device_name()), normalize_point_cloud(torch.rand(count, points, 6)).to(device_name())


class Ours:
    """The parts as the package computes them."""

    def __init__(self, encoder: PointEncoder) -> None:
        self.encoder, self.config = encoder, encoder.config

    def sampling(self, points: Tensor) -> Tensor:
        """Indices of the centres (B, G)."""
        return farthest_point_sample(points[..., :3], self.config.num_groups)

    def grouping(self, points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Groups (B, G, K, C), centres (B, G, 3) and the neighbours' indices (B, G, K)."""
        centers = gather_points(points[..., :3], chosen)
        near = k_nearest_neighbors(centers, points[..., :3], self.config.group_size)
        groups = gather_points(points, near)
        return torch.cat([groups[..., :3] - centers.unsqueeze(2), groups[..., 3:]], dim=-1), centers, near

    def group_encoder(self, groups: Tensor) -> Tensor:
        """Features (B, G, D)."""
        return self.encoder.group_encoder(groups)

    def transformer(self, features: Tensor, centers: Tensor) -> Tensor:
        """Tokens (B, G + 1, D)."""
        return self.encoder.mix_groups(features, centers, features.new_zeros(len(features)))

    def whole(self, points: Tensor) -> Tensor:
        """From points to tokens."""
        return self.encoder(points)


class Published(Ours):
    """The same written out plainly, as the papers tell it (arXiv 2111.14819, section 3.1; arXiv 2603.00412)."""

    def sampling(self, points: Tensor, in_order: bool = False) -> Tensor:
        """A loop of small steps.

        Args:
            points: (B, N, C).
            in_order: add x, y and z one after the other; a GPU's own sum of three rounds otherwise, and chooses otherwise
                where two points are nearly as far.
        """
        xyz = points[..., :3]
        batch, count, _ = xyz.shape
        chosen = torch.zeros(batch, self.config.num_groups, dtype=torch.long, device=xyz.device)
        distance = torch.full((batch, count), torch.inf, device=xyz.device)
        farthest, rows = chosen[:, 0], torch.arange(batch, device=xyz.device)
        for step in range(self.config.num_groups):
            chosen[:, step] = farthest
            centre = xyz[rows, farthest].unsqueeze(1)
            squares = (xyz - centre).square()
            near = squares[..., 0] + squares[..., 1] + squares[..., 2] if in_order else squares.sum(dim=-1)
            distance = torch.minimum(distance, near)
            farthest = distance.argmax(dim=-1)
        return chosen

    def grouping(self, points: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All distances at once, and the least of each row."""
        rows = torch.arange(len(points), device=points.device)
        centers = points[rows[:, None], chosen, :3]
        distances = torch.cdist(centers, points[..., :3], compute_mode="donot_use_mm_for_euclid_dist")
        near = distances.topk(self.config.group_size, largest=False).indices
        groups = points[rows[:, None, None], near]
        return torch.cat([groups[..., :3] - centers.unsqueeze(2), groups[..., 3:]], dim=-1), centers, near

    def group_encoder(self, groups: Tensor) -> Tensor:
        """1x1 convolutions over (B G, C, K), the maximum in front of each point's own feature."""
        part = self.encoder.group_encoder
        x = groups.flatten(0, 1).transpose(1, 2)
        x = self._convolved(F.relu(part.norm1(self._convolved(x, part.linear1))), part.linear2)
        x = torch.cat([x.max(dim=2, keepdim=True).values.expand_as(x), x], dim=1)
        x = self._convolved(F.relu(part.norm3(self._convolved(x, part.linear3))), part.linear4)
        return x.max(dim=2).values.unflatten(0, groups.shape[:2])

    @staticmethod
    def _convolved(x: Tensor, layer: Any) -> Tensor:
        return F.conv1d(x, layer.weight.unsqueeze(-1), layer.bias)

    def transformer(self, features: Tensor, centers: Tensor) -> Tensor:
        """Attention as a product, a softmax and a product."""
        encoder = self.encoder
        first = encoder.class_token.expand(len(features), -1, -1)
        tokens = torch.cat([first, encoder.reduce_dim(features)], dim=1)
        places = encoder.class_position.expand(len(features), -1, -1)
        places = torch.cat([places, encoder.position_embedding(centers)], dim=1)
        for block in encoder.blocks:
            tokens = self._block(block, tokens + places)
        return encoder.norm(tokens)

    @staticmethod
    def _block(block: Any, tokens: Tensor) -> Tensor:
        qkv = block.qkv(block.norm1(tokens)).unflatten(-1, (3, block.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = torch.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
        attended = torch.einsum("bhqk,bhkd->bhqd", weights.softmax(dim=-1), value)
        tokens = tokens + block.proj(attended.transpose(1, 2).flatten(2))
        return tokens + block.fc2(F.gelu(block.fc1(block.norm2(tokens))))

    def whole(self, points: Tensor) -> Tensor:
        """From points to tokens."""
        groups, centers, _ = self.grouping(points, self.sampling(points))
        return self.transformer(self.group_encoder(groups), centers)


@torch.inference_mode()
def hold_against_each_other(encoder: PointEncoder, points: Tensor) -> dict[str, Any]:
    """How far the two procedures' tokens are apart.

    Raises:
        SystemExit: when they choose other points or neighbours, or their tokens differ by more than rounding.
    """
    ours, published = Ours(encoder), Published(encoder)
    chosen = ours.sampling(points)
    if not torch.equal(chosen, published.sampling(points, in_order=True)):
        raise SystemExit("the procedures sample other points")
    (groups, centers, near), (_, _, plain) = ours.grouping(points, chosen), published.grouping(points, chosen)
    distances = torch.cdist(centers, points[..., :3], compute_mode="donot_use_mm_for_euclid_dist")
    if not torch.allclose(distances.gather(2, near), distances.gather(2, plain), rtol=ROUNDING, atol=0):
        raise SystemExit("the procedures find other neighbours")
    tokens, wanted = ours.whole(points), published.transformer(published.group_encoder(groups), centers)
    apart = ((tokens - wanted).abs().max() / wanted.abs().max()).item()
    if not apart <= TOLERANCE:
        raise SystemExit(f"the procedures' tokens are {apart:.1e} of the largest apart, more than {TOLERANCE:g}")
    return {"tokens_apart": float(f"{apart:.2g}"), "neighbours_in_another_order": int((near != plain).sum())}


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until the device has done the work, and what came out."""
    synchronize()
    start = time.perf_counter()
    result = function(*arguments)
    synchronize()
    return time.perf_counter() - start, result


def one_round(procedure: Ours, points: Tensor) -> dict[str, float]:
    """Seconds of the whole, of the processor while it worked, and of each part."""
    start = time.process_time()
    told = {"whole": timed(procedure.whole, points)[0]}
    told["cpu"] = time.process_time() - start
    told["sampling"], chosen = timed(procedure.sampling, points)
    told["grouping"], (groups, centers, _) = timed(procedure.grouping, points, chosen)
    told["group_encoder"], features = timed(procedure.group_encoder, groups)
    told["transformer"], _ = timed(procedure.transformer, features, centers)
    return told


@torch.inference_mode()
def work(options: argparse.Namespace) -> None:
    """One procedure in this process: a round for every line on stdin, as many as there are to be; the first warms up."""
    told = own_output()
    encoder, points = make(options.size, options.clouds)
    if options.worker == "check":
        print(json.dumps(hold_against_each_other(encoder, points[:4])), file=told, flush=True)
        return
    procedure = (Ours if options.worker == "ours" else Published)(encoder)
    for _ in range(options.rounds + 1):
        print(json.dumps(one_round(procedure, points)), file=told, flush=True)
        sys.stdin.readline()
    print(json.dumps({"peak": peak_memory(device_name())}), file=told, flush=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run the procedures in turn; medians, memory, and how far their outputs are apart."""
    result: dict[str, Any] = {"benchmark": "encode", "size": options.size, "clouds": options.clouds}
    names = PROCEDURES if options.procedure == "both" else (options.procedure,)
    given = ["--size", options.size, "--clouds", str(options.clouds), "--rounds", str(options.rounds)]
    result |= Worker(__file__, "check", given).hear()
    workers = [Worker(__file__, name, given) for name in names]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.rounds + 1):
        for worker in workers:
            seconds = worker.hear() if number == 0 else (worker.go(), worker.hear())[1]
            if number:
                rounds[worker.procedure].append(seconds)
    for worker in workers:
        worker.go()
        result[worker.procedure] = summary(rounds[worker.procedure], options.clouds, worker.hear()["peak"])
        worker.process.wait()
    if len(names) == 2:
        ours, published = (result[name] for name in PROCEDURES)
        result["speedup"] = round(ours["clouds_per_second"] / published["clouds_per_second"], 2)
        result["speedup_in_cpu_seconds"] = round(published["cpu_seconds"] / ours["cpu_seconds"], 2)
        result["speedup_of_parts"] = {
            part: round(ours[part] / published[part], 2) for part in (f"{name}_per_second" for name in PARTS)
        }
        result["memory_ratio"] = round(ours["peak_megabytes"] / published["peak_megabytes"], 3)
        result["target"] = TARGETS[device_name()]
    return result


def summary(rounds: Sequence[dict[str, float]], clouds: int, peak: int) -> dict[str, Any]:
    """Clouds per second of the whole with quartiles, and of each part; seconds of the processor for a cloud."""
    rates = {part: [clouds / seconds[part] for seconds in rounds] for part in ("whole", *PARTS)}
    return {
        "clouds_per_second": round(statistics.median(rates["whole"]), 3),
        "quartiles": quartiles(rates["whole"]),
        **{f"{part}_per_second": round(statistics.median(rates[part]), 2) for part in PARTS},
        "cpu_seconds": round(statistics.median(seconds["cpu"] for seconds in rounds) / clouds, 4),
        "peak_megabytes": round(peak / 2**20),
    }


@torch.inference_mode()
def grow(what: str, times: int) -> dict[str, Any]:
    """Seconds and memory of our path in this process, one of batch, points or file multiplied."""
    encoder, points = make("paper", times if what == "batch" else 1)
    if what != "batch":
        points = torch.rand(1, POINTS * times, 6, device=device_name())
    encoder(points[:1, :POINTS])
    before, busy = peak_memory(device_name()), time.process_time()
    if what == "file":  # as the processor cuts a large file down, on a CPU
        seconds, _ = timed(farthest_point_sample, points[..., :3].cpu(), POINTS)
    else:
        seconds, _ = timed(encoder, points)
    busy, more = time.process_time() - busy, (peak_memory(device_name()) - before) / 2**20
    return {
        "times": times,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(busy, 3),
        "more_peak_megabytes": round(more),
    }


def growth() -> dict[str, Any]:
    """The tables, each of their cells a process of its own."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for what in ("batch", "points", "file"):
        for times in GROWTH:
            command = [sys.executable, __file__, "--grow", what, str(times)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            tables.setdefault(what, []).append(json.loads(done.stdout.splitlines()[-1]))
            print(what, tables[what][-1], file=sys.stderr)
    return {"benchmark": "encode_growth", "size": "paper", "base_points": POINTS, **tables}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procedure", choices=["both", *PROCEDURES], default="both")
    parser.add_argument("--size", choices=["household", "paper", "tiny"], default="household")
    parser.add_argument("--clouds", type=int, help="clouds of a round; by size and device when not given")
    parser.add_argument("--rounds", type=int, help="timed rounds; by size and device when not given")
    parser.add_argument("--check", action="store_true", help="exit 1 when the speedup misses its target")
    parser.add_argument("--growth", action="store_true", help="tables of growth instead, at paper size")
    parser.add_argument("--worker", choices=["check", *PROCEDURES], help=argparse.SUPPRESS)
    parser.add_argument("--grow", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    clouds, rounds = ROUNDS[device_name()].get(options.size, ROUNDS["cpu"][options.size])
    options.clouds, options.rounds = options.clouds or clouds, options.rounds or rounds
    if options.worker:
        work(options)
        return
    if options.grow:
        print(json.dumps(grow(options.grow[0], int(options.grow[1]))))
        return
    told = environment(Recipe())
    result = growth() if options.growth else compare(options)
    print(json.dumps({**result, **{name: told[name] for name in ("device", "threads", "versions")}}))
    if options.check and result.get("speedup", 0) < TARGETS[device_name()]:
        raise SystemExit(f"the target is missed: {result.get('speedup')} of {TARGETS[device_name()]:g}")


if __name__ == "__main__":
    main()
