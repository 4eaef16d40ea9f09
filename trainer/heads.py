"""The projection head of the DINO and iBOT losses (arXiv 2304.07193, section 4; the form is arXiv 2104.14294's)."""

import itertools
import math

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

NORM_EPS = 1e-6
"""Least norm to divide by: far below any real vector's, and its inverse far inside float32."""


class Head(nn.Module):
    """MLP with GELU, L2-normalised, then scores against prototypes: n vectors of width `dim` to n x K logits.

    Names and initial values are the published ones: `mlp.{0,2,4}.{weight,bias}` (truncated normal 0.02, zero) and
    `last_layer.{weight_g,weight_v}`.

    Args:
        dim: width of the backbone's tokens.
        prototypes: K.
        hidden: width inside the MLP.
        bottleneck: width of its output.
        layers: linear layers of the MLP, at least 2.
    """

    def __init__(self, dim: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        if min(dim, prototypes, hidden, bottleneck, layers - 1) < 1:
            raise ValueError(f"a head of {layers} layers, widths {dim}, {hidden}, {bottleneck}, {prototypes}")
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            linear = nn.Linear(before, after)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, dim] to logits [n, K], in the precision of the linear layers."""
        y = self.mlp(x).float()
        out: Tensor = self.last_layer(F.normalize(y, dim=-1, eps=NORM_EPS))
        return out


class Prototypes(nn.Module):
    """A linear layer without bias whose row k is weight_g[k] weight_v[k] / |weight_v[k]| (arXiv 1602.07868).

    Both parts are trained, weight_g [K, 1] too, from 1; weight_v [K, width] starts as a linear layer of PyTorch does.
    """

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        bound = 1 / math.sqrt(width)
        self.weight_v = nn.Parameter(torch.empty(prototypes, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [n, width] to [n, K]; the weight is made in the precision of the parameters."""
        weight = self.weight_v * (self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True))
        return F.linear(x.to(weight.dtype), weight)
