"""The model: one encoder a stream, one fusion; and what it says of a data set with any of its streams left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.align import Resample
from pipeline.learn.dataset import Batch, Dataset
from pipeline.learn.encoders import StreamEncoder, build_encoder, encode_steps
from pipeline.learn.fusion import FusionSettings, build_fusion
from pipeline.modelfile import BundleStream

Array = np.ndarray[Any, Any]
EXACT = 8
"""Up to so many streams every subset of them is looked at."""


class Model(nn.Module):
    """Encoders and fusion of windows of ``steps``."""

    def __init__(self, encoders: Mapping[str, StreamEncoder], fusion: nn.Module, steps: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(dict(encoders))
        self.fusion: Any = fusion
        self.steps = steps
        self.frozen: tuple[str, ...] = ()
        """Encoders that learn nothing."""

    def freeze(self, names: Sequence[str]) -> None:
        """From now on these encoders stay as they are."""
        self.frozen = tuple(names)
        for name in names:
            self.encoders[name].requires_grad_(False)

    def train(self, mode: bool = True) -> Model:
        super().train(mode)
        for name in self.frozen:  # nor may their normalisation by batch move
            self.encoders[name].eval()
        return self

    def encoder(self, name: str) -> StreamEncoder:
        found: StreamEncoder = self.encoders[name]  # type: ignore[assignment]
        return found

    def tokens(self, prepared: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens [B, L, token] by stream of prepared steps [B, L, ...], zeros where none is ``present`` [B, L]."""
        return {name: encode_steps(self.encoder(name), x, present[name]) for name, x in prepared.items()}

    def cut(self, values: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
        """Windows [n, S, ...] of [B, L, ...] by stream, those where ``kept`` [B, L - S + 1] is set."""
        return {name: windows(value, self.steps)[kept.reshape(-1)] for name, value in values.items()}


def windows(values: Tensor, steps: int) -> Tensor:
    """[B, L, ...] to [B * (L - steps + 1), steps, ...]: every run of ``steps``, in order."""
    return values.unfold(1, steps, 1).movedim(-1, 2).flatten(0, 1)


def build_encoders(
    streams: Mapping[str, BundleStream], settings: Mapping[str, Mapping[str, Any]]
) -> dict[str, StreamEncoder]:
    """The encoders of a model's streams, their weights drawn from torch's random numbers. Raises ConfigError."""
    return {
        name: build_encoder(
            s.payload, settings.get(name, {}), samples=s.samples, context=s.context, channels=s.channels,
            rate_hz=s.rule.rate_hz if isinstance(s.rule, Resample) else 0.0, token=s.token,
        )
        for name, s in streams.items()
    }  # fmt: skip


def build_model(
    encoders: Mapping[str, StreamEncoder], strategy: str, steps: int, labels: int, settings: FusionSettings
) -> Model:
    """The model on these encoders. Raises ConfigError."""
    tokens = {name: encoder.token for name, encoder in encoders.items()}
    return Model(encoders, build_fusion(strategy, tokens, steps, labels, msgspec.structs.asdict(settings)), steps)


class Said(NamedTuple):
    """What a model says of a data set's labelled windows: logits f8 [n, labels] for each subset of the streams, which
    streams have anything in each window, bool [n] by stream, the truth [n], and the session of each."""

    logits: dict[frozenset[str], Array]
    there: dict[str, Array]
    truth: Array
    session: Array


def subsets_of(streams: Iterable[str]) -> list[frozenset[str]]:
    """Every subset of one stream or more, smallest first; of more than eight streams only each alone, all but each, and
    all."""
    names = list(streams)
    sizes = range(1, len(names) + 1) if len(names) <= EXACT else (1, len(names) - 1, len(names))
    return [frozenset(some) for size in sizes for some in combinations(names, size)]


@torch.no_grad()
def say(model: Model, data: Dataset, subsets: Sequence[frozenset[str]], device: torch.device, size: int = 512) -> Said:
    """What the model says of every labelled window of ``data``, in order, for each of ``subsets``."""
    model.eval()
    logits: dict[frozenset[str], list[Array]] = {subset: [] for subset in subsets}
    there: dict[str, list[Array]] = {name: [] for name in model.encoders}
    truth, sessions = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for batch, session in data.batches(size):
        tokens, masks, own = cut_windows(model, batch.to(device))
        if not len(own):
            continue
        truth.append(own.cpu().numpy())
        sessions.append(np.full(len(own), session))
        for name, mask in masks.items():
            there[name].append(mask.any(1).cpu().numpy())
        for subset in subsets:
            part = {n: (1.0 if n in subset else 0.0) for n in tokens}
            found = model.fusion(
                {n: t * part[n] for n, t in tokens.items()}, {n: m * part[n] for n, m in masks.items()}
            )
            logits[subset].append(found.double().cpu().numpy())
    empty = np.zeros((0, len(data.labels)))
    return Said(
        {subset: np.concatenate([empty, *parts]) for subset, parts in logits.items()},
        {name: np.concatenate([np.zeros(0, bool), *parts]) for name, parts in there.items()},
        np.concatenate(truth), np.concatenate(sessions),
    )  # fmt: skip


def cut_windows(model: Model, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The labelled windows of a batch: tokens [n, S, token] and masks [n, S] by stream, truth [n]."""
    tokens = model.tokens(batch.prepared, batch.present)
    truth = batch.truth[:, model.steps - 1 :]
    kept = truth >= 0
    return model.cut(tokens, kept), model.cut(batch.present, kept), truth[kept]
