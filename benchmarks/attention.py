"""Which attention is faster where: one fused call, or two products and a softmax. Sets `vit.explicit_is_faster`.

python -m benchmarks.attention
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from benchmarks.measure import machine
from embedders.vit import explicit_attention, explicit_is_faster

HEADS, WIDTH = 6, 64
TOKENS = 16_384
"""Tokens of a batch, so that sequences of every length come to about the same work outside attention."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def milliseconds(attention: Attention, shape: tuple[int, ...], dtype: torch.dtype, device: str, train: bool) -> float:
    """One forward pass, or forward and backward."""
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=train) for _ in range(3)]
    begin = time.perf_counter()
    with torch.set_grad_enabled(train):
        out = attention(*qkv)
    if train:
        torch.autograd.backward(out, torch.ones_like(out))
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def compare(shape: tuple[int, ...], dtype: torch.dtype, device: str, train: bool, repeats: int) -> tuple[float, float]:
    """Medians (fused, explicit), taken in turns after a warm-up."""
    kinds: tuple[Attention, ...] = (F.scaled_dot_product_attention, explicit_attention)
    times: list[list[float]] = [[], []]
    for _ in range(repeats + 1):
        for kind, taken in zip(kinds, times, strict=True):
            taken.append(milliseconds(kind, shape, dtype, device, train))
    fused, explicit = (statistics.median(taken[1:]) for taken in times)
    return fused, explicit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{machine()}, torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    print("precision  pass      tokens  fused ms explicit ms fused/explicit taken")
    for dtype in (torch.float32, torch.bfloat16):
        for train in (False, True):
            for tokens in (17, 37, 65, 197, 257, 577, 1370):
                shape = (max(1, TOKENS // tokens), HEADS, tokens, WIDTH)
                fused, explicit = compare(shape, dtype, device, train, repeats)
                taken = "explicit" if explicit_is_faster(device, dtype, tokens) else "fused"
                name, kind = str(dtype).removeprefix("torch."), "training" if train else "forward"
                ratio = fused / explicit
                print(f"{name:10s} {kind:9s} {tokens:6d} {fused:9.1f} {explicit:11.1f} {ratio:14.2f} {taken}")


if __name__ == "__main__":
    main()
