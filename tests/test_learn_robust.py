"""What training does to its data: which faults, which windows lose what, what is balanced; learning without labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the package torch is missing: pip install -e '.[learn]'")

from pipeline.learn.encoders import StreamEncoder, build_encoder  # noqa: E402
from pipeline.learn.pretrain import APART, Contrast  # noqa: E402
from pipeline.learn.robust import (  # noqa: E402
    Balance,
    RobustSettings,
    disagreement,
    distilled,
    distort,
    frozen,
    leave_out,
    stretches,
    views,
)

PAYLOADS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "frame": ({"size": 16, "widths": [4], "flip": True}, {}),
    "audio": ({"mels": 8, "widths": [4]}, {"samples": 800, "channels": 1, "rate_hz": 8000}),
    "imu": ({"widths": [8], "warp": 0.2, "turn_deg": 30.0, "scale": 0.1, "jitter": 0.1, "bend": 0.5, "hide": 0.2,
             "thin": 0.3, "style": 0.5}, {"samples": 20, "channels": 6, "rate_hz": 100}),
    "signal": ({"widths": [8], "dims": 3, "turn_deg": 20.0, "warp": 0.1, "parents": [-1, 0, 1], "limbs": 0.1},
               {"samples": 16, "channels": 9, "rate_hz": 30}),
    "sweep": ({"widths": [4], "columns": 16, "rows": 4, "turn_deg": 90.0}, {}),
    "text": ({"buckets": 64, "width": 8}, {}),
}  # fmt: skip
QUIET = RobustSettings(augment=False, noise=0, shift=0, freeze=0, blank=0, drop_streams=0, drop_steps=0, outage=0)


def draws(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def chunk(payload: Any, lots: int = 8, length: int = 6) -> tuple[StreamEncoder, Any, Any]:
    """An encoder with its normalisation, prepared steps of it, and which of them are present."""
    given_settings, stream = PAYLOADS[payload]
    torch.manual_seed(0)
    kw = {"samples": 0, "context": 0, "channels": 0, "rate_hz": 0} | stream
    encoder = build_encoder(payload, given_settings, token=4, **kw)  # type: ignore[arg-type]
    rng = np.random.default_rng(1)

    def step() -> Any:
        match payload:
            case "frame":
                return encoder.prepare(torch.from_numpy(rng.integers(0, 256, (20, 30, 3), np.uint8)))
            case "text":
                return encoder.prepare(torch.from_numpy(rng.integers(97, 120, 12, np.uint8)))
            case "sweep":
                return encoder.prepare(torch.from_numpy(rng.normal(0, 6, (300, 5)).astype(np.float32)))
        rows, channels = stream["samples"], stream["channels"]
        x = torch.from_numpy(rng.normal(0, 0.2, (rows, channels)).astype(np.float32))
        return encoder.prepare(x, torch.ones(rows))

    prepared = torch.stack([step() for _ in range(lots * length)]).reshape(lots, length, *encoder.shape)
    encoder.fit([prepared])
    return encoder, prepared, torch.ones(lots, length)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("fault", ["augment", "noise", "shift", "freeze", "blank"])
def test_every_fault_changes_content_and_depends_on_the_seed_alone(payload: str, fault: str) -> None:
    encoder, prepared, present = chunk(payload)
    only = {fault: True if fault == "augment" else 1.0}
    chosen = RobustSettings(**({f: getattr(QUIET, f) for f in QUIET.__struct_fields__} | only))
    before = prepared.clone()

    def spoil(seed: int) -> Any:
        return distort({"s": encoder}, {"s": prepared}, {"s": present}, chosen, draws(seed))["s"]

    one, same, other = spoil(1), spoil(1), spoil(2)
    assert torch.equal(prepared, before)
    assert one.shape == prepared.shape
    assert torch.isfinite(one).all()
    assert torch.equal(one, same)
    assert not torch.equal(one, prepared)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_without_faults_content_is_what_it_was(payload: str) -> None:
    encoder, prepared, present = chunk(payload)
    found = distort({"s": encoder}, {"s": prepared}, {"s": present}, QUIET, draws())["s"]
    assert torch.equal(found, prepared)
    calm = encoder.disturb(prepared, torch.zeros(8, 6), draws())
    assert torch.allclose(calm, prepared, atol=1e-3 if payload != "audio" else 0.02)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_stronger_noise_is_further_off(payload: str) -> None:
    encoder, prepared, _ = chunk(payload)
    off = [float((encoder.disturb(prepared, torch.full((8, 6), s), draws()) - prepared).abs().mean())
           for s in (0.05, 0.4, 2.0)]  # fmt: skip
    assert off[0] < off[1] < off[2]


def test_another_style_moves_mean_and_spread_and_nothing_else() -> None:
    """By at most half of the way to another row's; a row without anything is neither moved nor moved to."""
    _, prepared, _ = chunk("imu", lots=200, length=3)
    prepared *= torch.linspace(1, 5, 200)[:, None, None, None]
    prepared[:, :, :-1] += torch.linspace(-4, 4, 200)[:, None, None, None]
    prepared[:, :, -1] = 1.0
    prepared[:20] = 0.0
    given_settings = {"widths": [8], "style": 0.5}
    encoder = build_encoder("imu", given_settings, token=4, samples=20, context=0, channels=6, rate_hz=100)
    found = encoder.augment(prepared, draws())
    assert torch.equal(found[:, :, -1], prepared[:, :, -1])
    assert not found[:20].any()

    def of(x: Any) -> tuple[Any, Any]:
        rows = x[20:, :, :-1].transpose(1, 2).flatten(2)
        return rows.mean(2), rows.std(2)

    (mean, spread), (new_mean, new_spread) = of(prepared), of(found)
    moved = (new_mean - mean).abs().amax(1) > 1e-4
    assert 60 < int(moved.sum()) < 120  # half of 180, less those that were moved by nearly nothing
    before = (prepared[20:, :, :-1] - mean[:, None, :, None]) / spread[:, None, :, None]
    after = (found[20:, :, :-1] - new_mean[:, None, :, None]) / new_spread[:, None, :, None]
    assert torch.allclose(before, after, atol=1e-2)
    for new, old in ((new_mean, mean), (new_spread, spread)):
        assert ((new - old).abs() <= (old.max() - old.min()) / 2 + 1e-3).all()
        assert (new >= old.min() - 1e-3).all()
        assert (new <= old.max() + 1e-3).all()


def test_a_shift_brings_what_was_before_or_after() -> None:
    encoder, prepared, present = chunk("imu", lots=3)
    present[:, 2] = 0
    late = encoder.slid(prepared, present, torch.tensor([2.0, -1.0, 0.0]))
    assert torch.equal(late[0, 5], prepared[0, 3])
    assert torch.equal(late[0, 4], prepared[0, 4])  # two steps before it there was nothing
    assert torch.equal(late[1, 0], prepared[1, 1])
    assert torch.equal(late[2], prepared[2])


def test_a_chunk_of_one_step_shifts_within_it() -> None:
    encoder, prepared, present = chunk("imu", lots=2, length=1)
    late = encoder.slid(prepared, present, torch.tensor([2.5, -2.5]))
    assert torch.equal(late[0, 0, :, 5:], prepared[0, 0, :, :-5])
    assert torch.equal(late[1, 0, :, :-5], prepared[1, 0, :, 5:])


def test_a_frozen_stream_repeats_its_last_content() -> None:
    steps = torch.arange(5.0)[None, :, None]
    present = torch.tensor([[1.0, 1, 0, 1, 1]])
    found = frozen(steps, present, torch.tensor([[0.0, 0, 0, 1, 1]]))
    assert found.flatten().tolist() == [0, 1, 2, 1, 1]
    assert torch.equal(frozen(steps, present, torch.ones(1, 5)), steps)


@given(st.integers(1, 20), st.integers(0, 1000))
@settings(deadline=None)
def test_a_stretch_is_one_run_of_at_least_one_step(length: int, seed: int) -> None:
    found = stretches(16, length, draws(seed), torch.zeros(1))
    for row in found.tolist():
        assert sum(row) >= 1
        assert sum(abs(a - b) for a, b in zip([0.0, *row], [*row, 0.0], strict=True)) == 2


def test_every_subset_of_streams_is_met_and_never_none() -> None:
    names = ("a", "b", "c")
    masks = {name: torch.ones(4000, 3) for name in names}
    found = leave_out(masks, RobustSettings(drop_steps=0, outage=0), draws())
    left = torch.stack([found[name].amax(1) for name in names], 1)
    code = (left * torch.tensor([1.0, 2, 4])).sum(1).long().bincount(minlength=8)
    assert code[0] == 0
    assert (code[1:] > 100).all()
    for name in names:
        assert (found[name] <= masks[name]).all()
        assert ((found[name].sum(1) == 0) | (found[name].sum(1) == 3)).all()
    single = leave_out({"a": torch.ones(50, 3)}, RobustSettings(drop_steps=0, outage=0), draws())
    assert (single["a"] == 1).all()


@given(st.integers(0, 500))
@settings(deadline=None, max_examples=25)
def test_nothing_left_out_ever_comes_back(seed: int) -> None:
    masks = {n: (torch.rand(20, 6, generator=draws(seed)) < 0.5).float() for n in ("a", "b")}
    tokens = {n: torch.randn(20, 6, 2, generator=draws(seed)) for n in masks}
    twice, partial = views(tokens, masks, RobustSettings(), draws(seed))
    for name, mask in masks.items():
        assert torch.equal(partial[name][:20], mask)
        assert (partial[name][20:] <= mask).all()
        assert torch.equal(twice[name], torch.cat([tokens[name]] * 2))
        assert ((partial[name] == 0) | (partial[name] == 1)).all()


def test_distillation_moves_the_poorer_view_alone() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.5], [0.3, 0.0]], requires_grad=True)
    masks = {"a": torch.tensor([[1.0], [1.0], [1.0], [0.0]])}
    loss = distilled(logits, masks)
    assert loss.detach() > 0
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[:2] == 0).all()
    assert (logits.grad[2] != 0).all()
    assert (logits.grad[3] == 0).all()  # of nothing nothing can be said
    assert float(distilled(torch.cat([logits[:2]] * 2).detach(), {"a": torch.ones(4, 1)})) == pytest.approx(0, abs=1e-6)


def test_two_variations_that_agree_cost_nothing_and_opposite_ones_most() -> None:
    some = torch.randn(5, 4, generator=draws(), dtype=torch.float64)
    there = torch.ones(5)
    assert float(disagreement(torch.cat([some, some]), there)) == pytest.approx(0, abs=1e-9)
    far = 40 * torch.eye(2, dtype=torch.float64)
    assert float(disagreement(torch.cat([far, far.flip(0)]), there[:2])) == pytest.approx(2 * np.log(2), abs=1e-6)


def test_disagreement_is_the_jensen_shannon_divergence_and_both_sides_move() -> None:
    logits = torch.randn(6, 4, generator=draws(), dtype=torch.float64, requires_grad=True)
    there = torch.tensor([1.0, 0.0, 1.0])
    loss = disagreement(logits, there)
    p, q = logits.detach().softmax(1).numpy()[[0, 2, 3, 5]].reshape(2, 2, 4)
    mean = (p + q) / 2
    expected = ((p * np.log(p / mean)).sum(1) + (q * np.log(q / mean)).sum(1)).mean()
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[[0, 2, 3, 5]].abs().sum(1) > 0).all()
    assert (logits.grad[[1, 4]] == 0).all()  # windows without content say nothing
    assert float(disagreement(logits.detach(), torch.zeros(3))) == 0


def test_the_stream_that_leads_is_held_back() -> None:
    truth = torch.tensor([0, 1])
    sure, unsure = 4 * torch.eye(2), torch.zeros(2, 2)
    balance = Balance(alpha=0.5)
    balance.watch({"fast": sure, "slow": unsure}, {n: torch.ones(2, 3) for n in ("fast", "slow")}, truth)
    assert balance.factors["slow"] == 1
    assert balance.factors["fast"] == pytest.approx(1 - np.tanh(0.5 * 0.982 / 0.5), abs=1e-3)
    encoders = {name: torch.nn.Linear(2, 2) for name in ("fast", "slow")}
    for encoder in encoders.values():
        encoder(torch.ones(1, 2)).sum().backward()
    balance.apply(encoders, draws())
    assert encoders["slow"].weight.grad is not None
    assert (encoders["slow"].weight.grad == 1).all()
    assert encoders["fast"].weight.grad is not None
    assert torch.allclose(encoders["fast"].weight.grad, torch.tensor(balance.factors["fast"]))
    balance.watch({"fast": sure}, {"fast": torch.ones(2, 3)}, truth)
    assert balance.factors == {"fast": 1.0}
    balance.watch({"fast": sure}, {"fast": torch.zeros(2, 3)}, truth)
    assert balance.factors == {}


def test_balance_adds_noise_as_strong_as_the_gradient() -> None:
    layer = torch.nn.Linear(40, 40)
    layer(torch.randn(8, 40, generator=draws())).square().sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    balance = Balance(0.0, noise=0.5)
    balance.factors = {"s": 1.0}
    balance.apply({"s": layer}, draws())
    assert float((layer.weight.grad - before).std() / before.std()) == pytest.approx(0.5, abs=0.05)


# -- pretraining -----------------------------------------------------------------------------------------------------


def moments(lots: int = 8, length: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Two streams that see the same slowly changing thing, each in its own way and with noise of its own; a third one
    that is never there."""
    generator = draws(seed)
    hidden = torch.randn(lots, length, 4, generator=generator).cumsum(1)
    mixes = {name: torch.randn(4, 6, generator=draws(i)) for i, name in enumerate(("a", "b", "c"))}
    tokens = {n: hidden @ mix + 0.1 * torch.randn(lots, length, 6, generator=generator) for n, mix in mixes.items()}
    present = {n: (torch.rand(lots, length, generator=generator) < 0.8).float() for n in tokens}
    present["c"] *= 0
    return tokens, present


def test_what_belongs_together_is_found_after_learning_and_not_before() -> None:
    torch.manual_seed(0)
    contrast = Contrast({"a": 6, "b": 6, "c": 6}, width=16)
    optimiser = torch.optim.Adam(contrast.parameters(), 3e-3)
    fresh = moments(seed=99)
    before = contrast(*fresh, draws())
    for i in range(60):
        said = contrast(*moments(seed=i % 10), draws(i))
        optimiser.zero_grad()
        said.loss.backward()
        optimiser.step()
    after = contrast(*fresh, draws())
    assert after.pairs == before.pairs > 40
    assert after.loss.item() < 0.6 * before.loss.item()
    assert after.found > 0.5 > 0.2 > before.found


def test_without_a_shared_moment_there_is_nothing_to_learn() -> None:
    contrast = Contrast({"a": 6, "b": 6})
    tokens, present = moments()
    tokens, present = ({n: v[n] for n in ("a", "b")} for v in (tokens, present))
    present["b"] = 1 - present["a"]
    said = contrast(tokens, present, draws())
    assert (said.loss.item(), said.pairs) == (0, 0)
    said.loss.backward()


def test_what_is_not_there_has_no_say() -> None:
    torch.manual_seed(0)
    contrast = Contrast({"a": 6, "b": 6, "c": 6})
    tokens, present = moments()
    wild = {n: torch.where(present[n][..., None] > 0, x, 1e3) for n, x in tokens.items()}
    assert contrast(tokens, present, draws()).loss.item() == contrast(wild, present, draws()).loss.item()


def test_neighbours_in_time_are_not_told_apart() -> None:
    """Steps within ``APART`` of each other may be as alike as they like."""
    torch.manual_seed(0)
    contrast = Contrast({"a": 2, "b": 2})
    ones = {n: torch.ones(1, APART, 2) for n in ("a", "b")}
    said = contrast(ones, {n: torch.ones(1, APART) for n in ones}, draws())
    assert said.loss.item() == pytest.approx(0, abs=1e-4)
