"""A network and what is known of it, as an `Embedder`. Details and fingerprint come from the same facts."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from embedders.base import CopyThresholds, Runtime
from embedders.preprocessing import Preprocessing
from embedders.torch_model import TorchEmbedder, fingerprint
from embedders.vit import VisionTransformer

ONE_FILE = "weights"


class Picked(nn.Module):
    """A network together with the choice of what in its output is the vector."""

    def __init__(self, network: nn.Module, pick: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.pick = pick

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, dim]."""
        return self.pick(self.network(images))


class ClassTokens(nn.Module):
    """A network of ours as one from images to vectors."""

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, dim]."""
        return self.network.class_tokens(images)


def network_embedder(
    name: str,
    hashes: Mapping[str, str],
    output: str,
    preprocessing: Preprocessing,
    dim: int | None,
    open_network: Callable[[], nn.Module],
    runtime: Runtime,
    copy_thresholds: CopyThresholds | None = None,
    **facts: str,
) -> TorchEmbedder:
    """An embedder whose fingerprint covers all that is said here of its vectors, and no names or places.

    Args:
        name: of the model.
        hashes: SHA-256 of the files that decide the network, by name; a single file is called ONE_FILE, since the name
            it was given decides nothing.
        output: which of the network's outputs is the vector.
        preprocessing, dim, open_network, runtime, copy_thresholds: as for `TorchEmbedder`.
        facts: what else decides vectors.
    """
    return TorchEmbedder(
        name=name,
        fingerprint=fingerprint(preprocessing, output, **hashes, **facts),
        dim=dim,
        copy_thresholds=copy_thresholds,
        preprocessing=preprocessing,
        details={
            "model": name,
            "weights": hashes[ONE_FILE] if set(hashes) == {ONE_FILE} else dict(sorted(hashes.items())),
            "output": output,
            **facts,
            # as JSON gives it back, so that what is read again equals what was written
            "preprocessing": json.loads(json.dumps(asdict(preprocessing))),
        },
        open_network=open_network,
        runtime=runtime,
    )
