"""Distillation: what a blend of two chunks is, what teachers say of it, and how far a model is from that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the package torch is missing: pip install -e '.[learn]'")

from pipeline.learn.dataset import Batch  # noqa: E402
from pipeline.learn.encoders import build_encoder  # noqa: E402
from pipeline.learn.fusion import FusionOut, FusionSettings  # noqa: E402
from pipeline.learn.loop import one_thread  # noqa: E402
from pipeline.learn.model import Model, build_model, cut_windows  # noqa: E402
from pipeline.learn.teaching import MOST, Lesson, Teachers, blended, missed  # noqa: E402

STEPS, LABELS, LOTS, LENGTH = 2, 3, 6, 4
STREAMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "imu": ("imu", {"widths": [4]}, {"samples": 10, "channels": 6, "rate_hz": 100.0}),
    "pose": ("signal", {"widths": [4]}, {"samples": 10, "channels": 4, "rate_hz": 100.0}),
    "sound": ("audio", {"mels": 4, "widths": [4]}, {"samples": 800, "channels": 1, "rate_hz": 8000.0}),
    "camera": ("frame", {"size": 8, "widths": [4]}, {}),
    "lidar": ("sweep", {"columns": 8, "rows": 4, "widths": [4]}, {}),
    "words": ("text", {"buckets": 64}, {}),
}
KNOWN = ("imu", "pose", "sound")
"""The last row of a step of these says what is known of the others."""


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Threads cost such small sums more than they save."""
    with one_thread():
        yield


def draws(seed: int = 0) -> Any:
    return torch.Generator().manual_seed(seed)


def made(seed: int, strategy: str = "late", streams: tuple[str, ...] = tuple(STREAMS)) -> Model:
    torch.manual_seed(seed)
    encoders = {}
    for name in streams:
        payload, settings_, of = STREAMS[name]
        shape: dict[str, Any] = {"samples": 0, "channels": 0, "rate_hz": 0.0, **of}
        encoders[name] = build_encoder(payload, settings_, context=0, token=5, **shape)
    return build_model(encoders, strategy, STEPS, LABELS, FusionSettings(width=8, queries=1, layers=1, heads=1))


def batch(model: Model, seed: int = 0) -> Batch:
    """Chunks of random content, of which steps, and samples within steps, are missing."""
    random = draws(seed)
    prepared, present = {}, {}
    for name in model.encoders:
        encoder = model.encoder(name)
        steps = torch.randn((LOTS, LENGTH, *encoder.shape), generator=random)
        if name in KNOWN:
            steps[:, :, -1] = (torch.rand(steps[:, :, -1].shape, generator=random) < 0.8).float()
            steps[:, :, :-1] *= steps[:, :, -1:]
        prepared[name] = steps
        present[name] = (torch.rand((LOTS, LENGTH), generator=random) < 0.7).float()
    truth = torch.randint(LABELS, (LOTS, LENGTH), generator=random)
    return Batch(prepared, present, truth, ((0, 0),) * LOTS)


def encoders(model: Model) -> dict[str, Any]:
    return {name: model.encoder(name) for name in model.encoders}


# -- blends ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_a_blend_lies_between_two_chunks_and_nearer_to_its_own(seed: int, share: float) -> None:
    model = made(0)
    given_, found = batch(model, seed), blended(encoders(model), batch(model, seed), share, draws(seed))
    assert found.places == given_.places
    assert torch.equal(found.truth, given_.truth)
    mates: list[tuple[int, int, float]] = []
    for name, x in given_.prepared.items():
        assert torch.equal(found.present[name], given_.present[name])
        moved, here = (found.prepared[name] - x).flatten(2), given_.present[name][:, :, None]
        assert not (moved * (1 - here)).any()  # a step that is not there is left alone
        if name in KNOWN:
            assert torch.equal(found.prepared[name][:, :, -1], x[:, :, -1])  # and so is what is known
        for i in torch.nonzero(moved.flatten(1).any(1))[:, 0].tolist():
            mates.append((i, *between(x, found.prepared[name], i)))
    for i in range(LOTS):  # all streams of a chunk are blended with the same one, by as much
        own = [(mate, part) for chunk, mate, part in mates if chunk == i]
        assert all(mate == own[0][0] and part == pytest.approx(own[0][1], abs=2e-3) for mate, part in own)


def between(before: Any, after: Any, i: int) -> tuple[int, float]:
    """The one other chunk on the way to which chunk ``i`` went, and how far."""
    moved, fits = (after[i] - before[i]).flatten(), []
    for j in range(LOTS):
        off = (before[j] - before[i]).flatten()
        parts = (moved / off)[(off.abs() > 0.05) & (moved != 0)]
        if len(parts) > 1 and float(parts.max() - parts.min()) < 1e-3 and 0 < float(parts.mean()) <= MOST:
            fits.append((j, float(parts.mean())))
    assert len(fits) == 1
    return fits[0]


def test_a_share_of_one_blends_every_chunk_with_another() -> None:
    model = made(0)
    for lots in (1, 2, 5):
        whole = batch(model)
        cut = Batch(
            {name: x[:lots] for name, x in whole.prepared.items()},
            {name: torch.ones_like(x[:lots]) for name, x in whole.present.items()},
            whole.truth[:lots], whole.places[:lots],
        )  # fmt: skip
        for seed in range(20):
            found = blended(encoders(model), cut, 1.0, draws(seed)).prepared
            for name, x in cut.prepared.items():
                assert bool((found[name] != x).flatten(1).any(1).all()) == (lots > 1)


def test_no_share_changes_nothing_and_equal_draws_give_equal_blends() -> None:
    model = made(0)
    given_ = batch(model)
    for name, x in blended(encoders(model), given_, 0.0, draws()).prepared.items():
        assert torch.equal(x, given_.prepared[name])
    one, other, third = (blended(encoders(model), given_, 1.0, draws(seed)).prepared for seed in (1, 1, 2))
    assert all(torch.equal(one[name], other[name]) for name in STREAMS)
    assert any(not torch.equal(one[name], third[name]) for name in STREAMS)


# -- lessons -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["late", "early", "hybrid"])
def test_a_lesson_is_the_mean_of_what_teachers_say_and_teaches_them_nothing(strategy: str) -> None:
    models = [made(seed, strategy) for seed in (1, 2, 3)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    teachers, given_ = Teachers(models), batch(models[0])
    _, masks, truth = cut_windows(models[0], given_)
    masks = {name: torch.cat([mask, mask * (name != "imu")]) for name, mask in masks.items()}
    lesson = teachers.lesson(given_, masks)
    assert lesson.fused.shape == (2 * len(truth), LABELS)
    torch.testing.assert_close(lesson.fused.sum(1), torch.ones(2 * len(truth)))
    assert set(lesson.alone) == (set() if strategy == "early" else set(STREAMS))
    with torch.no_grad():
        said = []
        for model in models:
            tokens, _, _ = cut_windows(model, given_)
            said.append(model.fusion({n: torch.cat([t, t]) for n, t in tokens.items()}, masks).softmax(1))
    torch.testing.assert_close(lesson.fused, torch.stack(said).mean(0))
    for model, weights in zip(models, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))
        assert not any(p.requires_grad for p in model.parameters())


def out(logits: Any, alone: Any) -> FusionOut:
    return FusionOut(logits, {"imu": alone}, {}, {})


def test_who_says_the_same_has_missed_nothing_and_only_the_model_moves() -> None:
    logits, alone = (torch.randn((4, LABELS), generator=draws(i)).requires_grad_() for i in (0, 1))
    masks = {"imu": torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 1]])}
    same = Lesson(logits.detach().softmax(1), {"imu": alone.detach().softmax(1)})
    assert float(missed(out(logits, alone), same, masks, 2.0).detach()) == pytest.approx(0, abs=1e-6)
    other = Lesson(same.fused.flip(1), {"imu": same.alone["imu"].flip(1)})
    both = missed(out(logits, alone), other, masks, 2.0)
    fused = missed(out(logits, alone), other, masks, 0.0).detach()
    by_hand = (other.fused * (other.fused / same.fused).log()).sum(1).mean()
    assert float(fused) == pytest.approx(float(by_hand), rel=1e-5)
    by_hand = (other.alone["imu"] * (other.alone["imu"] / same.alone["imu"]).log()).sum(1).mean()
    assert float(both.detach() - fused) == pytest.approx(2 * float(by_hand), rel=1e-5)
    for grad in torch.autograd.grad(both, [logits, alone]):
        assert grad.any()


def test_a_window_with_nothing_in_it_teaches_nothing() -> None:
    logits = torch.randn((2, LABELS), generator=draws()).requires_grad_()
    lesson = Lesson(torch.tensor([[1.0, 0, 0], [0, 1, 0]]), {})
    found = missed(out(logits, logits), lesson, {"imu": torch.tensor([[1.0], [0.0]])}, 1.0)
    assert float(found.detach()) == pytest.approx(-float(logits.detach().log_softmax(1)[0, 0]), rel=1e-5)
    [grad] = torch.autograd.grad(found, [logits])
    assert not grad[1].any()
    nothing = {"imu": torch.zeros((2, 1))}
    assert float(missed(out(logits.detach(), logits.detach()), lesson, nothing, 1.0)) == 0


def test_lessons_of_blends_bring_a_model_to_what_its_teachers_say() -> None:
    """Of chunks that it was never shown."""
    teachers, pupil, random = (
        Teachers([made(n, streams=("imu", "pose")) for n in (1, 2)]),
        made(3, streams=("imu", "pose")),
        draws(9),
    )
    change = torch.optim.AdamW(pupil.parameters(), lr=0.02)

    def off(given_: Batch) -> Any:
        tokens, masks, _ = cut_windows(pupil, given_)
        masks = {name: torch.cat([mask, mask]) for name, mask in masks.items()}
        said = pupil.fusion.train_step({name: torch.cat([x, x]) for name, x in tokens.items()}, masks)
        return missed(said, teachers.lesson(given_, masks), masks, 1.0)

    unseen = batch(pupil, 999)
    with torch.no_grad():
        before = float(off(unseen))
    for turn in range(50):
        change.zero_grad()
        off(blended(encoders(pupil), batch(pupil, turn % 20), 0.7, random)).backward()
        change.step()
    pupil.eval()
    with torch.no_grad():
        assert float(off(unseen)) < before / 2
