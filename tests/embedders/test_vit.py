"""The vision transformer, against formulas written out slowly, and against itself on other ways."""

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from embedders import vit
from embedders.vit import VARIANTS, Block, Features, VisionTransformer, ViTConfig, attend, explicit_attention

TEST = VARIANTS["test"]
CONFIGS = {
    "plain": TEST,
    "swiglu": replace(TEST, ffn="swiglu"),
    "registers": replace(TEST, registers=4, depth=3, patch_size=8, image_size=24),
    "swiglu_registers": replace(TEST, dim=48, heads=3, registers=2, ffn="swiglu", mlp_ratio=2.5),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def random_model(config: ViTConfig, seed: int = 0, drop_path: float = 0.0) -> VisionTransformer:
    """Weights far from their initial values, so that every one of them counts."""
    model = VisionTransformer(config, drop_path)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            noise = torch.randn(value.shape, generator=draw)
            if value.ndim == 1:
                value.copy_(0.6 + 0.3 * noise)
            else:
                value.copy_(0.5 * noise if value.shape[0] == 1 else noise / math.sqrt(value[0].numel()))
    return model.eval()


def images(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_mask(count: int, patches: int, seed: int = 0) -> Tensor:
    return torch.rand(count, patches, generator=torch.Generator().manual_seed(seed)) < 0.4


def assert_same(a: Features, b: Features, tolerance: float = 1e-5) -> None:
    for part, other in zip(a, b, strict=True):
        torch.testing.assert_close(part, other, rtol=tolerance, atol=tolerance)


def slow_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    out = np.empty_like(x)
    for row in range(len(x)):
        out[row] = (x[row] - x[row].mean()) / np.sqrt(x[row].var() + 1e-6) * weight + bias
    return out


def slow_attention(x: np.ndarray, w: dict[str, np.ndarray], block: str, heads: int) -> np.ndarray:
    """Section 3.2 of arXiv 1706.03762, token by token."""
    tokens, dim = x.shape
    size = dim // heads
    weight, bias = w[f"{block}.attn.qkv.weight"], w[f"{block}.attn.qkv.bias"]
    q, k, v = (x @ weight[part * dim : (part + 1) * dim].T + bias[part * dim : (part + 1) * dim] for part in range(3))
    out = np.zeros((tokens, dim))
    for head in range(heads):
        at = slice(head * size, (head + 1) * size)
        for token in range(tokens):
            scores = np.exp([q[token, at] @ k[other, at] / math.sqrt(size) for other in range(tokens)])
            out[token, at] = sum(scores[other] / scores.sum() * v[other, at] for other in range(tokens))
    return out @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"]


def slow_ffn(x: np.ndarray, w: dict[str, np.ndarray], block: str) -> np.ndarray:
    def linear(y: np.ndarray, name: str) -> np.ndarray:
        return y @ w[f"{block}.mlp.{name}.weight"].T + w[f"{block}.mlp.{name}.bias"]

    if f"{block}.mlp.w12.weight" in w:
        both = linear(x, "w12")
        hidden = both.shape[1] // 2
        gate, value = both[:, :hidden], both[:, hidden:]
        return linear(gate / (1 + np.exp(-gate)) * value, "w3")
    hidden = linear(x, "fc1")
    return linear(hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2))), "fc2")


def slow_forward(w: dict[str, np.ndarray], config: ViTConfig, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """All tokens of one native image [3, H, W], in float64."""
    size, tokens = config.patch_size, [w["cls_token"][0, 0] + w["pos_embed"][0, 0]]
    tokens += list(w["register_tokens"][0]) if config.registers else []
    for row in range(config.grid):
        for column in range(config.grid):
            patch = image[:, row * size : (row + 1) * size, column * size : (column + 1) * size]
            number = row * config.grid + column
            token = [(kernel * patch).sum() for kernel in w["patch_embed.proj.weight"]] + w["patch_embed.proj.bias"]
            tokens.append((w["mask_token"][0] if mask[number] else token) + w["pos_embed"][0, 1 + number])
    x = np.stack(tokens)
    for block in (f"blocks.{index}" for index in range(config.depth)):
        normed = slow_norm(x, w[f"{block}.norm1.weight"], w[f"{block}.norm1.bias"])
        x = x + w[f"{block}.ls1.gamma"] * slow_attention(normed, w, block, config.heads)
        normed = slow_norm(x, w[f"{block}.norm2.weight"], w[f"{block}.norm2.bias"])
        x = x + w[f"{block}.ls2.gamma"] * slow_ffn(normed, w, block)
    return slow_norm(x, w["norm.weight"], w["norm.bias"])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_is_the_formulas(name: str, seed: int) -> None:
    config = CONFIGS[name]
    model = random_model(config, seed)
    pixels = images(2, config.image_size, config.image_size, seed)
    mask = random_mask(2, config.grid**2, seed)
    found = model(pixels, mask)
    assert (found.cls.shape, found.registers.shape, found.patches.shape) == (
        (2, config.dim),
        (2, config.registers, config.dim),
        (2, config.grid**2, config.dim),
    )
    weights = {key: value.double().numpy() for key, value in model.state_dict().items()}
    for number in range(2):
        expected = slow_forward(weights, config, pixels[number].double().numpy(), mask[number].numpy())
        tokens = torch.cat([found.cls[number, None], found.registers[number], found.patches[number]])
        np.testing.assert_allclose(tokens.detach().numpy(), expected, atol=2e-5)


@pytest.mark.parametrize(("images_", "heads", "tokens", "size"), [(3, 2, 17, 16), (1, 5, 60, 8), (2, 1, 1, 64)])
def test_explicit_attention_is_the_fused_one(images_: int, heads: int, tokens: int, size: int) -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [(2 * torch.randn(images_, heads, tokens, size, generator=draw)).requires_grad_() for _ in range(3)]
    weight = torch.randn(images_, heads, tokens, size, generator=draw)
    results = []
    for function in (explicit_attention, F.scaled_dot_product_attention):
        out = function(*parts)
        results.append([out, *torch.autograd.grad((out * weight).sum(), parts)])
    for mine, fused in zip(*results, strict=True):
        torch.testing.assert_close(mine, fused, rtol=1e-5, atol=1e-5)
    half = [part.detach().bfloat16() for part in parts]
    mine, fused = explicit_attention(*half), F.scaled_dot_product_attention(*half)
    assert mine.dtype == fused.dtype == torch.bfloat16
    assert (mine.float() - fused.float()).norm() < 0.02 * fused.float().norm()


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(vit.EXPLICIT_UP_TO[dtype] + more, dtype) for dtype in vit.EXPLICIT_UP_TO for more in (0, 1)]
    + [(1, torch.float64)],
)
def test_attention_is_explicit_up_to_the_measured_length(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vit, "explicit_attention", lambda q, k, v: "explicit")
    found = attend(*torch.zeros(3, 1, 1, tokens, 4, dtype=dtype))
    assert (found == "explicit") == (tokens <= vit.EXPLICIT_UP_TO.get(dtype, 0))
    assert not vit.explicit_is_faster("cuda", dtype, tokens)


CROPS = [(3, 56, 56), (2, 28, 42), (5, 28, 28), (1, 70, 14)]


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_crops_are_separate_forwards_and_gradients(name: str) -> None:
    config = replace(CONFIGS[name], patch_size=14, image_size=56)
    model = random_model(config).train()  # without drop-path
    crops = [images(*crop, seed=number) for number, crop in enumerate(CROPS)]
    masks = [
        random_mask(count, height * width // 14**2) if number % 2 else None
        for number, (count, height, width) in enumerate(CROPS)
    ]
    packed = model.packed(crops, masks)
    separate = [model(crop, mask) for crop, mask in zip(crops, masks, strict=True)]
    gradients = []
    for found in (packed, separate):
        for features, (count, height, width) in zip(found, CROPS, strict=True):
            assert features.patches.shape == (count, height * width // 14**2, config.dim)
        parts = torch.cat([part.flatten() for features in found for part in features])
        loss = (parts * torch.linspace(-1, 1, len(parts))).sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for one, other in zip(packed, separate, strict=True):
        assert_same(one, other)
    for (key, _), one, other in zip(model.named_parameters(), *gradients, strict=True):
        assert other.abs().max() > 0, key
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=key)
    for one, other in zip(model.packed(crops), crops, strict=True):
        assert_same(one, model(other))


@pytest.mark.parametrize("name", CONFIGS)
def test_intermediate_layers_are_what_blocks_give(name: str) -> None:
    model = random_model(replace(CONFIGS[name], depth=4, patch_size=14, image_size=56))
    pixels, seen = images(2, 42, 56), []
    hooks = [block.register_forward_hook(lambda _, inputs, out: seen.append(out)) for block in model.blocks]
    last = model(pixels)
    for hook in hooks:
        hook.remove()
    first = 1 + model.config.registers
    for norm in (True, False):
        wanted = [2, 0, -1, -4, 2]
        found = model.intermediate(pixels, wanted, norm)
        assert len(found) == 5
        for features, index in zip(found, wanted, strict=True):
            rows = seen[index].view(2, -1, model.config.dim)
            rows = model.norm(rows) if norm else rows
            assert_same(features, Features(rows[:, 0], rows[:, 1:first], rows[:, first:]), 1e-6)
    assert_same(model.intermediate(pixels, [-1])[0], last, 1e-6)
    with pytest.raises(IndexError):
        model.intermediate(pixels, [4])


def test_images_do_not_see_each_other() -> None:
    for drop_path in (0.0, 0.4):
        model = random_model(TEST, drop_path=drop_path).train()
        crops = [images(6, 28, 28), images(4, 42, 28)]
        changed = [crop.clone() for crop in crops]
        changed[0][2] += 1
        changed[1][3] -= 1
        torch.manual_seed(5)
        before = model.packed(crops)
        torch.manual_seed(5)
        after = model.packed(changed)
        for group, different in ((0, 2), (1, 3)):
            change = (before[group].patches - after[group].patches).abs().amax(dim=(1, 2))
            assert change[different] > 1e-2
            change[different] = 0
            assert change.max() < 1e-6


@pytest.mark.parametrize(
    ("count", "drop_path", "kept"),
    [(10, 0.3, 7), (10, 0.4, 6), (8, 0.1, 7), (3, 0.5, 1), (1, 0.9, 1), (5, 0.99, 1), (64, 0.25, 48)],
)
@pytest.mark.parametrize("attention", [True, False])
def test_stochastic_depth_keeps_a_subset_of_each_group(
    count: int, drop_path: float, kept: int, attention: bool
) -> None:
    """What is kept is weighted by images / kept, what is not stays as it was."""
    block, x, groups = block_and_rows(drop_path, count)
    for seed in range(3):
        torch.manual_seed(seed)
        found = block._on_subset(x, groups, attention) - x
        for (images_, tokens), part, branch in each_group(groups, found, branch_of(block, x, groups, attention)):
            changed = part.abs().amax(dim=(1, 2)) > 0
            size = kept if images_ == count else max(1, int(images_ * (1 - drop_path)))
            assert changed.sum() == size and part.shape[:2] == (images_, tokens)
            torch.testing.assert_close(part[changed], branch[changed] * images_ / size, rtol=1e-4, atol=1e-5)


def block_and_rows(drop_path: float, count: int) -> tuple[Block, Tensor, vit.Groups]:
    block = random_model(TEST, drop_path=drop_path).blocks[0].train()
    assert isinstance(block, Block)
    groups = ((count, 5), (4, 3))
    x = torch.randn(sum(a * b for a, b in groups), TEST.dim, generator=torch.Generator().manual_seed(3))
    return block, x, groups


@torch.no_grad()
def branch_of(block: Block, x: Tensor, groups: vit.Groups, attention: bool) -> Tensor:
    """The residual branch of all images, one by one."""
    out, start = [], 0
    for images_, tokens in groups:
        for _ in range(images_):
            rows, start = x[start : start + tokens], start + tokens
            if attention:
                out.append(block.ls1(block.attn(block.norm1(rows), ((1, tokens),))))
            else:
                out.append(block.ls2(block.mlp(block.norm2(rows))))
    return torch.cat(out)


def each_group(groups: vit.Groups, *tensors: Tensor) -> Iterator[Any]:
    start = 0
    for images_, tokens in groups:
        end = start + images_ * tokens
        yield (images_, tokens), *(tensor[start:end].view(images_, tokens, -1) for tensor in tensors)
        start = end


@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_stochastic_depth_is_the_full_branch_on_average(attention: bool) -> None:
    """An image is kept with p = 4/6 (2/4) and weighted 1/p: over n draws the mean has variance (1/p - 1) / n."""
    block, x, groups = block_and_rows(0.33, 6)
    branch, draws = branch_of(block, x, groups, attention), 1500
    torch.manual_seed(0)
    mean = sum(block._on_subset(x, groups, attention) - x for _ in range(draws)) / draws
    for (images_, _), found, expected in each_group(groups, mean, branch):
        p = int(images_ * (1 - 0.33)) / images_
        factor = (found * expected).sum(dim=(1, 2)) / (expected * expected).sum(dim=(1, 2))
        error = math.sqrt((1 / p - 1) / draws)
        assert (factor - 1).abs().max() < 4 * error, (factor, error)


def test_stochastic_depth_acts_in_training_alone() -> None:
    pixels = images(6, 28, 42)
    plain, dropping = random_model(TEST), random_model(TEST, drop_path=0.4)
    expected = plain(pixels)
    assert_same(dropping(pixels), expected, 0)
    assert_same(plain.train()(pixels), expected, 0)
    torch.manual_seed(0)
    one, two = dropping.train()(pixels), dropping(pixels)
    assert (one.cls - expected.cls).abs().max() > 1e-2 and (one.cls - two.cls).abs().max() > 1e-2


def test_stochastic_depth_of_one_image_is_the_whole_network() -> None:
    """Of one image, one is kept: with its gradients."""
    pixels = images(1, 28, 42)
    results = []
    for drop_path in (0.0, 0.4):
        model = random_model(TEST, drop_path=drop_path).train()
        found = model(pixels)
        loss = (found.patches * torch.linspace(-1, 1, TEST.dim)).sum() + found.cls[:, 3].sum()
        results.append([*found, *torch.autograd.grad(loss, [*model.blocks.parameters(), model.pos_embed])])
    for plain, dropping in zip(*results, strict=True):
        torch.testing.assert_close(plain, dropping, rtol=1e-4, atol=1e-4)


def test_stochastic_depth_drops_both_parts_of_a_block() -> None:
    block, x, groups = block_and_rows(0.95, count=9)
    found = block(x, groups) - x
    (_, nine), (_, four) = each_group(groups, found)
    assert (nine.abs().amax(dim=(1, 2)) > 0).sum() <= 2
    assert (four.abs().amax(dim=(1, 2)) > 0).sum() <= 2


def test_bfloat16_is_near_float32() -> None:
    model, crops = random_model(CONFIGS["registers"]), [images(2, 24, 24), images(3, 16, 24)]
    expected = model.packed(crops)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.packed(crops)
    for one, other in zip(found, expected, strict=True):
        assert 1e-4 < (one.cls.float() - other.cls).abs().max() < 0.2
    halves = model.bfloat16()([*map(torch.Tensor.bfloat16, crops)][1])
    assert halves.cls.dtype == torch.bfloat16 and (halves.cls.float() - expected[1].cls).abs().max() < 0.3


@pytest.mark.parametrize("size", [(57, 56), (56, 57), (13, 14), (14, 27)])
def test_images_must_divide_into_patches(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels do not divide into patches of 14"):
        random_model(TEST)(images(1, *size))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "dim 32 is not a multiple of heads 5"),
        ({"image_size": 13}, "image_size 13 is below patch_size 14"),
        ({"heads": 0}, "not positive"),
        ({"depth": 0}, "not positive"),
        ({"registers": -1}, "not positive"),
    ],
)
def test_networks_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEST, **change)


@pytest.mark.parametrize("variant", ["small", "base", "large", "giant"])
@pytest.mark.parametrize("registers", [0, 4])
def test_parameters_have_the_published_names_and_shapes(variant: str, registers: int) -> None:
    dim, depth, hidden = {
        "small": (384, 12, 1536),
        "base": (768, 12, 3072),
        "large": (1024, 24, 4096),
        "giant": (1536, 40, 4096),
    }[variant]
    expected = {"cls_token": [1, 1, dim], "pos_embed": [1, 1370, dim], "mask_token": [1, dim]}
    expected |= {"register_tokens": [1, 4, dim]} if registers else {}
    expected |= {"patch_embed.proj.weight": [dim, 3, 14, 14], "patch_embed.proj.bias": [dim]}
    expected |= {"norm.weight": [dim], "norm.bias": [dim]}
    linears = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    linears |= (
        {"mlp.w12": (2 * hidden, dim), "mlp.w3": (dim, hidden)}
        if variant == "giant"
        else {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
    )
    for block in (f"blocks.{index}" for index in range(depth)):
        for layer in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            expected[f"{block}.{layer}"] = [dim]
        for layer, (rows, columns) in linears.items():
            expected |= {f"{block}.{layer}.weight": [rows, columns], f"{block}.{layer}.bias": [rows]}
    with torch.device("meta"):
        model = VisionTransformer(replace(VARIANTS[variant], registers=registers))
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert VARIANTS[variant].heads == dim // 64


def test_large_swiglu_has_the_published_width() -> None:
    assert replace(VARIANTS["large"], ffn="swiglu").hidden == 2736


def test_initial_weights_are_as_published() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(replace(TEST, dim=128, registers=4), layer_scale=1e-5)
    for name, value in model.named_parameters():
        if name in ("cls_token", "register_tokens"):
            assert 0 < value.abs().max() < 1e-5, name
        elif name.endswith("gamma"):
            assert (value == 1e-5).all(), name
        elif name == "mask_token" or (name.endswith("bias") and "patch_embed" not in name):
            assert not value.any(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        elif "patch_embed" not in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert value.mean().abs() < 1e-3, name


has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def _no_recompiling() -> Iterator[None]:
    """One compilation a function; a second is an error. What earlier tests compiled does not count."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


@has_compiler
@pytest.mark.usefixtures("_no_recompiling")
@torch.no_grad()
def test_forward_compiles_once() -> None:
    model = random_model(replace(CONFIGS["swiglu_registers"], depth=1))
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):
        pixels = images(2, 42, 28, seed)
        assert_same(compiled(pixels), model(pixels), 1e-4)


@pytest.mark.usefixtures("_no_recompiling")
def test_training_steps_compile_once() -> None:
    """Drop-path, masks that change, weights that change; the same draws as without compilation.

    Both graphs are traced, but run without generated code, whose compilation takes most of a minute.
    """
    eager, other = (random_model(replace(TEST, interpolation="meta"), drop_path=0.4).train() for _ in range(2))
    compiled = torch.compile(other.packed, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in (eager, other)]
    for step in range(3):
        crops, masks = [images(4, 42, 42, step), images(5, 28, 28, step)], [random_mask(4, 9, step), None]
        losses = []
        for packed, optimizer in zip((eager.packed, compiled), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = sum((found.cls**2).mean() + (found.patches[..., :3]).mean() for found in packed(crops, masks))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for (name, one), two in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("ffn", "registers"), [("mlp", 0), ("swiglu", 4)])
def test_class_tokens_alone_are_those_of_the_whole_forward_pass(seed: int, ffn: Any, registers: int) -> None:
    torch.manual_seed(seed)
    config = replace(VARIANTS["test"], depth=1 + seed, ffn=ffn, registers=registers)
    network = VisionTransformer(config, drop_path=0.5, layer_scale=1.0).eval()
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
        images = torch.randn(3, 3, 56, 42 + 14 * seed)
        torch.testing.assert_close(network.class_tokens(images), network(images).cls, atol=2e-5, rtol=1e-5)
