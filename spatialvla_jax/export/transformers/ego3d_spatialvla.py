"""Geometry: metric depth from ZoeDepth, and Ego3D's encoding of each patch's 3-D points.

Axis letters: B batch, P image tokens, D width.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

SUB_GRID = 2  # 3-D points along each side of a patch
NUM_FREQUENCIES = 8


class Ego3D(nn.Module):
    """Depth f32[B, S, S] in metres and intrinsics f32[B, 3, 3] in pixels → position embedding [B, P, width]."""

    def __init__(self, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        numbers = SUB_GRID**2 * 3 * (1 + 2 * NUM_FREQUENCIES)
        first, last = nn.Linear(numbers, width), nn.Linear(width, width)
        self.position_embedding_head = nn.Sequential(first, nn.LayerNorm(width), nn.ReLU(), last)

    def forward(self, depth: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
        encoding = frequency_encoding(back_project(depth, intrinsics, self.grid))
        return self.position_embedding_head(encoding.to(next(self.parameters()).dtype))


def back_project(depth: torch.Tensor, intrinsics: torch.Tensor, grid: int) -> torch.Tensor:
    """Camera-frame points in metres at the centres of a 2×2 sub-grid in each patch: f32[B, P, 12]."""
    n = grid * SUB_GRID
    step = depth.shape[-1] // n
    cells = F.avg_pool2d(depth.float()[:, None], step)[:, 0]
    centre = torch.arange(n, dtype=torch.float32, device=depth.device) * step + step / 2
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    inverse, singular = torch.linalg.inv_ex(intrinsics.float())
    inverse = inverse.masked_fill(singular[:, None, None] != 0, torch.nan)  # NaN is refused later
    rays = inverse @ torch.stack([u, v, torch.ones_like(u)]).reshape(3, -1)
    points = rays.reshape(-1, 3, n, n) * cells[:, None]
    points = points.reshape(-1, 3, grid, SUB_GRID, grid, SUB_GRID).permute(0, 2, 4, 3, 5, 1)
    return points.reshape(len(depth), grid**2, -1)


def frequency_encoding(points: torch.Tensor) -> torch.Tensor:
    """(p − [0, 0, 2]) / 2; then for each number x: x, sin(2^k x) and cos(2^k x) for k = 0 … 7. f32[B, P, 204]."""
    is_z = torch.arange(points.shape[-1], device=points.device) % 3 == 2
    x = ((points - 2.0 * is_z) / 2)[..., None]
    angle = x * 2.0 ** torch.arange(NUM_FREQUENCIES, device=x.device)
    return torch.cat([x, angle.sin(), angle.cos()], -1).flatten(-2)


def metric_depth(zoe: Any, images: torch.Tensor) -> torch.Tensor:
    """ZoeDepth's depth [B, h, w] for images [B, 3, Z, Z], each from the head that the image itself votes for.

    ZoeDepth sums the vote for indoors or outdoors over a batch and reads it on the CPU. Here both heads run, which is
    cheap compared with the backbone.
    """
    patch, (height, width) = zoe.config.backbone_config.patch_size, images.shape[-2:]
    maps = zoe.backbone.forward_with_filtered_kwargs(images).feature_maps
    blocks, bottleneck = zoe.neck(maps, height // patch, width // patch)
    relative, last = zoe.relative_head(blocks)
    head = zoe.metric_head
    if not hasattr(head, "mlp_classifier"):  # one head
        return head(last, bottleneck, blocks, relative)[0][:, 0]
    heads = [copy.copy(head) for _ in head.bin_configurations]
    for number, one in enumerate(heads):  # all modules are shared except the classifier
        one._modules = {**head._modules, "mlp_classifier": Elected(head.mlp_classifier, number)}
    depths = [one(last, bottleneck, blocks, relative)[0][:, 0] for one in heads]
    votes = heads[0].mlp_classifier.votes.argmax(-1)
    return torch.stack(depths, 1)[torch.arange(len(votes), device=votes.device), votes]


class Elected(nn.Module):
    """Makes head `number` win the vote without waiting for the device, and stores the real votes [B, 2]."""

    def __init__(self, classifier: nn.Module, number: int) -> None:
        super().__init__()
        self.classifier, self.number = classifier, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.votes = self.classifier(x)
        return F.one_hot(torch.tensor([self.number]), 2).float()


def side_by_side(first: Callable[[], Any], second: Callable[[], Any], device: torch.device) -> tuple[Any, Any]:
    """Results of two independent functions; on a GPU the second runs in its own stream."""
    if device.type != "cuda":
        return first(), second()
    current, other = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    other.wait_stream(current)
    with torch.cuda.stream(other):
        b = second()
    a = first()
    current.wait_stream(other)
    return a, b


@contextlib.contextmanager
def constant_position_bias(zoe: Any) -> Iterator[list["Remembered"]]:
    """In this context, BEiT's layers compute their relative position bias only once. It is the same for all images, but
    they index it on the CPU each time. Yields the modules that cache it."""
    layers = [x for x in zoe.modules() if getattr(x, "relative_position_bias", None) is not None] if zoe else []
    made = [Remembered(layer.relative_position_bias) for layer in layers]
    try:
        for layer, remembered in zip(layers, made, strict=True):
            layer.relative_position_bias = remembered
        yield made
    finally:
        for layer, remembered in zip(layers, made, strict=True):
            layer.relative_position_bias = remembered.module


class Remembered(nn.Module):
    """Caches the first output of a module whose output never changes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.value = module, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.value = self.module(*args, **kwargs) if self.value is None else self.value
        return self.value
