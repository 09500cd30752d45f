"""The steps of a window to a few summaries a stream, at a cost that hardly grows with the window.

The newest steps are looked at one by one, older ones as means of 2, 4, 8 ... steps (``spans``); a convolution over them
sees change, and attention by a few learned queries makes summaries of a fixed number. Layers that every stream has of
its own are computed for all streams at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

HIDDEN = -1e4
"""Added to the scores of what attention must not see."""


def spans(steps: int, fine: int) -> list[tuple[int, int]]:
    """How many parts of which length a window is looked at in, oldest first: ``[(parts, length), ...]``. The newest
    ``fine`` steps are parts of 1; then half as many of 2, of 4, and so on. The oldest part may be shorter.

    >>> spans(10, 12), spans(40, 12)
    ([(10, 1)], [(1, 4), (6, 4), (6, 2), (12, 1)])
    """
    found, left, length, parts = [], steps, 1, fine
    while left > 0:
        whole = min(parts, left // length)
        if whole:
            found.append((whole, length))
        left -= whole * length
        if whole < parts and left:
            found.append((1, left))
            left = 0
        length, parts = length * 2, max(1, fine // 2)
    return found[::-1]


class Condense(nn.Module):
    """Steps [B, S, d] and their mask [B, S] to parts (see ``spans``): the mean of what is not masked [B, P, d], and the
    share that is not [B, P]. Masked steps count as zeros, whatever they hold."""

    def __init__(self, steps: int, fine: int) -> None:
        super().__init__()
        self.spans = spans(steps, fine)
        self.parts = sum(n for n, _ in self.spans)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        there = (mask > 0).to(tokens)
        tokens = torch.where(there[..., None] > 0, tokens, 0.0)
        means, shares, at = [], [], 0
        for parts, length in self.spans:
            here, some = tokens[:, at : at + parts * length], there[:, at : at + parts * length]
            if length > 1:
                count = torch.unflatten(some, 1, (parts, length)).sum(2)
                here = torch.unflatten(here, 1, (parts, length)).sum(2) / count.clamp(min=1)[..., None]
                some = count / length
            means.append(here)
            shares.append(some)
            at += parts * length
        return torch.cat(means, 1), torch.cat(shares, 1)


class Each(nn.Module):
    """A linear layer of its own for each of M streams, all at once: [M, ..., n] to [M, ..., m]."""

    def __init__(self, streams: int, inner: int, outer: int) -> None:
        super().__init__()
        bound = inner**-0.5  # as torch.nn.Linear begins
        self.weight = nn.Parameter(torch.empty(streams, inner, outer).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(streams, 1, outer).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return x @ self.weight + self.bias
        return torch.unflatten(x.flatten(1, 2) @ self.weight + self.bias, 1, (-1, x.shape[2]))


def normed(x: Tensor) -> Tensor:
    """Layer normalisation without weights; the layer that follows has them."""
    return functional.layer_norm(x, (x.shape[-1],))


class Moved(nn.Module):
    """By how much each part [B, P, n] differs from the one before it, which way and how far, in a common ``width``
    [B, P, width]. Differences are scaled to what is usual for their channel: what changes little from step to step is
    lost beside what differs from place to place, and a light that flashes is all in the change. ``known`` [B, P, 1]: 0
    where a part has no content; there, and just after, nothing has changed."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(2 * size, affine=False)
        self.enter = nn.Linear(2 * size, width, bias=False)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        steps = (x[:, 1:] - x[:, :-1]) * (known[:, 1:] * known[:, :-1])
        steps = torch.cat([torch.zeros_like(x[:, :1]), steps], 1)
        both = torch.cat([steps, steps.abs()], 2)
        scaled = torch.unflatten(self.scale(both.flatten(0, 1)), 0, (-1, x.shape[1]))
        found: Tensor = self.enter(scaled)
        return found


class Change(nn.Module):
    """A residual block over time, [M, B, P, width]: each channel is convolved along the parts, then channels mix. Parts
    without content stay zeros."""

    def __init__(self, streams: int, width: int, dropout: float) -> None:
        super().__init__()
        self.width, channels = width, streams * width
        self.along = nn.Conv1d(channels, channels, 5, padding=2, groups=channels)
        self.drop = nn.Dropout(dropout)
        self.mix = Each(streams, width, width)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        inner = self.along((normed(x) * known).permute(1, 0, 3, 2).flatten(1, 2))
        inner = torch.unflatten(inner, 1, (-1, self.width)).permute(1, 0, 3, 2)
        found: Tensor = (x + self.mix(self.drop(functional.relu(inner)))) * known
        return found


class Summary(nn.Module):
    """Parts [M, B, P, width] with their shares [M, B, P] to ``queries`` summaries of each stream, flat [M, B, queries *
    width], by attention with learned queries that know how old each part is."""

    def __init__(self, streams: int, parts: int, width: int, queries: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.when = nn.Parameter(torch.randn(streams, 1, parts, width) * 0.1)
        self.share = nn.Parameter(torch.randn(streams, 1, 1, width) * 0.1)
        self.blocks = nn.ModuleList(Change(streams, width, dropout) for _ in range(blocks))
        self.query = Each(streams, width, queries)
        self.age = nn.Parameter(torch.zeros(streams, 1, parts, queries))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        known = (shares > 0).to(x)[..., None]
        x = (x + self.when + shares[..., None] * self.share) * known
        for block in self.blocks:
            x = block(x, known)
        weights = (self.query(x) + self.age + (1 - known) * HIDDEN).softmax(2) * known
        found: Tensor = (weights.transpose(2, 3) @ x).flatten(2)
        return found


class Perceptron(nn.Module):
    """Two layers for each of M streams, [M, B, n] to [M, B, m]."""

    def __init__(self, streams: int, inner: int, hidden: int, outer: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = Each(streams, inner, hidden), Each(streams, hidden, outer)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.drop(functional.relu(self.first(x))))
        return found
