"""What each stream's word counts beside those of others: fitted on windows that were held out.

A product of experts trusts its experts, and training teaches it to trust too much. On the windows that were learnt from
a stream with many numbers and little to say (a coarse depth picture, which sees what the skeleton was made of) is right
as often as a good one, so nothing there tells that it will not be elsewhere, nor that two streams err together. Held
out windows tell both. So after the training each stream's evidence gets a weight there,

    log weight = own + sum of beside[other] over the other streams that are there,

beside the reliability that the model estimates for each window: what its word is worth alone, and what is left of it
next to another that says the same. Those with one stream less are fitted along with the rest, all sets counting alike.
This is stacking (Wolpert, 1992; Breiman, 1996) of log-linear experts, with weights for all 2^M - 1 sets of streams
from M * M numbers.

It has a price, so that it is asked for (``fusion: {weigh: true}``): sessions held out show sensors that work, and who
is the best of these counts for more than the others, also when it fails and nobody says so. ``benchmarks/README.md``
has what was measured: a stream that said little and erred with another no longer did harm, and one that had counted for
most did more harm than before where 80 % and more of its samples were lost unnoticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.learn.dataset import Dataset
from pipeline.learn.fusion import LateFusion
from pipeline.learn.model import Model, cut_windows

MOST, LEAST = 4096, 30
"""Windows that weights are fitted on at most, and at least."""
NUMBERS = 1 << 25
"""Of more (256 MiB) in the evidence of all sets fewer windows are taken: nine streams have 55 sets, twenty 231."""
HELD = 1.0
"""Weights are held to 1 as if one session had said so, with a standard deviation of 1 of their logarithms: windows
of one session are alike, so it is sessions that count."""
_FEW = 4
"""Of more streams only the sets of one, two, all but one, and all are looked at."""


class Heard(NamedTuple):
    """What experts say of windows that they have not learnt from, for each of S sets of streams: their evidence, times
    its reliability, f8 [S, M, n, K]; whose counts, f8 [S, M]; which windows have all of a set, and numbers alone, bool
    [S, n]; the rest of the logits, f8 [S, n, K]; the truth [n]; and the number of sessions."""

    evidence: Tensor
    members: Tensor
    whole: Tensor
    rest: Tensor
    truth: Tensor
    sessions: int


@torch.no_grad()
def hear(model: Model, data: Dataset, device: torch.device, size: int = 512) -> Heard | None:
    """What the experts of ``model`` say of every n-th labelled window of ``data``, None where it has none. The weights
    that the model has are left out of it."""
    fusion = model.fusion
    assert isinstance(fusion, LateFusion)
    model.eval()
    names = list(model.encoders)
    members = torch.tensor([[float(name in some) for name in names] for some in _sets(names)], dtype=torch.float64)
    most = max(2 * LEAST, min(MOST, NUMBERS // (members.numel() * len(data.labels))))
    every = max(1, -(-sum(int((one.truth >= 0).sum()) for one in data.sessions) // most))
    evidence, whole, rest, truths, sessions, seen = [], [], [], [], set(), 0
    for batch, session in data.batches(size):
        tokens, masks, truth = cut_windows(model, batch.to(device))
        rows = torch.arange(-seen % every, len(truth), every, device=device)
        seen += len(truth)
        if not len(rows):
            continue
        sessions.add(session)
        tokens, masks = ({name: x[rows] for name, x in given.items()} for given in (tokens, masks))
        found = [_of(fusion, tokens, masks, row) for row in members.tolist()]
        said, more = (torch.stack(part) for part in zip(*found, strict=True))
        there = torch.stack([masks[name].amax(1) for name in names]).double().cpu()
        known = said.isfinite().all(3).all(1) & more.isfinite().all(2)  # one NaN would make all weights NaN
        whole.append(((members @ there) == members.sum(1, keepdim=True)) & known)
        evidence.append(torch.where(known[:, None, :, None], said, 0.0))
        rest.append(torch.where(known[..., None], more, 0.0))
        truths.append(truth[rows].cpu())
    if not truths:
        return None
    return Heard(torch.cat(evidence, 2), members, torch.cat(whole, 1), torch.cat(rest, 1), torch.cat(truths),
                 len(sessions))  # fmt: skip


def _sets(names: Sequence[str]) -> list[frozenset[str]]:
    m = len(names)
    sizes = range(1, m + 1) if m <= _FEW else sorted({1, 2, m - 1, m})
    return [frozenset(some) for size in sizes for some in combinations(names, size)]


def _of(
    fusion: LateFusion, tokens: dict[str, Tensor], masks: dict[str, Tensor], row: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The evidence of each stream [M, n, K] where only those of ``row`` are there, and the rest of the logits."""
    part = dict(zip(tokens, row, strict=True))
    found = fusion.found({n: x * part[n] for n, x in tokens.items()}, {n: x * part[n] for n, x in masks.items()})
    assert found.evidence is not None
    assert found.reliability is not None
    assert found.present is not None
    evidence = (found.evidence * found.reliability).double().cpu()
    return evidence, found.logits.double().cpu() - (evidence * fusion.counts(found.present).double().cpu()).sum(0)


def fit_weights(heard: Sequence[Heard]) -> tuple[Tensor, Tensor]:
    """``own`` [M] and ``beside`` [M, M], zeros on its diagonal, of the least log loss. Several ``heard`` are of models
    that were trained without different sessions."""
    m = heard[0].evidence.shape[1]
    own, beside = (torch.zeros(m, *more, dtype=torch.float64, requires_grad=True) for more in ((), (m,)))
    strength = HELD / sum(one.sessions for one in heard) / 2
    optimiser = torch.optim.LBFGS([own, beside], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        lost = _log_loss(heard, own, off_diagonal(beside))
        lost = lost + strength * (own.square().sum() + off_diagonal(beside).square().sum())
        lost.backward()  # type: ignore[no-untyped-call]
        return lost

    optimiser.step(loss)  # type: ignore[no-untyped-call]
    return own.detach(), off_diagonal(beside).detach()


def off_diagonal(square: Tensor) -> Tensor:
    return square * (1 - torch.eye(len(square), dtype=square.dtype))


def _log_loss(heard: Sequence[Heard], own: Tensor, beside: Tensor) -> Tensor:
    """The mean over sets of streams of their windows' mean."""
    lost, count = [], []
    for one in heard:
        weights = (own + one.members @ beside.T).exp() * one.members
        logits = one.rest + torch.einsum("sm,smnk->snk", weights, one.evidence)
        each = functional.cross_entropy(logits.transpose(1, 2), one.truth.expand(len(logits), -1), reduction="none")
        lost.append((each * one.whole).sum(1))
        count.append(one.whole.sum(1))
    some = torch.stack(count).sum(0)
    return (torch.stack(lost).sum(0) / some.clamp(min=1))[some > 0].mean()


def weigh(model: Model, data: Dataset, device: torch.device) -> bool:
    """Fits the weights of a model's streams on sessions that were held out; False where there is nothing to weigh: a
    strategy without experts, a single stream, too few windows."""
    if not isinstance(model.fusion, LateFusion) or len(model.encoders) < 2:
        return False
    heard = hear(model, data, device)
    if heard is None or len(heard.truth) < LEAST:
        return False
    model.fusion.take_weights(*fit_weights([heard]))
    return True
