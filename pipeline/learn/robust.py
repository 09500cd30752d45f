"""What a model must have met in training to stand sensors that fail: some announced, some that nobody noticed.

* ``leave_out``: streams, steps and stretches of steps are masked, so that every subset of the streams is learnt.
* ``distort``: content is noisy, shifted in time, frozen or lost while its mask still says that all is well. A model
  that never met that trusts a broken sensor; one that did learns a reliability.
* ``views``: each window is seen twice in a batch, as it was and with something left out; ``distilled`` draws what is
  said of the poorer one to what is said of the richer (self-distillation between a model and its parts).
* ``disagreement``: each chunk is varied twice, independently, and what is said of the two is drawn together (R-Drop:
  Liang et al., "R-Drop: regularized dropout for neural networks", NeurIPS 2021, with augmentation in dropout's place;
  the divergence is AugMix's: Hendrycks et al., ICLR 2020). A few hundred windows teach more that way.
* ``Balance``: a stream that learns faster than the others leaves them nothing to learn from; its encoder's gradient is
  held back (OGM-GE: Peng et al., "Balanced multimodal learning via on-the-fly gradient modulation", CVPR 2022).

All draws come from the generator given, so that equal seeds give equal trainings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.learn.limits import NotNegative, Probability
from pipeline.learn.stream_encoder import StreamEncoder, uniform, wide


class RobustSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The key ``robust`` of a training file.

    ``augment``: whether encoders vary what they are given. How often a stream of a chunk is hit, unnoticed, by
    ``noise`` (up to ``noise_strength`` times the signal), ``shift`` (up to ``shift_steps`` late or early), ``freeze``
    (the last content again and again) or ``blank`` (content without a signal). Of windows: how often some streams are
    left out (``drop_streams``), each step of a stream (``drop_steps``), or one stretch of it (``outage``).
    ``distil`` weighs the self-distillation, ``agree`` the disagreement of two variations of the same content, beside
    the loss by labels; unless it is 0, all that an encoder does is done twice. ``balance`` is OGM-GE's alpha, 0 for
    none, and ``balance_noise`` how strong its noise is."""

    augment: bool = True
    noise: Probability = 0.1
    noise_strength: NotNegative = 2.0
    shift: Probability = 0.05
    shift_steps: NotNegative = 5.0
    freeze: Probability = 0.05
    blank: Probability = 0.05
    drop_streams: Probability = 0.9
    drop_steps: Probability = 0.05
    outage: Probability = 0.1
    distil: NotNegative = 0.3
    agree: NotNegative = 0.0
    balance: NotNegative = 0.0
    balance_noise: NotNegative = 0.0


# -- what nobody noticed ---------------------------------------------------------------------------------------------


def distort(
    encoders: Mapping[str, StreamEncoder],
    prepared: Mapping[str, Tensor],
    present: Mapping[str, Tensor],
    settings: RobustSettings,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Prepared steps [B, L, ...] as other sensors, and bad ones, might have given them. ``present`` [B, L] stays true:
    what it excludes is neither read nor changed to matter."""
    found = {}
    for name, steps in prepared.items():
        encoder = encoders[name]
        if settings.augment:
            steps = encoder.augment(steps, generator)
        found[name] = _spoiled(encoder, steps, present[name], settings, generator)
    return found


def _spoiled(
    encoder: StreamEncoder, steps: Tensor, present: Tensor, settings: RobustSettings, generator: torch.Generator
) -> Tensor:
    lots, length = steps.shape[:2]
    kinds = torch.rand(lots, generator=generator, device=generator.device).to(steps.device)
    edges = torch.tensor([settings.noise, settings.shift, settings.freeze, settings.blank]).cumsum(0).to(kinds)
    kind = (kinds[:, None] >= edges).sum(1)  # at most one fault a stream and chunk; 4 is none
    when = stretches(lots, length, generator, steps)
    strength = uniform((lots, 1), 0, settings.noise_strength, generator, steps)
    late = uniform((lots,), -settings.shift_steps, settings.shift_steps, generator, steps)
    if (hit := kind == 0).any():
        steps = _where(hit, encoder.disturb(steps, strength * when, generator), steps)
    if (hit := kind == 1).any():
        steps = _where(hit, encoder.slid(steps, present, late), steps)
    if (hit := kind == 2).any():
        steps = _where(hit, frozen(steps, present, when), steps)
    if (hit := kind == 3).any():
        blank = encoder.blank(steps)
        steps = _where(hit, torch.where(wide(when > 0, steps), blank, steps), steps)
    return steps


def _where(hit: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(wide(hit, one), one, other)


def stretches(lots: int, length: int, generator: torch.Generator, like: Tensor) -> Tensor:
    """[lots, length] of 0 and 1: all of half of the rows, and a stretch of at least one step of the others."""
    whole, start, extent = (uniform((lots, 1), 0, 1, generator, like) for _ in range(3))
    first = (start * length).floor()
    last = first + 1 + (extent * (length - first - 1)).round()
    place = torch.arange(length).to(like)[None]
    return ((whole < 0.5) | ((place >= first) & (place < last))).to(like)


def frozen(steps: Tensor, present: Tensor, when: Tensor) -> Tensor:
    """Where ``when`` [B, L] is set, the last present content before it; where there is none, the content itself."""
    place = torch.arange(steps.shape[1], device=steps.device)[None].expand(present.shape)
    good = (present > 0) & (when <= 0)
    last = torch.where(good, place, -1).cummax(1).values
    index = torch.where((when > 0) & (last >= 0), last, place)
    return steps.gather(1, wide(index, steps).expand_as(steps))


# -- what is announced -----------------------------------------------------------------------------------------------


def leave_out(masks: Mapping[str, Tensor], settings: RobustSettings, generator: torch.Generator) -> dict[str, Tensor]:
    """Masks [B, S] of windows with streams, steps and stretches taken out. Of the windows that lose streams each number
    of streams left, one to all but one, is as probable as any other. (Of a window with nothing the prior is said, and
    nothing is to be learnt.)"""
    names = list(masks)
    lots, steps = masks[names[0]].shape
    like = masks[names[0]]
    order = uniform((lots, len(names)), 0, 1, generator, like).argsort(1).argsort(1)
    left = 1 + (uniform((lots, 1), 0, 1, generator, like) * (len(names) - 1)).floor()
    loses = uniform((lots, 1), 0, 1, generator, like) < settings.drop_streams
    kept = (~loses | (order < left)).to(like)
    found = {}
    for i, name in enumerate(names):
        single = uniform((lots, steps), 0, 1, generator, like) >= settings.drop_steps
        out = uniform((lots, 1), 0, 1, generator, like) < settings.outage
        stretch = stretches(lots, steps, generator, like) > 0
        found[name] = masks[name] * kept[:, i : i + 1] * single * ~(out & stretch)
    return found


def views(
    tokens: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    settings: RobustSettings,
    generator: torch.Generator,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every window twice, [2B, S, ...]: first all as they are, then all with something left out."""
    partial = leave_out(masks, settings, generator)
    twice = {name: torch.cat([x, x]) for name, x in tokens.items()}
    return twice, {name: torch.cat([mask, partial[name]]) for name, mask in masks.items()}


def distilled(logits: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """How far what is said of the second half of ``views`` [2B, K] is from what is said of the first, which does not
    move: Kullback-Leibler divergence, mean over the windows in which anything is left."""
    full, partial = logits.chunk(2)
    any_left = torch.stack([mask.chunk(2)[1].amax(1) for mask in masks.values()]).amax(0)
    target = full.detach().log_softmax(1)
    apart = functional.kl_div(partial.log_softmax(1), target, reduction="none", log_target=True).sum(1)
    return (apart * any_left).sum() / any_left.sum().clamp(min=1)


def disagreement(logits: Tensor, there: Tensor) -> Tensor:
    """How far what is said of the first half of the rows [2n, K] is from what is said of the second: twice the
    Jensen-Shannon divergence, from 0 to 2 log 2, mean over the rows of which ``there`` [n] says that there is
    something. Both halves move."""
    one, other = logits.log_softmax(1).chunk(2)
    mean = torch.logaddexp(one, other) - math.log(2)
    apart = sum(functional.kl_div(mean, side, reduction="none", log_target=True).sum(1) for side in (one, other))
    found: Tensor = (apart * there).sum() / there.sum().clamp(min=1)
    return found


# -- balance ---------------------------------------------------------------------------------------------------------


class Balance:
    """On-the-fly gradient modulation. A stream's lead is the mean probability that it gives the truth by itself, over
    that of the other streams; a gradient is multiplied by 1 - tanh(alpha * lead) where the lead is greater than 1.
    ``noise`` times the gradient's own spread is added again, which the authors found to generalise better."""

    def __init__(self, alpha: float, noise: float = 0.0) -> None:
        self.alpha, self.noise = alpha, noise
        self.factors: dict[str, float] = {}

    @torch.no_grad()
    def watch(self, stream_logits: Mapping[str, Tensor], masks: Mapping[str, Tensor], truth: Tensor) -> None:
        """Takes the factors from what each stream says alone [B, K] of windows that it has anything of."""
        given = {}
        for name, logits in stream_logits.items():
            there = masks[name].amax(1) > 0
            if there.any():
                right = logits.softmax(1).gather(1, truth[:, None])[:, 0]
                given[name] = float(right[there].mean())
        self.factors = {}
        for name, own in given.items():
            others = [value for other, value in given.items() if other != name]
            lead = own / max(sum(others) / len(others), 1e-6) if others else 1.0
            factor = 1 - torch.tanh(torch.tensor(self.alpha * lead)) if lead > 1 else torch.tensor(1.0)
            self.factors[name] = float(factor)

    @torch.no_grad()
    def apply(self, encoders: Mapping[str, nn.Module], generator: torch.Generator) -> None:
        """Multiplies the gradients of the encoders; between ``backward`` and the optimiser's step."""
        for name, factor in self.factors.items():
            for parameter in encoders[name].parameters():
                if parameter.grad is None:
                    continue
                parameter.grad *= factor
                if self.noise and parameter.grad.numel() > 1:
                    noise = torch.randn(parameter.grad.shape, generator=generator, device=generator.device)
                    parameter.grad += noise.to(parameter.grad) * (self.noise * parameter.grad.std())
