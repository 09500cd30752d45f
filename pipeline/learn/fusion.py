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
head is and whether the other heads agree, and from how far its summary is from what the others let expect. A stream
that is noisy, late or frozen without anybody having noticed loses its weight.

**Time.** Cost must not grow with the window. The newest steps are looked at one by one, older ones as means of 2, 4, 8
... steps (``spans``): a window of 300 steps has 40 of them. A convolution over them sees change; attention by a few
learned queries (``Summary``) makes summaries of a fixed number, and only these meet across streams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.strict import listed, nearest

HIDDEN = -1e4
"""Added to the scores of what attention must not see."""


class FusionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``width`` of all inner vectors, ``queries``: summaries a stream, ``layers`` and ``heads`` of the attention across
    streams. ``fine``: how many of the newest steps are looked at one by one."""

    width: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 64
    queries: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    layers: Annotated[int, msgspec.Meta(ge=1, le=8)] = 2
    heads: Annotated[int, msgspec.Meta(ge=1, le=16)] = 4
    fine: Annotated[int, msgspec.Meta(ge=1)] = 12
    dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    impute: bool = True


class FusionOut(NamedTuple):
    """``logits`` [B, K]; ``stream_logits``: what each stream says alone [B, K] (the prior where it has nothing);
    ``reliability``: its weight [B], 0 to 2 (0 where it has nothing); ``extra_losses``: scalars to be minimised, too.
    Strategies without heads or weights leave those empty."""

    logits: Tensor
    stream_logits: dict[str, Tensor]
    reliability: dict[str, Tensor]
    extra_losses: dict[str, Tensor]


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


class Change(nn.Module):
    """A residual block over time: each channel is convolved along the parts, then channels mix. Parts without content
    stay zeros."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.along = nn.Conv1d(width, width, 5, padding=2, groups=width)
        self.mix = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        inner = self.along((self.norm(x) * known).transpose(1, 2)).transpose(1, 2)
        found: Tensor = (x + self.mix(inner)) * known
        return found


class Summary(nn.Module):
    """Parts [B, P, width] with their shares [B, P] to ``queries`` summaries, flat [B, queries * width], by attention
    with learned queries that know how old each part is."""

    def __init__(self, width: int, queries: int, parts: int, blocks: int, dropout: float) -> None:
        super().__init__()
        self.when = nn.Parameter(torch.randn(parts, width) * 0.1)
        self.share = nn.Parameter(torch.randn(width) * 0.1)
        self.blocks = nn.ModuleList(Change(width, dropout) for _ in range(blocks))
        self.query = nn.Linear(width, queries)
        self.age = nn.Parameter(torch.zeros(parts, queries))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        known = (shares > 0).to(x)[..., None]
        x = (x + self.when + shares[..., None] * self.share) * known
        for block in self.blocks:
            x = block(x, known)
        scores = self.query(x) + self.age + (1 - known) * HIDDEN
        weights = scores.softmax(1) * known
        found: Tensor = (weights.transpose(1, 2) @ x).flatten(1)
        return found


class Head(nn.Sequential):
    """Summaries to evidence [B, K]."""

    def __init__(self, inner: int, width: int, labels: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(inner), nn.Linear(inner, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, labels)
        )


class Fusion(nn.Module):
    """What all strategies share: which streams there are, and the prior. Inputs: tokens [B, steps, token] and masks
    [B, steps] by stream."""

    log_prior: Tensor

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__()
        self.tokens, self.steps, self.labels, self.settings = dict(tokens), steps, labels, settings
        self.register_buffer("log_prior", torch.full((labels,), -torch.tensor(float(labels)).log().item()))
        self.condense = Condense(steps, settings.fine)
        self.enter = nn.ModuleDict(
            {name: nn.Sequential(nn.LayerNorm(n), nn.Linear(n, settings.width)) for name, n in tokens.items()}
        )

    @torch.no_grad()
    def set_prior(self, counts: Tensor | Sequence[float]) -> None:
        """The prior from how often each label occurs [K]; each is counted once more, so that none is impossible."""
        seen = torch.as_tensor(counts, dtype=torch.float64) + 1
        self.log_prior.copy_((seen / seen.sum()).log())

    def forward(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, K]."""
        return self.train_step(tokens, masks).logits

    def train_step(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOut:
        """Logits, and what else there is to learn from."""
        raise NotImplementedError

    def _parts(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Each stream's parts, in the common width, zeros where there is nothing, and their shares."""
        found = {}
        for name, enter in self.enter.items():
            means, shares = self.condense(tokens[name], masks[name])
            found[name] = (enter(means) * (shares > 0).to(means)[..., None], shares)
        return found


class EarlyFusion(Fusion):
    """Joined before a common network over time."""

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s = settings
        self.there = nn.Linear(len(self.tokens), s.width, bias=False)
        self.joined = nn.Sequential(nn.ReLU(), nn.Dropout(s.dropout), nn.Linear(s.width, s.width))
        self.summary = Summary(s.width, s.queries, self.condense.parts, 2, s.dropout)
        self.head = Head(s.queries * s.width, s.width, labels, s.dropout)

    def train_step(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOut:
        parts = self._parts(tokens, masks)
        shares = torch.stack([share for _, share in parts.values()], 2)
        # A joined vector times a matrix is the sum of its parts' products.
        both = torch.stack([x for x, _ in parts.values()]).sum(0) + self.there(shares)
        some = shares.amax(2)
        evidence = self.head(self.summary(self.joined(both) * (some > 0).to(both)[..., None], some))
        present = (some.amax(1, keepdim=True) > 0).to(evidence)
        return FusionOut(self.log_prior + evidence * present, {}, {}, {})


class Expect(nn.Module):
    """What each stream's summary should be, given those of the others that are there."""

    def __init__(self, names: Sequence[str], size: int, width: int) -> None:
        super().__init__()
        self.read = nn.ModuleDict({name: nn.Linear(size, width) for name in names})
        self.write = nn.ModuleDict({name: _perceptron(width, width, size) for name in names})

    def forward(self, summaries: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        read = {name: layer(summaries[name]) * present[name] for name, layer in self.read.items()}
        total, count = torch.stack(list(read.values())).sum(0), torch.stack(list(present.values())).sum(0)
        others = {name: (total - r) / (count - present[name]).clamp(min=1) for name, r in read.items()}
        return {name: layer(others[name]) for name, layer in self.write.items()}


def _perceptron(inner: int, hidden: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, outer))


class LateFusion(Fusion):
    """A product of experts weighted by reliability; see the module's text."""

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s, size = settings, settings.queries * settings.width
        self.summary = nn.ModuleDict(
            {name: Summary(s.width, s.queries, self.condense.parts, 1, s.dropout) for name in self.tokens}
        )
        self.head = nn.ModuleDict({name: Head(size, s.width, labels, s.dropout) for name in self.tokens})
        self.trust = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(size + 5, 32), nn.ReLU(), nn.Linear(32, 1)) for name in self.tokens}
        )
        for trust in self.trust.values():  # all are trusted to begin with
            nn.init.zeros_(trust[-1].weight)  # type: ignore[index]
            nn.init.zeros_(trust[-1].bias)  # type: ignore[index]
        self.expect = Expect(list(self.tokens), size, s.width) if s.impute and len(self.tokens) > 1 else None

    def train_step(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOut:
        return self._pool(*self._summaries(tokens, masks))[0]

    def _summaries(
        self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """By stream its summary, normalised [B, queries * width], if it has any and the share of its steps [B, 1]."""
        summaries, present, share = {}, {}, {}
        for name, (x, shares) in self._parts(tokens, masks).items():
            share[name] = shares.mean(1, keepdim=True)
            present[name] = (shares.amax(1, keepdim=True) > 0).to(x)
            summary = self.summary[name](x, shares)
            summaries[name] = functional.layer_norm(summary, summary.shape[1:]) * present[name]
        return summaries, present, share

    def _pool(
        self, summaries: dict[str, Tensor], present: dict[str, Tensor], share: dict[str, Tensor]
    ) -> tuple[FusionOut, dict[str, Tensor]]:
        """The product of experts, and what each stream's summary is expected to be."""
        evidence = {name: head(summaries[name]) * present[name] for name, head in self.head.items()}
        belief = {name: (self.log_prior + e).softmax(1) * present[name] for name, e in evidence.items()}
        all_beliefs, all_present = (torch.stack(list(v.values())).sum(0) for v in (belief, present))
        expected = {} if self.expect is None else self.expect(summaries, present)
        reliability, off = {}, {}
        for name, trust in self.trust.items():
            others = all_present - present[name]
            known = (others > 0).to(others)
            agreed = (belief[name] * (all_beliefs - belief[name])).sum(1, keepdim=True) / others.clamp(min=1)
            off[name] = torch.zeros_like(agreed)
            if name in expected:
                off[name] = (expected[name] - summaries[name].detach()).square().mean(1, keepdim=True)
            signs = [share[name], belief[name].amax(1, keepdim=True), agreed, known, off[name].detach() * known]
            weight = trust(torch.cat([summaries[name], *signs], 1)).sigmoid() * 2
            reliability[name] = weight * present[name]
        pooled = torch.stack([evidence[name] * reliability[name] for name in evidence]).sum(0)
        losses = {}
        if expected:
            terms = [(off[n] * present[n] * (all_present > 1)).sum() / present[n].sum().clamp(min=1) for n in expected]
            losses["impute"] = torch.stack(terms).mean()
        alone = {name: self.log_prior + e for name, e in evidence.items()}
        weights = {name: r[:, 0] for name, r in reliability.items()}
        return FusionOut(self.log_prior + pooled, alone, weights, losses), expected


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
        asked = torch.unflatten(self.ask(self.norm1(x)), 2, (3, self.heads, -1))
        query, key, value = (asked[:, :, i].transpose(1, 2) for i in range(3))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5 + hidden
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + self.drop(self.out(mixed))
        found: Tensor = x + self.drop(self.more(self.norm2(x)))
        return found


class HybridFusion(LateFusion):
    """Attention across the streams' summaries, beside the product of experts."""

    def __init__(self, tokens: Mapping[str, int], steps: int, labels: int, settings: FusionSettings) -> None:
        super().__init__(tokens, steps, labels, settings)
        s, streams = settings, len(self.tokens)
        if s.width % s.heads:
            raise ConfigError(f"a fusion `width` of {s.width} is no multiple of its {s.heads} `heads`; make it one.")
        self.which = nn.Parameter(torch.randn(streams, s.queries, s.width) * 0.1)
        self.imputed = nn.Parameter(torch.randn(streams, 1, s.width) * 0.1)
        self.reader = nn.Parameter(torch.randn(1, 1, s.width) * 0.1)
        self.across = nn.ModuleList(Attention(s.width, s.heads, s.dropout) for _ in range(s.layers))
        self.joint = Head(s.width, s.width, labels, s.dropout)

    def train_step(self, tokens: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> FusionOut:
        summaries, present, share = self._summaries(tokens, masks)
        out, expected = self._pool(summaries, present, share)
        some = torch.stack(list(present.values())).amax(0)
        sets, hidden = [], [torch.zeros_like(some)]
        for i, name in enumerate(self.tokens):
            here = present[name][..., None]
            set_ = torch.unflatten(summaries[name], 1, (-1, self.settings.width)) * out.reliability[name][:, None, None]
            if name in expected:
                guess = torch.unflatten(expected[name], 1, (-1, self.settings.width)) + self.imputed[i]
                set_ = here * set_ + (1 - here) * guess
            seen = some if name in expected else present[name]
            sets.append(set_ + self.which[i])
            hidden.append(((1 - seen) * HIDDEN).expand(-1, self.settings.queries))
        x = torch.cat([self.reader.expand(some.shape[0], -1, -1), *sets], 1)
        unseen = torch.cat(hidden, 1)[:, None, None]
        for layer in self.across:
            x = layer(x, unseen)
        return out._replace(logits=out.logits + self.joint(x[:, 0]) * some)


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
