"""Learning without labels: what different sensors say of the same moment belongs together.

Each stream's token is projected to a common space; in it the token of a moment must find the other stream's token of
the same moment among those of many other moments (InfoNCE: van den Oord et al., 2018; between modalities as in CLIP,
Radford et al., 2021). Encoders that can do that know what a moment is about, whatever the sensor, before the first
label. The projections are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

APART = 3
"""Steps that lie nearer to each other are too much alike to be told apart, and so count neither way."""
MOMENTS = 1024
"""At most so many moments of a batch are compared with each other; more cost with their square."""


class Contrasted(NamedTuple):
    """``loss``; ``found``: how often the right moment was the most similar one, 0 to 1; ``pairs``: moments that two
    streams have both, summed over the pairs of streams. Without any the loss is 0."""

    loss: Tensor
    found: float
    pairs: int


class Contrast(nn.Module):
    """The projections, and the loss of chunks of tokens [B, L, token] of which ``present`` [B, L] are there. No chunk
    may hold a moment of another one."""

    def __init__(self, tokens: Mapping[str, int], width: int = 64, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(n, width), nn.ReLU(), nn.Linear(width, width)) for name, n in tokens.items()}
        )

    def forward(
        self, tokens: Mapping[str, Tensor], present: Mapping[str, Tensor], generator: torch.Generator
    ) -> Contrasted:
        first = next(iter(present.values()))
        chosen = _some(present, generator)
        where = {name: functional.normalize(self.project[name](tokens[name].flatten(0, 1)[chosen]), dim=1)
                 for name in self.project}  # fmt: skip
        there = {name: present[name].flatten()[chosen] > 0 for name in self.project}
        near = _near(chosen, first.shape[1])
        losses, right, pairs = [], 0, 0
        for one, other in combinations(self.project, 2):
            both = there[one] & there[other]
            if int(both.sum()) < 2:
                continue
            alike = where[one][both] @ where[other][both].T / self.temperature
            alike = alike.masked_fill(near[both][:, both], -1e4)
            truth = torch.arange(len(alike), device=alike.device)
            losses += [functional.cross_entropy(alike, truth), functional.cross_entropy(alike.T, truth)]
            right += int((alike.argmax(1) == truth).sum())
            pairs += len(alike)
        loss = torch.stack(losses).mean() if losses else sum(w.sum() for w in where.values()) * 0
        return Contrasted(torch.as_tensor(loss), right / max(pairs, 1), pairs)


def _some(present: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
    """Moments that at least two streams have, as indices into [B * L]: all of them, or some at random."""
    shared = torch.stack([p.flatten() > 0 for p in present.values()]).sum(0) >= 2
    moments = torch.nonzero(shared)[:, 0]
    if len(moments) > MOMENTS:
        order = torch.randperm(len(moments), generator=generator, device=generator.device)[:MOMENTS]
        moments = moments[order.to(moments.device).sort().values]
    return moments


def _near(chosen: Tensor, length: int) -> Tensor:
    """[n, n]: other moments of the same chunk, nearer than ``APART`` steps."""
    chunk, step = chosen // length, chosen % length
    same = chunk[:, None] == chunk[None]
    apart = (step[:, None] - step[None]).abs()
    return same & (apart > 0) & (apart < APART)
