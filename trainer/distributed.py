"""One process or many: who this one is, and how the networks are laid over all of them.

Plain `python` has no process group. `torchrun` says in the environment who is who, and others, such as Ray Train, start
the group themselves. A group always has a CPU backend too, which checkpoints are coordinated over.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from curation.errors import ConfigError
from trainer.pair import Pair
from trainer.step import Precision

Module = TypeVar("Module", bound=nn.Module)
Sharding = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class World:
    """This process among all.

    Attributes:
        rank, size: which of how many it is.
        device: that it works on.
        group: of all ranks over the CPU, apart from the one that gradients go over, so that checkpoints can be written
            meanwhile; None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.group is not None:
            dist.barrier(self.group)


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """This process's place in the world, left again at the end unless someone else had started the group.

    Args:
        device: "cpu", "cuda", or "auto" for the GPU where this machine has one.

    Raises:
        ConfigError: there is no such device.
    """
    chosen = chosen_device(device)
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), chosen, dist.new_group(backend="gloo"))
        else:
            yield World(0, 1, chosen, None)
    finally:
        if started:
            dist.destroy_process_group()


def chosen_device(name: str) -> torch.device:
    """The device "cpu" or "cuda" (this rank's); "auto" is the GPU where this machine has one. Raises ConfigError."""
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {name}: take auto, cpu or cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("device cuda: torch sees no GPU here; take cpu, or install a torch built for CUDA")
    if name == "cpu" or not available:
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def spread(pair: Pair, world: World, sharding: Sharding, precision: Precision) -> None:
    """Lay a pair over all ranks, in place; with one process it stays as it is. The optimizer is made afterwards.

    "ddp": every rank has all parameters. "fsdp" (FSDP2): every rank has a part of them, with their gradients and
    moments; blocks, heads and the rest are gathered when they work, in the precision of the products. The moving
    average is of parts, too. The student is not gathered again for the backward pass, as published.
    """
    if world.group is None:
        return
    if sharding == "ddp":
        on_gpu = world.device.type == "cuda"
        pair.run = DistributedDataParallel(
            pair.student,
            device_ids=[world.device] if on_gpu else None,
            gradient_as_bucket_view=True,
        )
        return
    mesh = init_device_mesh(world.device.type, (world.size,))
    reduced = precision == "bfloat16"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if reduced else MixedPrecisionPolicy()
    for network in pair.networks:
        heads = [part for name, part in network.named_children() if name != "backbone" and list(part.parameters())]
        for part in [*network.backbone.blocks, *heads, network]:
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=network is not pair.student)


def whole(module: nn.Module, make: Callable[[], Module]) -> Module:
    """A plain module with the parameters of one that may be sharded, which all ranks call; in evaluation mode.

    Without sharding both have the same memory; with it, this rank holds all parameters as long as it has the result.

    Args:
        module: whose parameters are taken.
        make: makes a module of the same parts; what it is filled with does not matter.
    """
    with torch.device("meta"):
        plain = make()
    values = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in _named(module)}
    plain.load_state_dict(values, assign=True)
    return plain.requires_grad_(False).eval()


def _named(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, value.detach()) for name, value in module.named_parameters())
