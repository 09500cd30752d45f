"""The encoder of text: hashed character n-grams, so that no vocabulary has to travel with a bundle and any language,
any misspelling and any length of text gives a token (the bag of n-grams of Bojanowski et al., 2017, without its words).

A prepared step is f4 [buckets]: how often the text has n-grams of each bucket, on a log scale and with length 1. The
first layer's columns are the embeddings, so that its product with the bag is their sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn

from pipeline.learn.blocks import Moments
from pipeline.learn.limits import Positive, Share
from pipeline.learn.stream_encoder import StreamEncoder, spread, uniform

SPACE = 32


class TextSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """N-grams of 1 to ``grams`` bytes (ASCII letters in lower case) in ``buckets``, embedded in ``width`` numbers.
    Augmentation: ``drop``, the greatest share of buckets that are forgotten."""

    grams: Annotated[int, msgspec.Meta(ge=1, le=5)] = 4
    buckets: Annotated[int, msgspec.Meta(ge=64, le=65_536)] = 1024
    width: Positive = 48
    dropout: Share = 0.2
    drop: Share = 0.2


class TextEncoder(StreamEncoder):
    """UTF-8 bytes to a token; a text of no bytes has one, too."""

    usual: Tensor

    def __init__(self, settings: TextSettings, token: int) -> None:
        super().__init__()
        self.token, self.settings, self.shape = token, settings, (settings.buckets,)
        self.embed = nn.Linear(settings.buckets, settings.width)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(settings.dropout), nn.Linear(settings.width, token))
        self.register_buffer("usual", torch.zeros(settings.buckets))

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        letters = x.to(torch.int64)
        letters = torch.where((letters >= 65) & (letters <= 90), letters + 32, letters)
        edge = torch.full((self.settings.grams,), SPACE)
        letters = torch.cat([edge, letters, edge])  # words at the ends count as such, and there is always an n-gram
        bag, code = torch.zeros(self.settings.buckets), torch.zeros_like(letters)
        for n in range(self.settings.grams):
            code = code[: len(code) - 1] * 257 + letters[n:-1] + 1 if n else letters[:-1] + 1
            mixed = (code % 2_147_483_647) * 2_654_435_761 % 4_294_967_296  # Knuth's multiplicative hashing
            bucket = mixed // 65_536 % self.settings.buckets
            bag = bag.scatter_add(0, bucket, torch.ones_like(bucket, dtype=torch.float32))
        bag = bag.log1p()
        return bag / bag.square().sum().sqrt()

    def fit(self, prepared: Iterable[Tensor]) -> None:
        moments = Moments()
        for steps in map(self.flat, prepared):
            moments.add(steps, torch.ones_like(steps[:, :1]))
        if moments.count:
            self.usual.copy_(moments.total / moments.count)

    def forward(self, prepared: Tensor) -> Tensor:
        token: Tensor = self.head(self.embed((prepared - self.usual) * self.settings.buckets**0.5))
        return token

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        share = uniform((*prepared.shape[:2], 1), 0, self.settings.drop, generator, prepared)
        return torch.where(uniform(tuple(prepared.shape), 0, 1, generator, prepared) < share, 0.0, prepared)

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        """N-grams of the text give way to others."""
        much = 1 - torch.exp(-spread(strength, prepared))
        place = torch.randperm(self.settings.buckets, generator=generator, device=generator.device)
        wrong = uniform(tuple(prepared.shape), 0, 1, generator, prepared) < much
        return torch.where(wrong, prepared[..., place.to(prepared.device)], prepared)
