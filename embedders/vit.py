"""The vision transformer of DINOv2 (arXiv 2304.07193; with registers, 2309.16588), for embedding and for training.

Parameters carry the names of the published checkpoints (`blocks.0.attn.qkv.weight`, ...), so that those load as they
are; `embedders/checkpoints.py` reads and writes the other layouts. Crops of several sizes go through together: all
tokens lie in one matrix [tokens of all images, D], on which linear layers and norms work, and only attention looks at
each group of equal crops by itself.

Shapes: B images, N patches an image, R registers, T = 1 + R + N tokens an image, D = `dim`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

Interpolation = Literal["meta", "hf", "antialias"]
Groups = tuple[tuple[int, int], ...]
"""(images, tokens an image) of each group of equal crops, in the order of their rows."""

LAYER_NORM_EPS = 1e-6
META_OFFSET = 0.1
EXPLICIT_UP_TO = {torch.float32: 40, torch.bfloat16: 400}
"""Tokens an image up to which two products and a softmax beat the fused call on a CPU; benchmarks/attention.py."""


@dataclass(frozen=True)
class ViTConfig:
    """What a network is, apart from its weights.

    Attributes:
        dim, depth, heads: width of a token, number of blocks, heads of attention.
        patch_size: side of a patch in pixels.
        image_size: side in pixels of the images that `pos_embed` was made for: its grid is image_size // patch_size.
        registers: number of register tokens.
        ffn: feed-forward part of a block, GELU-MLP or SwiGLU.
        mlp_ratio: hidden width of the feed-forward part over `dim`, before SwiGLU's reduction.
        interpolation: how `pos_embed` fits images of another size: "meta" (the published models without registers: by
            a scale factor with an offset of 0.1), "hf" (transformers' version of them: by size), "antialias" (models
            with registers, in both: by size, with antialiasing). All are bicubic and agree at `image_size`.
    """

    dim: int
    depth: int
    heads: int
    patch_size: int = 14
    image_size: int = 518
    registers: int = 0
    ffn: Literal["mlp", "swiglu"] = "mlp"
    mlp_ratio: float = 4.0
    interpolation: Interpolation = "antialias"

    def __post_init__(self) -> None:
        if min(self.dim, self.depth, self.heads, self.patch_size, self.mlp_ratio) <= 0 or self.registers < 0:
            raise ValueError(f"sizes of a network are not positive: {self}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is below patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches along a side of a native image."""
        return self.image_size // self.patch_size

    @property
    def hidden(self) -> int:
        """Width inside the feed-forward part; SwiGLU takes two thirds, rounded up to a multiple of 8."""
        hidden = int(self.dim * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.ffn == "swiglu" else hidden


VARIANTS = {
    "test": ViTConfig(dim=32, depth=2, heads=2, image_size=56),
    "tiny": ViTConfig(dim=192, depth=12, heads=3),
    "small": ViTConfig(dim=384, depth=12, heads=6),
    "base": ViTConfig(dim=768, depth=12, heads=12),
    "large": ViTConfig(dim=1024, depth=24, heads=16),
    "giant": ViTConfig(dim=1536, depth=40, heads=24, ffn="swiglu"),
}
"""Networks by size, with patches of 14 and no registers; `dataclasses.replace` gives the others."""


class Features(NamedTuple):
    """What the network says of images, after the last norm.

    Attributes:
        cls: [B, D].
        registers: [B, R, D].
        patches: [B, N, D], row by row.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, all [B, heads, T, d], in the way that is fastest for the device and dtype."""
    if explicit_is_faster(q.device.type, q.dtype, q.shape[-2]):
        return explicit_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def explicit_is_faster(device: str, dtype: torch.dtype, tokens: int) -> bool:
    """Whether `explicit_attention` beats the fused call, as benchmarks/attention.py measured it."""
    return device == "cpu" and tokens <= EXPLICIT_UP_TO.get(dtype, 0)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by two products and a softmax; holds all scores, B x heads x T x T."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    mixed: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return mixed


class Attention(nn.Module):
    """Multi-head self-attention within each image."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Rows [sum of images x tokens, D] to the same shape."""
        rows = torch.split(self.qkv(x), [images * tokens for images, tokens in groups])
        mixed = [self._mix(part, *group) for part, group in zip(rows, groups, strict=True)]
        out: Tensor = self.proj(mixed[0] if len(mixed) == 1 else torch.cat(mixed))
        return out

    def first(self, x: Tensor, images: int) -> Tensor:
        """What `forward` gives for the first token of each image, [B, D], all images of one size: one query each."""
        dim = x.shape[1]
        weight, bias = self.qkv.weight, self.qkv.bias
        tokens = x.view(images, -1, dim)
        q = F.linear(tokens[:, 0], weight[:dim], bias[:dim]).view(images, 1, self.heads, -1).transpose(1, 2)
        k, v = (
            F.linear(x, weight[dim:], bias[dim:])
            .view(images, -1, 2, self.heads, dim // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        out: Tensor = self.proj(attend(q, k, v).flatten(1))
        return out

    def _mix(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        q, k, v = qkv.view(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return attend(q, k, v).transpose(1, 2).reshape(images * tokens, -1)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """w3(silu(a) * b), with a and b the halves of w12(x) (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(a) * b)
        return out


class LayerScale(nn.Module):
    """A learned factor a channel."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Attention and feed-forward part, each normed before, scaled and added."""

    def __init__(self, config: ViTConfig, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(config.dim, config.heads)
        self.ls1 = LayerScale(config.dim, layer_scale)
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.mlp = (SwiGLU if config.ffn == "swiglu" else Mlp)(config.dim, config.hidden)
        self.ls2 = LayerScale(config.dim, layer_scale)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Rows [sum of images x tokens, D] to the same shape."""
        if self.training and self.drop_path > 0:
            x = self._on_subset(x, groups, attention=True)
            return self._on_subset(x, groups, attention=False)
        x = x + self._branch(x, groups, attention=True)
        return x + self._branch(x, groups, attention=False)

    def first(self, x: Tensor, images: int) -> Tensor:
        """What `forward` gives, in evaluation, for the first token of each image, [B, D], all images of one size."""
        y = x.view(images, -1, x.shape[1])[:, 0] + self.ls1(self.attn.first(self.norm1(x), images))
        out: Tensor = y + self.ls2(self.mlp(self.norm2(y)))
        return out

    def _branch(self, x: Tensor, groups: Groups, attention: bool) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), groups)) if attention else self.ls2(self.mlp(self.norm2(x)))
        return out

    def _on_subset(self, x: Tensor, groups: Groups, attention: bool) -> Tensor:
        """Stochastic depth: the branch of a drawn subset of each group's images, weighted images / subset (section 5).

        Subsets have constant sizes, so that nothing recompiles.
        """
        rows, kept, weights = [], [], []
        start = 0
        for images, tokens in groups:
            keep = max(1, int(images * (1 - self.drop_path)))
            chosen = torch.randperm(images, device=x.device)[:keep]
            rows.append((start + chosen[:, None] * tokens + torch.arange(tokens, device=x.device)).flatten())
            kept.append((keep, tokens))
            weights.append(x.new_full((keep * tokens, 1), images / keep))
            start += images * tokens
        at = torch.cat(rows)
        branch = self._branch(x[at], tuple(kept), attention)
        return x.index_add(0, at, (branch * torch.cat(weights)).to(x.dtype))


class PatchEmbed(nn.Module):
    """Patches of pixels to tokens."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, N, D]."""
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class VisionTransformer(nn.Module):
    """The network. State of training (drop-path) acts only in training mode.

    Args:
        config: what the network is.
        drop_path: rate of stochastic depth, the same in all blocks.
        layer_scale: initial factor of the branches.
    """

    def __init__(self, config: ViTConfig, drop_path: float = 0.0, layer_scale: float = 1e-5) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(Block(config, drop_path, layer_scale) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self._initialize()

    def _initialize(self) -> None:
        """As published: truncated normal 0.02, tokens 1e-6, biases and mask token zero, the convolution as it is."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """Features of images [B, 3, H, W]; H and W multiples of the patch size, else ValueError.

        Args:
            images: normalised pixels.
            mask: bool [B, N], patches that the mask token replaces.
        """
        return self.packed([images], [mask])[0]

    def class_tokens(self, images: Tensor) -> Tensor:
        """`forward(images).cls`, [B, D], in evaluation; the last block does no other token, saving most of it."""
        x, groups = self._embed([images], None)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, groups)
        out: Tensor = self.norm(cast(Block, last).first(x, len(images)))
        return out

    def packed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> list[Features]:
        """`forward` of several groups of images, each of its own B, H and W, in one pass."""
        x, groups = self._embed(crops, masks)
        for block in self.blocks:
            x = block(x, groups)
        return self._features(self.norm(x), groups)

    def intermediate(self, images: Tensor, blocks: Sequence[int], norm: bool = True) -> list[Features]:
        """Features after each of `blocks` (0 first, -1 last), in that order, after the final norm if `norm`."""
        wanted = [range(self.config.depth)[index] for index in blocks]
        x, groups = self._embed([images], None)
        taken: dict[int, Features] = {}
        for index, block in enumerate(self.blocks):
            x = block(x, groups)
            if index in wanted:
                taken[index] = self._features(self.norm(x) if norm else x, groups)[0]
        return [taken[index] for index in wanted]

    def _embed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None] | None) -> tuple[Tensor, Groups]:
        """Tokens of all images [sum of B x T, D] before the first block, and how they are grouped."""
        masks = masks or [None] * len(crops)
        tokens = [self._tokens(images, mask) for images, mask in zip(crops, masks, strict=True)]
        groups = tuple((part.shape[0], part.shape[1]) for part in tokens)
        flat = [part.flatten(0, 1) for part in tokens]
        return flat[0] if len(flat) == 1 else torch.cat(flat), groups

    def _tokens(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D]: the class token, registers (which have no position), then patches or what masks them."""
        size = self.config.patch_size
        if images.shape[2] % size or images.shape[3] % size:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels do not divide into patches of {size}"
            )
        patches = self.patch_embed(images)
        if mask is not None:
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        patches = patches + self.positions(images.shape[2] // size, images.shape[3] // size)
        if self.register_tokens is None:
            return torch.cat([cls, patches], dim=1)
        return torch.cat([cls, self.register_tokens.expand(len(images), -1, -1), patches], dim=1)

    def positions(self, height: int, width: int) -> Tensor:
        """Embeddings of the positions of height x width patches, [1, N, D]."""
        grid, mode = self.config.grid, self.config.interpolation
        native = self.pos_embed[:, 1:]
        if (height, width) == (grid, grid):
            return native
        plane = native.float().reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        if mode == "meta":
            factors = ((height + META_OFFSET) / grid, (width + META_OFFSET) / grid)
            plane = F.interpolate(plane, scale_factor=factors, mode="bicubic")
        else:
            plane = F.interpolate(plane, size=(height, width), mode="bicubic", antialias=mode == "antialias")
        return plane.flatten(2).transpose(1, 2).to(native.dtype)

    def _features(self, x: Tensor, groups: Groups) -> list[Features]:
        first = 1 + self.config.registers
        rows = torch.split(x, [images * tokens for images, tokens in groups])
        parts = [part.view(*group, -1) for part, group in zip(rows, groups, strict=True)]
        return [Features(part[:, 0], part[:, 1:first], part[:, first:]) for part in parts]
