"""What the encoders are built of: normalisation from data, and small residual networks over one and two dimensions.

Residual blocks are those of He et al., "Deep residual learning for image recognition" (CVPR 2016): two convolutions
and a short cut, normalised by batch, which costs nothing once exported, since it folds into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

SMALLEST = 1e-4
"""No scale is taken to be less: a channel that stood still in training must not explode when it moves."""

TINY = 1e-6
"""Keeps roots differentiable. (Exporters take additions of less than 1e-8 for additions of nothing.)"""


class Moments:
    """Count, sum and sum of squares of each channel, in float64, batch by batch."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0.0, torch.zeros(()), torch.zeros(())

    @torch.no_grad()
    def add(self, values: Tensor, weight: Tensor) -> None:
        """Values [B, C, ...], each counted with its weight [B, 1, ...] (0 for a hole)."""
        wide = weight.double().expand_as(values[:, :1])
        dims = [d for d in range(values.dim()) if d != 1]
        self.count += float(wide.sum())
        self.total = self.total + (values.double() * wide).sum(dims).cpu()
        self.squares = self.squares + (values.double().square() * wide).sum(dims).cpu()


class Normalise(nn.Module):
    """(x - mean) / scale for every channel, which is dimension 1."""

    mean: Tensor
    scale: Tensor

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        shape = (1, channels, *(1,) * dims)
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def take(self, moments: Moments) -> None:
        """Mean and standard deviation from what was counted; nothing counted leaves everything as it is."""
        if moments.count > 0:
            mean = moments.total / moments.count
            variance = (moments.squares / moments.count - mean.square()).clamp(min=0)
            self.mean.copy_(mean.reshape(self.mean.shape))
            self.scale.copy_(variance.sqrt().clamp(min=SMALLEST).reshape(self.scale.shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Residual(nn.Module):
    """Two convolutions with normalisation beside a short cut; ``stride`` 2 halves every dimension but channels."""

    def __init__(self, dims: int, inner: int, outer: int, kernel: int, stride: int, dropout: float) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        pad = kernel // 2
        self.first = conv(inner, outer, kernel, stride, pad, bias=False)
        self.norm1 = norm(outer)
        self.second = conv(outer, outer, kernel, 1, pad, bias=False)
        self.norm2 = norm(outer)
        self.drop = nn.Dropout(dropout)
        same = inner == outer and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(conv(inner, outer, 1, stride, bias=False), norm(outer))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.drop(functional.relu(self.norm1(self.first(x))))
        return functional.relu(self.norm2(self.second(inner)) + self.short(x))


class ResidualNet(nn.Module):
    """[B, channels, ...] to features [B, widths[-1], ...] that are never negative. One residual block a width; from the
    second on each halves the dimensions where ``halve`` is set. ``stride`` is the stem's."""

    def __init__(
        self,
        dims: int,
        channels: int,
        widths: Sequence[int],
        kernel: int,
        dropout: float,
        *,
        stride: int = 1,
        halve: bool = True,
    ) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        size = max(kernel, 2 * stride - 1)  # no sample between two strides may be skipped
        self.stem = nn.Sequential(
            conv(channels, widths[0], size, stride, size // 2, bias=False), norm(widths[0]), nn.ReLU()
        )
        inner = [widths[0], *widths[:-1]]
        self.blocks = nn.Sequential(
            *(Residual(dims, n, m, kernel, 2 if halve and i else 1, dropout)
              for i, (n, m) in enumerate(zip(inner, widths, strict=True)))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.blocks(self.stem(x))
        return found


def pooled(features: Tensor, valid: Tensor) -> Tensor:
    """Mean and maximum over time of features [B, C, T] >= 0, where ``valid`` [B, 1, T'] counts; its length may be
    greater, as before strides. Zeros where nothing is valid. [B, 2C]"""
    weight = valid if valid.shape[2] == features.shape[2] else shortened(valid, features.shape[2])
    masked = features * weight
    mean = masked.sum(2) / weight.sum(2).clamp(min=SMALLEST)
    return torch.cat([mean, masked.amax(2)], 1)


def shortened(valid: Tensor, length: int) -> Tensor:
    """[..., T] averaged to [..., length], in equal parts."""
    return valid @ averaging(valid.shape[-1], length).to(valid)


def averaging(length: int, parts: int) -> Tensor:
    """The matrix [length, parts] that averages a row of ``length`` in ``parts`` equal parts."""
    edges = torch.arange(length + 1, dtype=torch.float64) * (parts / length)
    cell = torch.arange(parts, dtype=torch.float64)[None]
    return ((edges[1:, None] - cell).clamp(0, 1) - (edges[:-1, None] - cell).clamp(0, 1)).float()


def statistics(values: Tensor, valid: Tensor) -> Tensor:
    """Mean, standard deviation, least and greatest of values [B, C, T] where ``valid`` [B, 1, T] is set; zeros where
    nothing is. [B, 4C]"""
    count = valid.sum(2).clamp(min=1)
    mean = (values * valid).sum(2) / count
    spread = ((values - mean[..., None]).square() * valid).sum(2) / count
    known = (valid.sum(2) > 0).to(values)
    least = torch.where(valid > 0, values, 1e4).amin(2) * known
    most = torch.where(valid > 0, values, -1e4).amax(2) * known
    return torch.cat([mean, (spread + TINY).sqrt(), least, most], 1)
