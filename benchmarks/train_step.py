"""Milliseconds and memory of a training step of ViT-S, with and without each thing that is to make it faster.

The plain form is the published recipe without them: a forward pass for each size of crops (with drop-path on a subset
of the images, as ours), fused attention throughout, eager blocks, an optimizer and a moving average that are not fused.
Every variant is a process of its own, with the same weights and batch; they take steps in turn.

python -m benchmarks.train_step [--size small|full] [--precision bfloat16] [--variants plain,ours]
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import trainer.step
from benchmarks.measure import machine
from curation.config import validate
from embedders import vit
from trainer.batch import Batch, Photometric
from trainer.build import make_objective, make_pair, make_schedules
from trainer.config import TrainSettings
from trainer.masks import MaskSettings, block_masks
from trainer.objective import Inputs
from trainer.pair import Network, Outputs, Pair, local_parameters, set_up_blocks
from trainer.step import Precision, Trained, make_optimizer, train_step

FEATURES = ("packed", "attention", "compiled", "fused", "lerp")
"""One pass for all crops; attention by products where that is faster; compiled blocks; AdamW and the average fused."""
WARM_UP = 3

VARIANTS: dict[str, frozenset[str]] = {
    "plain": frozenset(),
    **{f"plain+{name}": frozenset([name]) for name in FEATURES},
    "ours": frozenset(FEATURES),
    "ours-eager": frozenset(FEATURES) - {"compiled"},
    "ours-checkpointing": frozenset([*FEATURES, "checkpointing"]),
    "ours-full-drop-path": frozenset([*FEATURES, "full drop-path"]),
    "plain-full-drop-path": frozenset(["full drop-path"]),
}

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"crops": (28, 14, 2), "batch": 2, "prototypes": 64, "variant": "test"},
    "small": {"crops": (112, 56, 8), "batch": 8, "prototypes": 4096, "variant": "small"},
    "full": {"crops": (224, 98, 8), "batch": 32, "prototypes": 65_536, "variant": "small"},
}


@dataclass(frozen=True)
class Job:
    """What a process measures."""

    features: frozenset[str]
    settings: TrainSettings
    precision: Precision
    device: str
    threads: int


class Separate(Network):
    """Every size of crops in a pass of its own."""

    def forward(self, global_crops: Tensor, local_crops: Tensor | None = None, *args: Any, **kwargs: Any) -> Outputs:
        """As `Network.forward`."""
        out = super().forward(global_crops, None, *args, **kwargs)
        if local_crops is None:
            return out
        local = self.dino_head(self.backbone(local_crops).cls)
        return out._replace(dino=torch.cat([out.dino, local]))


class Multiplied(Pair):
    """A moving average in two passes, parameter by parameter."""

    @torch.no_grad()
    def update(self, momentum: float, ok: Tensor) -> None:
        """As `Pair.update`, whether the step is finite or not."""
        for mean, value in zip(local_parameters(self.ema), local_parameters(self.student), strict=True):
            mean.mul_(momentum).add_(value, alpha=1 - momentum)


class Unfused(torch.optim.AdamW):
    """AdamW as it is by default; it cannot leave out a step."""

    def step(self, closure: Any = None) -> Any:
        """One update."""
        self.found_inf = None
        return super().step(closure)


def full_batch(block: vit.Block, x: Tensor, groups: vit.Groups, attention: bool) -> Tensor:
    """Stochastic depth that computes all branches, and multiplies those of some images by 0."""
    factors = []
    for images, tokens in groups:
        kept = (torch.rand(images, device=x.device) >= block.drop_path).to(x.dtype) / (1 - block.drop_path)
        factors.append(kept.repeat_interleave(tokens))
    return x + block._branch(x, groups, attention) * torch.cat(factors)[:, None]


def build(job: Job) -> Trained:
    """A run of a variant."""
    given, features, device = job.settings, job.features, torch.device(job.device)
    pair, _ = make_pair(given)
    kind = Pair if "lerp" in features else Multiplied
    pair = kind(pair.student, pair.teacher, pair.ema, pair.run)
    for network in pair.networks:
        network.to(device)
        if "packed" not in features:
            network.__class__ = Separate
        set_up_blocks(network.backbone, "compiled" in features, "checkpointing" in features and network is pair.student)
    optimizer = make_optimizer(pair.student, given.optimizer.betas, 0.9, 0.2)
    if "fused" not in features:
        optimizer = Unfused([{**group, "fused": False} for group in optimizer.param_groups], fused=False)
    return Trained(pair, make_objective(given, pair).to(device), optimizer, given.optimizer.clip, job.precision)


def fixed(settings: TrainSettings, device: str) -> tuple[Batch, Inputs]:
    """A batch, and what networks are given of it: noise, for what is in images does not matter to time."""
    draw = torch.Generator().manual_seed(0)
    crops, images = settings.crops, settings.batch_size
    big = torch.randn(2 * images, 3, crops.global_size, crops.global_size, generator=draw)
    little = torch.randn(crops.local_crops * images, 3, crops.local_size, crops.local_size, generator=draw)
    side = crops.global_size // settings.model.patch_size
    masks = block_masks(2 * images, (side, side), MaskSettings(), (0, 0))
    none = Photometric(*[torch.empty(0)] * 8)
    batch = Batch(["image"] * images, big, little, none, none, masks).to(torch.device(device))
    return batch, Inputs(batch.global_crops, batch.local_crops, batch.masks)


def measure(job: Job, pipe: Connection) -> None:
    """A process: sends the loss of the first batch and the operations of a step; then, when asked, the time of one."""
    torch.set_num_threads(job.threads)
    if "attention" not in job.features:
        mock.patch.object(vit, "explicit_is_faster", return_value=False).start()
    if "full drop-path" in job.features:
        mock.patch.object(vit.Block, "_on_subset", full_batch).start()
    run, (batch, inputs) = build(job), fixed(job.settings, job.device)
    mock.patch.object(trainer.step, "augmented", return_value=inputs).start()
    schedules = make_schedules(job.settings, job.settings.batch_size)
    run.pair.student.eval()
    loss, _ = run.objective(run.pair, inputs, 0.05)
    pipe.send(float(loss.detach()))
    run.objective.update(torch.tensor(True, device=job.device))
    run.pair.student.train()
    step = 0
    while pipe.recv():
        begin = time.perf_counter()
        train_step(run, batch, step, schedules.at(step))
        if job.device == "cuda":
            torch.cuda.synchronize()
        pipe.send(((time.perf_counter() - begin) * 1e3, peak_bytes(job.device)))
        step += 1


def peak_bytes(device: str) -> int:
    """The most memory so far, of the GPU or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def operations(job: Job) -> float:
    """Floating-point operations of the products in a step."""
    run, (batch, inputs) = build(job), fixed(job.settings, job.device)
    with mock.patch.object(trainer.step, "augmented", return_value=inputs), FlopCounterMode(display=False) as counted:
        train_step(run, batch, 0, make_schedules(job.settings, 8).at(0))
    return float(counted.get_total_flops())


def product_rate(precision: str, device: str, side: int = 2048) -> float:
    """Floating-point operations a second of a product of square matrices, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def settings_of(size: str, drop_path: float, batch: int | None) -> TrainSettings:
    """The published recipe at a size."""
    given = SIZES[size]
    side, local, count = given["crops"]
    values = {
        "crops": {"global_size": side, "local_size": local, "local_crops": count},
        "model": {"variant": given["variant"], "drop_path": drop_path},
        "heads": {"prototypes": given["prototypes"]},
        "batch_size": batch or given["batch"],
    }
    return validate(TrainSettings, values, size)


def compare(jobs: dict[str, Job], steps: int) -> dict[str, tuple[list[float], int]]:
    """Milliseconds of each step, and the most memory, of each variant; they take turns."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    losses = {}
    for name, job in jobs.items():
        pipes[name], other = context.Pipe()
        context.Process(target=measure, args=(job, other), daemon=True).start()
        losses[name] = pipes[name].recv()
    assert max(losses.values()) - min(losses.values()) < 0.02 * abs(max(losses.values())), losses
    times: dict[str, list[float]] = {name: [] for name in jobs}
    memory = dict.fromkeys(jobs, 0)
    for _ in range(WARM_UP + steps):
        for name, pipe in pipes.items():
            pipe.send(True)
            taken, memory[name] = pipe.recv()
            times[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    return {name: (taken[WARM_UP:], memory[name]) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--drop-path", type=float, default=0.3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma-separated: " + ", ".join(VARIANTS))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(given.threads)
    settings = settings_of(given.size, given.drop_path, given.batch)
    jobs = {
        name: Job(VARIANTS[name], settings, given.precision, device, given.threads)
        for name in given.variants.split(",")
    }
    print(f"{machine()}, torch {torch.__version__}, {device}, {given.threads} threads")
    work = operations(Job(frozenset(), settings, given.precision, device, given.threads))
    rate = product_rate(given.precision, device)
    print(f"{given}\n{work / 1e9:,.0f} GFLOP a step in products; one large product runs at {rate / 1e9:,.0f} GFLOP/s")
    found = compare(jobs, given.steps)
    first = statistics.median(next(iter(found.values()))[0])
    print(
        f"{'variant':24s} {'ms':>8s} {'quartiles':>17s} {'speed':>6s} {'images/s':>9s} {'of rate':>8s} {'peak MiB':>9s}"
    )
    for name, (times, memory) in found.items():
        low, middle, high = statistics.quantiles(times, n=4)
        share = work / (middle / 1e3) / rate
        speed = 1e3 * settings.batch_size / middle
        quartiles = f"{low:.1f}-{high:.1f}"
        print(
            f"{name:24s} {middle:8.1f} {quartiles:>17s} {first / middle:6.2f} {speed:9.1f} {share:8.0%}"
            f" {memory / 2**20:9,.0f}"
        )


if __name__ == "__main__":
    main()
