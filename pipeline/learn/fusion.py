"""Fusion models: the tokens of a window in, evidence for each label out, for any subset of streams and steps.

Three strategies, one key apart, on the same data:

======== =====================================================================================================
early    the streams' tokens of each moment are joined before one common network over time
late     a network and a head for every stream; a product of experts, each raised to its reliability
hybrid   late, and attention over summaries of all streams, which sees what only their combination says; a
         missing stream's summary is imputed from the others
======== =====================================================================================================

All of them give ``log prior + evidence``. With everything masked the evidence is exactly 0, so that the model says the
classes' prior. What is masked is replaced by zeros before anything is computed: it cannot change a bit of the result.

**Product of experts.** If streams were independent given the label, log p(y | x) = log p(y) + sum of log p(y | x_m) -
log p(y) (Hinton, 2002; log-linear pooling). They are not, and sensors fail unnoticed. So each stream's evidence has a
weight, its *reliability*, estimated for every window from the data: from the stream's own summary, from how sure its
head is and whether the other heads agree, and from how far its summary is from what the others let expect. A model
that has met broken streams in training (``robust``) gives one that is noisy, late or frozen unnoticed less to say: for
the most part since its head has learnt to be unsure of such content, for the rest by a lower weight. What a stream is
worth on the whole, alone and beside each of the others, can be fitted after the training (``weighing``).

**Time.** Cost must not grow with the window. The newest steps are looked at one by one, older ones as means of 2, 4, 8
... steps (``spans``): a window of 300 steps has 40 of them. A convolution over them sees change; attention by a few
learned queries (``Summary``) makes summaries of a fixed number, and only these meet across streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.learn.limits import Positive, Share
from pipeline.learn.summaries import HIDDEN, Condense, Each, Moved, Perceptron, Summary, normed
from pipeline.strict import listed, nearest


class FusionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``width`` of all inner vectors, ``queries``: summaries a stream, ``layers`` and ``heads`` of the attention across
    streams. ``fine``: how many of the newest steps are looked at one by one. ``head``: what makes evidence of a
    stream's summaries, a ``perceptron`` or one ``linear`` layer, which a few hundred windows teach better. ``change``:
    whether the differences from step to step are looked at beside the steps themselves. ``apart`` (of ``late``): each
    stream learns from its own loss (``stream_loss``) alone, and the loss of all together teaches nothing but how far
    each is to be relied on. Learnt together, a stream gets lazy where another is right already (Wang et al. 2020; Du et
    al. 2023). ``weigh`` (of ``late`` and ``hybrid``): what each stream's word counts is fitted on the sessions held out
    (see ``weighing``, also for what it costs)."""

    width: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 64
    queries: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    layers: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    heads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    fine: Positive = 12
    dropout: Share = 0.1
    head: Literal["perceptron", "linear"] = "perceptron"
    impute: bool = True
    change: bool = False
    apart: bool = False
    weigh: bool = False


class FusionOut(NamedTuple):
    """``logits`` [B, K]; ``stream_logits``: what each stream says alone [B, K] (the prior where it has nothing);
    ``reliability``: its weight [B], 0 to 2 (0 where it has nothing); ``extra_losses``: scalars to be minimised, too.
    Strategies without heads or weights leave those empty."""

    logits: Tensor
    stream_logits: dict[str, Tensor]
    reliability: dict[str, Tensor]
    extra_losses: dict[str, Tensor]


class Found(NamedTuple):
    """Logits [B, K]; and where a strategy has them, for each stream: its evidence [M, B, K], its reliability [M, B, 1],
    whether it is there [M, B, 1], and how far its summary is from what was expected [M, B, 1]."""

    logits: Tensor
    evidence: Tensor | None = None
    reliability: Tensor | None = None
    present: Tensor | None = None
    off: Tensor | None = None


class Fusion(nn.Module):
    """What all strategies share: which streams there are, and the prior. Inputs: tokens [B, steps, token] and masks
    [B, steps] by stream."""

    log_prior: Tensor

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__()
        self.tokens, self.steps, self.labels, self.settings = dict(tokens), steps, labels, settings
        self.register_buffer("log_prior", torch.full((labels,), -math.log(labels)))
        self.condense = Condense(steps, settings.fine)
        self.enter = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, settings.width)) for name, n in tokens.items()}
        )
        moves = settings.change and self.condense.parts > 1
        self.moved = nn.ModuleDict({name: Moved(n, settings.width) for name, n in tokens.items()} if moves else {})

    @torch.no_grad()
    def set_prior(self, counts: Tensor | Sequence[float]) -> None:
        """The prior from how often each label occurs [K]; each is counted once more, so that none is impossible."""
        seen = torch.as_tensor(counts, dtype=torch.float64) + 1
        self.log_prior.copy_((seen / seen.sum()).log())

    def forward(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, K]."""
        return self.found(tokens, masks).logits

    def found(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Found:
        """Logits, and what they were made of."""
        return self.fused(*self._parts(tokens, masks))

    def train_step(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOut:
        """Logits, and what else there is to learn from."""
        x, shares = self._parts(tokens, masks)
        found, names = self.fused(x, shares), list(self.tokens)
        alone: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        losses: dict[str, Tensor] = {}
        if found.evidence is not None and found.reliability is not None:
            alone = dict(zip(names, self.log_prior + found.evidence, strict=True))
            weights = dict(zip(names, found.reliability[..., 0], strict=True))
        if found.off is not None:
            there = shares.amax(2) > 0
            counts = there & (there.sum(0) > 1)
            losses["impute"] = (found.off[..., 0] * counts).sum() / counts.sum().clamp(min=1)
        return FusionOut(found.logits, alone, weights, losses)

    def fused(self, x: Tensor, shares: Tensor) -> Found:
        """What parts [M, B, P, width] with their shares [M, B, P] say, streams in order."""
        raise NotImplementedError

    def _summary(self, streams: int, blocks: int) -> Summary:
        s, parts = self.settings, self.condense.parts
        blocks = blocks if parts > 1 else 0  # one part shows no change
        return Summary(streams, parts, s.width, s.queries, blocks, s.dropout)

    def _head(self, streams: int) -> Each | Perceptron:
        """From a stream's summaries to evidence."""
        s, size = self.settings, self.settings.queries * self.settings.width
        if s.head == "linear":
            return Each(streams, size, self.labels)
        return Perceptron(streams, size, s.width, self.labels, s.dropout)

    def _parts(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The streams' parts in the common width [M, B, P, width], zeros where there is nothing; shares [M, B, P]."""
        found, shares = [], []
        for name, enter in self.enter.items():
            means, share = self.condense(tokens[name], masks[name])
            x = enter(means)
            if name in self.moved:
                known = (share > 0).to(x)[..., None]
                x = x + self.moved[name](normed(means), known)
            found.append(x)
            shares.append(share)
        share = torch.stack(shares)
        return torch.stack(found) * (share > 0).to(share)[..., None], share


class EarlyFusion(Fusion):
    """Joined before a common network over time."""

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s = settings
        self.there = nn.Linear(len(self.tokens), s.width, bias=False)
        self.joined = nn.Sequential(nn.ReLU(), nn.Dropout(s.dropout), nn.Linear(s.width, s.width))
        self.summary = self._summary(1, blocks=2)
        self.head = self._head(1)

    def fused(self, x: Tensor, shares: Tensor) -> Found:
        # A joined vector times a matrix is the sum of its parts' products.
        joined = self.joined(x.sum(0) + self.there(shares.permute(1, 2, 0)))
        some = shares.amax(0)
        summary = self.summary((joined * (some > 0).to(joined)[..., None])[None], some[None])
        evidence = self.head(normed(summary))[0]
        return Found(self.log_prior + evidence * (some.amax(1, keepdim=True) > 0).to(evidence))


class LateFusion(Fusion):
    """A product of experts weighted by reliability; see the module's text."""

    own: Tensor
    beside: Tensor

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s, m, size = settings, len(self.tokens), settings.queries * settings.width
        self.summary = self._summary(m, blocks=1)
        self.head = self._head(m)
        self.trust = Perceptron(m, size + 5, 32, 1)
        nn.init.zeros_(self.trust.second.weight)  # all are trusted alike to begin with
        nn.init.zeros_(self.trust.second.bias)
        # Not of the state: whoever begins from these weights learns anew what the streams are worth.
        self.register_buffer("own", torch.zeros(m), persistent=False)
        self.register_buffer("beside", torch.zeros(m, m), persistent=False)
        self.read, self.write = None, None
        if s.impute and m > 1:
            self.read, self.write = Each(m, size, s.width), Perceptron(m, s.width, s.width, size)

    @torch.no_grad()
    def take_weights(self, own: Tensor, beside: Tensor) -> None:
        """What each stream's evidence counts from now on, as ``weighing`` states it: logarithms [M], and what the
        presence of each other stream adds to them [M, M], zeros on the diagonal."""
        self.own.copy_(own)
        self.beside.copy_(beside)

    def counts(self, present: Tensor) -> Tensor:
        """The weight of each stream [M, B, 1], given which are ``present`` [M, B, 1]."""
        return (self.own[:, None] + self.beside @ present[..., 0]).exp()[..., None] * present

    def fused(self, x: Tensor, shares: Tensor) -> Found:
        return self._pooled(*self._summaries(x, shares))[0]

    def _summaries(self, x: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By stream the summary, normalised [M, B, queries * width], if it has any, the share of its time [M, B, 1]."""
        present = (shares.amax(2, keepdim=True) > 0).to(x)
        return normed(self.summary(x, shares)) * present, present, shares.mean(2, keepdim=True)

    def _pooled(self, summaries: Tensor, present: Tensor, share: Tensor) -> tuple[Found, Tensor | None]:
        """The product of experts, and what each stream's summary is expected to be given those of the others."""
        heads = evidence = self.head(summaries) * present
        if self.settings.apart and self.training:
            summaries, evidence = summaries.detach(), evidence.detach()
        belief = (self.log_prior + evidence).softmax(2) * present
        others = present.sum(0) - present
        agreed = (belief * (belief.sum(0) - belief)).sum(2, keepdim=True) / others.clamp(min=1)
        known = (others > 0).to(others)
        expected, off = None, None
        if self.read is not None and self.write is not None:
            read = self.read(summaries) * present
            expected = self.write((read.sum(0) - read) / others.clamp(min=1))
            off = (expected - summaries.detach()).square().mean(2, keepdim=True)
        strange = torch.zeros_like(agreed) if off is None else off.detach() * known
        signs = torch.cat([summaries, share, belief.amax(2, keepdim=True), agreed, known, strange], 2)
        reliability = self.trust(signs).sigmoid() * 2 * present
        logits = self.log_prior + (evidence * reliability * self.counts(present)).sum(0)
        return Found(logits, heads, reliability, present, off), expected


class Attention(nn.Module):
    """One layer of self-attention (Vaswani et al., 2017; normalised first) over tokens [B, N, width]; ``hidden`` [B, 1,
    1, N] is added to the scores."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.more = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        asked = torch.unflatten(self.ask(self.norm1(x)), 2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = asked.unbind(0)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + hidden
        x = x + self.drop(self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2)))
        found: Tensor = x + self.drop(self.more(self.norm2(x)))
        return found


class HybridFusion(LateFusion):
    """Attention across the streams' summaries, beside the product of experts. The summary of a stream that is missing
    is the one expected."""

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s, m = settings, len(self.tokens)
        if s.width % s.heads:
            raise ConfigError(f"a fusion `width` of {s.width} is no multiple of its {s.heads} `heads`; make it one.")
        self.which = nn.Parameter(torch.randn(m, 1, s.queries, s.width) * 0.1)
        self.reader = nn.Parameter(torch.randn(1, 1, s.width) * 0.1)
        self.imputed = None if self.read is None else nn.Parameter(torch.randn(m, 1, 1, s.width) * 0.1)
        self.across = nn.ModuleList(Attention(s.width, s.heads, s.dropout) for _ in range(s.layers))
        self.joint = Perceptron(1, s.width, s.width, labels, s.dropout)

    def fused(self, x: Tensor, shares: Tensor) -> Found:
        summaries, present, share = self._summaries(x, shares)
        found, expected = self._pooled(summaries, present, share)
        assert found.reliability is not None
        any_, shape = present.amax(0), (self.settings.queries, self.settings.width)
        sets, seen = torch.unflatten(summaries * found.reliability, 2, shape), present
        if expected is not None and self.imputed is not None:
            here = present[..., None]
            sets = here * sets + (1 - here) * (torch.unflatten(expected, 2, shape) + self.imputed)
            seen = any_.expand_as(present)
        sets = (sets + self.which).transpose(0, 1).flatten(1, 2)
        unseen = ((1 - seen) * HIDDEN).expand(-1, -1, shape[0]).transpose(0, 1).flatten(1)
        x = torch.cat([self.reader.expand(sets.shape[0], -1, -1), sets], 1)
        hidden = torch.cat([torch.zeros_like(any_), unseen], 1)[:, None, None]
        for layer in self.across:
            x = layer(x, hidden)
        joint = self.joint(normed(x[:, 0])[None])[0]
        return found._replace(logits=found.logits + joint * any_)


STRATEGIES: dict[str, type[Fusion]] = {"early": EarlyFusion, "late": LateFusion, "hybrid": HybridFusion}
"""What `strategy` may be."""


def build_fusion(
    strategy: str, tokens: Mapping[str, int], steps: int, labels: int, settings: Mapping[str, Any]
) -> Fusion:
    """The fusion model for streams with tokens of these sizes, windows of ``steps`` and this many labels. Raises
    ConfigError."""
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"`{strategy}` is no fusion strategy.{nearest(strategy, STRATEGIES)} Allowed: {listed(STRATEGIES)}."
        )
    allowed = FusionSettings.__struct_fields__
    for key in settings:
        if key not in allowed:
            raise ConfigError(f"fusion has no setting `{key}`.{nearest(key, allowed)} Allowed: {listed(allowed)}.")
    try:
        given = msgspec.convert(dict(settings), FusionSettings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the settings of the fusion do not fit: {error}.") from None
    return STRATEGIES[strategy](tokens, steps, labels, given)


class WindowGraph(nn.Module):
    """What fusion.onnx holds: the inputs ``inputs`` (each stream's tokens and mask in turn) to ``logits``."""

    def __init__(self, fusion: Fusion) -> None:
        super().__init__()
        self.fusion = fusion
        self.inputs = [name for stream in fusion.tokens for name in (stream, f"mask.{stream}")]

    def forward(self, *given: Tensor) -> Tensor:
        named = dict(zip(self.inputs, given, strict=True))
        streams = self.fusion.tokens
        logits: Tensor = self.fusion({n: named[n] for n in streams}, {n: named[f"mask.{n}"] for n in streams})
        return logits
