"""Distillation: a model that learns what several others say in the mean, and so comes close to all of them together.

A few models of the same kind, trained from other seeds, err on other sessions, and their mean is right more often than
any of them. It costs as many times as much, though. One model can be taught the mean: what it learns from is not labels
but the teachers' probabilities, fused and of each stream alone, with the same streams left out (Hinton, Vinyals and
Dean, 2015). Teachers that have learnt their sessions by heart say nothing there that labels do not; what tells them
apart lies elsewhere. So most chunks are blends of two, whatever their labels, and both sides see the same blend (Beyer
et al., "Knowledge distillation: a good teacher is patient and consistent", CVPR 2022). It takes more epochs than labels
do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.learn.dataset import Batch
from pipeline.learn.fusion import FusionOut
from pipeline.learn.model import Model, cut_windows
from pipeline.learn.stream_encoder import StreamEncoder, uniform

MOST = 0.5
"""The greatest part of the other chunk in a blend."""


class Lesson(NamedTuple):
    """Probabilities [B, K] of the teachers, in the mean: all streams together, and each alone."""

    fused: Tensor
    alone: dict[str, Tensor]


class Teachers:
    """Models that learn nothing more."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = list(models)
        for model in self._models:
            model.eval().requires_grad_(False)
            model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def lesson(self, batch: Batch, masks: Mapping[str, Tensor]) -> Lesson:
        """What they say of the batch's labelled windows, which are seen twice (``robust.views``), with ``masks``."""
        said = []
        for model in self._models:
            tokens, _, _ = cut_windows(model, batch)
            said.append(model.fusion.train_step({name: torch.cat([x, x]) for name, x in tokens.items()}, masks))
        return Lesson(
            torch.stack([out.logits.softmax(1) for out in said]).mean(0),
            {name: torch.stack([out.stream_logits[name].softmax(1) for out in said]).mean(0)
             for name in said[0].stream_logits},
        )  # fmt: skip


def blended(encoders: Mapping[str, StreamEncoder], batch: Batch, share: float, generator: torch.Generator) -> Batch:
    """The batch with a ``share`` of its chunks blended with another one of it: all streams alike, and the other's part
    from nothing to a half. A step that only one of the two has stays as it is; so does a batch of one chunk."""
    first = next(iter(batch.present.values()))
    lots = len(first)
    ahead = 1 + int(uniform((), 0, max(lots - 1, 1), generator, first))  # nobody's other is itself
    other = (torch.arange(lots, device=first.device) + ahead) % lots
    part = uniform((lots, 1), 0, MOST, generator, first)
    part = torch.where(uniform((lots, 1), 0, 1, generator, first) < share, part, 0.0)
    prepared = {
        name: encoders[name].blend(x, x[other], part * batch.present[name] * batch.present[name][other])
        for name, x in batch.prepared.items()
    }
    return batch._replace(prepared=prepared)


def missed(out: FusionOut, lesson: Lesson, masks: Mapping[str, Tensor], stream_loss: float) -> Tensor:
    """How far what is said is from the lesson: Kullback-Leibler divergence, mean over the windows in which anything is
    there; and ``stream_loss`` times the same of each stream by itself, mean over streams."""
    there = {name: mask.amax(1) for name, mask in masks.items()}
    found = _divergence(out.logits, lesson.fused, torch.stack([*there.values()]).amax(0))
    if not lesson.alone or not stream_loss:
        return found
    own = [_divergence(out.stream_logits[name], target, there[name]) for name, target in lesson.alone.items()]
    return found + stream_loss * torch.stack(own).mean()


def _divergence(logits: Tensor, target: Tensor, there: Tensor) -> Tensor:
    apart = functional.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
    found: Tensor = (apart * there).sum() / there.sum().clamp(min=1)
    return found
