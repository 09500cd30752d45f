"""What every learned encoder of a stream is: two halves with a line between them.

``prepare`` takes one step's content exactly as the live runtime feeds it to an ONNX encoder, and gives floats of a
fixed shape. It holds nothing learned, so that a data set computes it once and keeps it. ``forward`` is what is learned:
a batch of prepared steps to tokens. ``StepGraph`` joins the two into what is exported, so that nothing is ever prepared
in two ways.

``augment`` and ``disturb`` are for training only. Both take chunks [B, L, ...] of prepared steps. ``augment`` gives
what could as well have been seen under the same label (another mounting of the sensor, another loudness); one draw
serves all L steps of a chunk. ``disturb`` gives what a bad sensor would have delivered without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn


class StreamEncoder(nn.Module):
    """Encodes a stream's steps into tokens of ``token`` numbers. ``shape`` is that of one prepared step."""

    token: int
    shape: tuple[int, ...]
    known_row: ClassVar[bool] = False
    """Whether the last row of a prepared step [rows, n] says what is known of the others."""

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """One step's content to floats of the shape ``shape``: a frame u1 [H, W, 3] (BGR, any size), a grid f4
        [context + samples, channels] with holes 0 and ``valid`` f4 [context + samples], rows f4 [n, channels] of a
        stream that is not resampled, a sweep f4 [points, 5], or a text u1 [bytes]. n, points and bytes may be 0."""
        raise NotImplementedError

    def fit(self, prepared: Iterable[Tensor]) -> None:
        """Takes the normalisation from training data: prepared steps, single or in batches of any leading shape, which
        may be gone through more than once. Without any, nothing is normalised."""

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        """Other steps [B, L, ...] with the same meaning; unchanged where the encoder knows none."""
        return prepared

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        """The steps [B, L, ...] as a noisy sensor would give them. ``strength`` [B, L] >= 0; 1 is noise about as strong
        as the signal, 0 changes nothing."""
        raise NotImplementedError

    def slid(self, prepared: Tensor, present: Tensor, late: Tensor) -> Tensor:
        """The steps [B, L, ...] as they come from a clock that is wrong by ``late`` [B] steps: each step's content is
        that of another one. What would lie outside of the chunk, or is not ``present`` [B, L], stays as it is."""
        length = prepared.shape[1]
        place = torch.arange(length, device=prepared.device)[None]
        other = (place - late.round().long()[:, None]).clamp(0, length - 1)
        index = torch.where(present.gather(1, other) > 0, other, place)
        return prepared.gather(1, wide(index, prepared).expand_as(prepared))

    def blank(self, prepared: Tensor) -> Tensor:
        """The steps [B, L, ...] of a sensor that is alive and measures nothing (a covered lens, an open input)."""
        return torch.zeros_like(prepared)

    def blend(self, one: Tensor, other: Tensor, part: Tensor) -> Tensor:
        """Steps [B, L, ...] between two: ``one`` but for a ``part`` [B, L] of ``other``. 0 changes nothing; what only
        one of the two knows stays as it is."""
        part, change = spread(part, one), other - one
        if self.known_row:
            part = part * one[:, :, -1:] * other[:, :, -1:]
            change = torch.cat([change[:, :, :-1], torch.zeros_like(change[:, :, -1:])], 2)
        return one + part * change

    def flat(self, prepared: Tensor) -> Tensor:
        """[..., *shape] as [N, *shape]."""
        return prepared.reshape(-1, *self.shape)


class StepGraph(nn.Module):
    """One step's content to its token [token]: what encoder.STREAM.onnx holds. Inputs ``x`` and, for a resampled
    stream, ``valid``."""

    def __init__(self, encoder: StreamEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        token: Tensor = self.encoder(self.encoder.prepare(x, valid)[None])[0]
        return token


def encode_steps(encoder: StreamEncoder, prepared: Tensor, present: Tensor) -> Tensor:
    """Tokens [B, L, token] of prepared steps [B, L, ...] where ``present`` [B, L] is set, zeros elsewhere. Steps that
    are not there reach no layer: they would spoil the statistics of a normalisation by batch."""
    chosen = present.reshape(-1) > 0
    steps = encoder.flat(prepared)[chosen]
    tokens = prepared.new_zeros(chosen.numel(), encoder.token)
    if len(steps):
        if encoder.training and len(steps) == 1:  # no statistics from one step: it is seen twice
            steps = steps.expand(2, *encoder.shape)
            tokens[chosen] = encoder(steps)[:1]
        else:
            tokens[chosen] = encoder(steps)
    return tokens.reshape(*present.shape, encoder.token)


def uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator, like: Tensor) -> Tensor:
    """Drawn on the generator's device, so that every machine draws the same; then where ``like`` lives."""
    drawn = torch.rand(shape, generator=generator, device=generator.device)
    return (low + (high - low) * drawn).to(like)


def normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    """As ``uniform``, from the normal distribution."""
    return torch.randn(shape, generator=generator, device=generator.device).to(like)


def wide(values: Tensor, like: Tensor) -> Tensor:
    """``values`` [B, L] (or [B]) with dimensions of 1 behind them, as many as ``like`` [B, L, ...] has."""
    return values.reshape(*values.shape, *(1,) * (like.dim() - values.dim()))


def spread(strength: Tensor, like: Tensor) -> Tensor:
    """``strength`` [B, L] with dimensions of 1 behind it, to multiply ``like`` [B, L, ...]."""
    return wide(strength, like).to(like)
