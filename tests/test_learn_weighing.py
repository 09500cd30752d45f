"""What each stream's word counts: double counting is undone, noise is silenced, and nothing else changes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, RecordingError
from pipeline.onnxfile import open_session

torch = pytest.importorskip("torch", reason="the package torch is missing: pip install -e '.[learn]'")
pytest.importorskip("onnxscript", reason="the package onnxscript is missing: pip install -e '.[learn]'")

from pipeline import learn  # noqa: E402
from pipeline.learn import weighing  # noqa: E402
from pipeline.learn.fusion import LateFusion, build_fusion  # noqa: E402
from pipeline.learn.graphs import check_fusion, fusion_graph  # noqa: E402
from pipeline.learn.loop import Silent  # noqa: E402
from pipeline.learn.model import say  # noqa: E402
from pipeline.learn.train import scores  # noqa: E402
from pipeline.learn.weighing import LEAST, Heard, fit_weights  # noqa: E402
from pipeline.messages import Header, Message, SignalLayout, signal_dtype  # noqa: E402
from pipeline.recording import Label  # noqa: E402
from pipeline.strict import Document  # noqa: E402

LABELS = 4
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {"width": 16, "queries": 2, "layers": 1, "heads": 2}
WEIGHED = SMALL | {"weigh": True}


def heard(evidence: Any, truth: Any, rest: Any = None, sessions: int = 1000) -> Heard:
    """What experts with this evidence [M, n, K] say, all of them always there."""
    evidence = torch.as_tensor(np.stack(evidence), dtype=torch.float64)
    m, n, k = evidence.shape
    sets = [some for size in range(1, m + 1) for some in combinations(range(m), size)]
    members = torch.tensor([[float(i in some) for i in range(m)] for some in sets], dtype=torch.float64)
    rest = torch.zeros(len(sets), n, k, dtype=torch.float64) if rest is None else rest
    return Heard(evidence[None] * members[:, :, None, None], members, torch.ones(len(sets), n, dtype=torch.bool), rest,
                 torch.as_tensor(truth), sessions)  # fmt: skip


def honest(rng: np.random.Generator, n: int, sharpness: float) -> tuple[Any, Any]:
    """Evidence [n, K] whose softmax is the truth's distribution, and truths [n] drawn from it."""
    evidence = sharpness * rng.standard_normal((n, LABELS))
    p = np.exp(evidence)
    p /= p.sum(1, keepdims=True)
    return evidence, np.array([rng.choice(LABELS, p=row) for row in p])


def weight(own: Any, beside: Any, which: int, *there: int) -> float:
    return float((own[which] + sum(beside[which, other] for other in there if other != which)).exp())


def test_two_experts_that_say_the_same_count_once_and_each_alone_in_full() -> None:
    evidence, truth = honest(np.random.default_rng(0), 3000, 2.0)
    own, beside = fit_weights([heard([evidence, evidence], truth)])
    assert weight(own, beside, 0) == pytest.approx(1, abs=0.1)
    assert weight(own, beside, 0, 1) + weight(own, beside, 1, 0) == pytest.approx(1, abs=0.1)


def test_an_expert_that_learnt_its_windows_by_heart_is_hushed_beside_a_good_one() -> None:
    rng = np.random.default_rng(1)
    evidence, truth = honest(rng, 3000, 2.0)
    noise = 4 * rng.standard_normal(evidence.shape)
    own, beside = fit_weights([heard([evidence, noise], truth)])
    assert weight(own, beside, 0, 1) == pytest.approx(1, abs=0.1)
    assert weight(own, beside, 1, 0) < 0.05
    both = np.tensordot([weight(own, beside, 0, 1), weight(own, beside, 1, 0)], np.stack([evidence, noise]), 1)
    right = [(said.argmax(1) == truth).mean() for said in (evidence, evidence + noise, both)]
    assert right[1] < right[0] - 0.1
    assert right[2] > right[0] - 0.01


def test_independent_experts_that_are_honest_keep_their_weights() -> None:
    rng = np.random.default_rng(2)
    truth = rng.integers(0, LABELS, 4000)
    own_word = np.eye(LABELS)[truth] * 1.5
    parts = [own_word + rng.standard_normal((4000, LABELS)) * np.sqrt(1.5) for _ in range(2)]
    own, beside = fit_weights([heard(parts, truth)])
    for which, other in ((0, 1), (1, 0)):
        assert weight(own, beside, which) == pytest.approx(1, abs=0.15)
        assert weight(own, beside, which, other) == pytest.approx(1, abs=0.15)


def test_few_sessions_move_weights_little() -> None:
    rng = np.random.default_rng(3)
    evidence, truth = honest(rng, 400, 2.0)
    noise = 4 * rng.standard_normal(evidence.shape)
    weights = [weight(*fit_weights([heard([evidence, noise], truth, sessions=n)]), 1, 0) for n in (1, 4, 400)]
    assert weights[0] > weights[1] > weights[2]


@given(st.integers(0, 1000), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=25)
def test_weights_never_make_it_worse_on_what_they_are_fitted_on(seed: int, m: int, rest: bool) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, LABELS, 60)
    evidence = [np.eye(LABELS)[truth] * rng.uniform(0, 3) + rng.standard_normal((60, LABELS)) for _ in range(m)]
    one = heard(evidence, truth)
    if rest:
        one = one._replace(rest=torch.as_tensor(rng.standard_normal(one.rest.shape)))
    parts = [one._replace(**{key: getattr(one, key)[..., half, :] for key in ("evidence", "rest")},
                          whole=one.whole[:, half], truth=one.truth[half])
             for half in (slice(None, 20), slice(20, None))]  # fmt: skip
    found = fit_weights(parts)
    for own, beside in (found, fit_weights([one._replace(sessions=2000)])):
        assert torch.isfinite(own).all()
        assert not beside.diagonal().any()
    assert torch.allclose(found[0], fit_weights([one._replace(sessions=2000)])[0], atol=1e-3)

    def lost(own: Any, beside: Any) -> float:
        weights = (own + one.members @ beside.T).exp() * one.members
        logits = one.rest + torch.einsum("sm,smnk->snk", weights, one.evidence)
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), one.truth.repeat(len(logits))))

    assert lost(*found) <= lost(*(torch.zeros(m, *more, dtype=torch.float64) for more in ((), (m,)))) + 1e-9


@pytest.mark.parametrize("strategy", ["late", "hybrid"])
def test_a_weighed_fusion_is_exported_as_it_is_and_says_the_prior_of_nothing(strategy: str) -> None:
    torch.manual_seed(0)
    fusion = build_fusion(strategy, {"a": 8, "b": 6}, 5, LABELS, SMALL).eval()
    assert isinstance(fusion, LateFusion)
    tokens = {"a": torch.randn(6, 5, 8), "b": torch.randn(6, 5, 6)}
    masks = {name: (torch.rand(6, 5) < 0.6).float() for name in tokens}
    masks["a"][0], masks["b"][1] = 0, 0
    masks["a"][2] = masks["b"][2] = 0
    before = fusion(tokens, masks)
    fusion.take_weights(torch.tensor([0.3, -1.0]), torch.tensor([[0.0, -0.7], [0.4, 0.0]]))
    after = fusion(tokens, masks)
    assert torch.equal(before[2], after[2])
    np.testing.assert_allclose(after[2].softmax(0).detach(), np.full(LABELS, 1 / LABELS), atol=1e-6)
    found = fusion.found(tokens, masks)
    assert found.evidence is not None
    assert found.present is not None
    counted = fusion.counts(found.present)[..., 0]
    expected = np.exp([[-1.0, 0.3], [0.3 - 0.7, -1.0 + 0.4]])
    np.testing.assert_allclose(counted[:, 0], [0, expected[0, 0]], atol=1e-6)  # b alone
    np.testing.assert_allclose(counted[:, 1], [expected[0, 1], 0], atol=1e-6)  # a alone
    np.testing.assert_allclose(counted[:, 4], expected[1], atol=1e-6)
    given_arrays = {name: value.numpy() for name, value in tokens.items()}
    given_arrays |= {f"mask.{name}": value.numpy() for name, value in masks.items()}
    data = fusion_graph(fusion)
    check_fusion(data, fusion, given_arrays, "fusion.onnx")
    said = open_session(data, "fusion.onnx").run(["logits"], given_arrays)[0]
    np.testing.assert_allclose(said, after.detach(), atol=1e-4)


def test_weights_are_no_part_of_what_another_training_begins_from() -> None:
    fusion = build_fusion("late", {"a": 8, "b": 6}, 1, LABELS, SMALL)
    assert not {"own", "beside"} & set(fusion.state_dict())


# -- through a training ------------------------------------------------------------------------------------------------

TRAIN = {"epochs": 20, "batch_windows": 32, "learning_rate": 0.01, "stream_loss": 1.0}
HOP = 100_000_000
STEPS = 12
"""Of each session."""


def session(number: int, label: int) -> learn.Made:
    """A stream that tells the label and one that tells the session's number alone, which a network learns by heart."""
    rng = np.random.default_rng(number)
    messages = []
    for name, channels in (("good", 2), ("bad", 24)):
        rows = rng.standard_normal((STEPS * 4, channels)) * 0.5
        posture = 3 * np.random.default_rng(1000 + number).standard_normal(channels)
        rows += [label, -label] if name == "good" else posture
        stamps = np.arange(len(rows), dtype=np.int64) * HOP // 4
        data = np.zeros(len(rows), signal_dtype(channels))
        data["offset_ns"], data["value"] = stamps, rows
        header = Header(
            stream=name, seq=0, epoch=0, t_capture_ns=0, t_end_ns=int(stamps[-1]), bound_ns=STEPS * HOP + HOP,
            t_receipt_ns=int(stamps[-1]), layout=SignalLayout(len(rows), tuple(f"c{i}" for i in range(channels))),
        )  # fmt: skip
        messages.append(Message(header, data))
    return learn.Made(f"s{number:02}", messages, [Label(0, STEPS * HOP, f"class {label}")], {})


def training(**more: Any) -> learn.Config:
    rule = {"kind": "resample", "rate_hz": 40, "max_gap_ms": 100}
    encoder = {"widths": [16], "statistics": True}
    file = {
        "name": "two", "window": {"hop_ms": 100, "steps": 1}, "strategy": "late", "fusion": SMALL,
        "streams": {name: {"rule": rule, "token": 12, "encoder": encoder} for name in ("good", "bad")},
        "split": {"held_out": 0.4, "test": 0.0}, "train": TRAIN,
    }  # fmt: skip
    return learn.check_config(Document(yaml.safe_dump(file | more), "two.yaml"))


def test_a_stream_that_was_learnt_by_heart_has_less_to_say(tmp_path: Any) -> None:
    made = [session(n, n % 2) for n in range(24)]
    trained = learn.train(training(fusion=WEIGHED), made)
    fusion = trained.model.fusion
    bad, good = (float(fusion.own[i] + fusion.beside[i, 1 - i]) for i in (0, 1))
    assert bad < good - 0.5
    everything = frozenset(trained.streams)

    def log_loss() -> float:
        said = say(trained.model, trained.dataset(trained.split.held_out), [everything], torch.device("cpu"))
        return scores(said.logits[everything], said.truth, 2)["held_out_loss"]

    weighed, own, beside = log_loss(), fusion.own.clone(), fusion.beside.clone()
    fusion.take_weights(torch.zeros(2), torch.zeros(2, 2))
    assert weighed < log_loss() / 2
    fusion.take_weights(own, beside)
    learn.export(trained, tmp_path / "two")
    card = (tmp_path / "two" / "README.md").read_text()
    assert "At the end, before the streams were weighed, the loss was" in card  # the figures there are of that model
    assert "| stream | by itself | beside bad | beside good |" in card
    assert f"| bad | {float(own[0].exp()):.2f} | – | {float(beside[0, 1].exp()):.2f} |" in card


@pytest.mark.parametrize("changes", [{}, {"fusion": WEIGHED, "split": {"held_out": 0.0, "test": 0.0}}])
def test_where_nothing_can_be_weighed_every_word_counts_as_it_was_learnt(changes: dict[str, Any]) -> None:
    trained = learn.train(training(**changes, train={"epochs": 1}), [session(n, n % 2) for n in range(8)])
    fusion = trained.model.fusion
    assert not isinstance(fusion, LateFusion) or not (fusion.own.any() or fusion.beside.any())


def test_too_few_windows_weigh_nothing_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Silent, "note", lambda _, text: notes.append(text))
    trained = learn.train(training(fusion=WEIGHED, train={"epochs": 1}), [session(n, n % 2) for n in range(5)])
    assert [note for note in notes if "the streams are not weighed: that takes two streams or more and 30" in note]
    held = sum(int((one.truth >= 0).sum()) for one in trained.split.held_out)
    assert 0 < held < LEAST
    assert not trained.model.fusion.own.any()


def test_a_window_without_numbers_does_not_spoil_the_weights_of_all_others() -> None:
    trained = learn.train(training(fusion=WEIGHED, train={"epochs": 1}), [session(n, n % 2) for n in range(24)])
    fusion, data = trained.model.fusion, trained.dataset(trained.split.held_out)
    before = fusion.own.clone(), fusion.beside.clone()
    data.sessions[0].held["bad"][3] = np.nan
    assert weighing.weigh(trained.model, data, torch.device("cpu"))
    for now, then in zip((fusion.own, fusion.beside), before, strict=True):
        assert torch.isfinite(now).all()
        assert torch.allclose(now, then, atol=0.1)


@pytest.mark.parametrize(("limits", "fewest", "most"), [
    ({"MOST": 100}, 50, 100), ({"NUMBERS": 80 * 3 * 2 * 2}, 40, 80), ({"NUMBERS": 1}, LEAST, 2 * LEAST),
])  # fmt: skip
def test_of_many_windows_so_many_are_looked_at_as_memory_has_room_for(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], fewest: int, most: int
) -> None:
    trained = learn.train(training(fusion=WEIGHED, train={"epochs": 1}), [session(n, n % 2) for n in range(24)])
    data = trained.dataset(trained.split.held_out)
    assert sum(int((one.truth >= 0).sum()) for one in data.sessions) > 100
    for name, value in limits.items():
        monkeypatch.setattr(weighing, name, value)
    found = weighing.hear(trained.model, data, torch.device("cpu"))
    assert found is not None
    assert fewest <= len(found.truth) <= most


@pytest.mark.parametrize("payload", ["imu", "audio"])
def test_a_signal_where_another_payload_is_stated_is_said_as_such(payload: str) -> None:
    made = [session(n, n % 2) for n in range(4)]
    streams = {"good": {"payload": payload, "token": 12}}
    with pytest.raises(RecordingError, match=f"has signal on its stream `good`, where `good` is {payload}"):
        learn.train(training(streams=streams), made)


# -- learning apart ----------------------------------------------------------------------------------------------------


def test_learning_apart_the_loss_of_all_together_teaches_nothing_but_reliability() -> None:
    torch.manual_seed(0)
    tokens = {"a": torch.randn(6, 5, 8, requires_grad=True), "b": torch.randn(6, 5, 6, requires_grad=True)}
    masks = {name: torch.ones(6, 5) for name in tokens}
    said = {}
    for apart in (False, True):
        torch.manual_seed(1)
        fusion = build_fusion("late", {"a": 8, "b": 6}, 5, LABELS, SMALL | {"apart": apart})
        torch.nn.init.normal_(fusion.trust.second.weight, 0, 0.1)
        said[apart] = fusion.eval()(tokens, masks)
        fusion.train()
        out = fusion.train_step(tokens, masks)
        together = torch.autograd.grad(
            out.logits.square().sum() + sum(out.extra_losses.values()), [*tokens.values(), *fusion.parameters()],
            retain_graph=True, allow_unused=True,
        )  # fmt: skip
        names = [*tokens, *(name for name, _ in fusion.named_parameters())]
        taught = {name.split(".")[0] for name, g in zip(names, together, strict=True) if g is not None and g.any()}
        assert taught == (
            {"trust", "read", "write"} if apart else {*names} & {*tokens} | {n.split(".")[0] for n in names}
        )
        (own,) = torch.autograd.grad(out.stream_logits["a"].square().sum(), [tokens["a"]])
        assert own.any()
    assert torch.equal(said[False], said[True])


@pytest.mark.parametrize(("changes", "said"), [
    ({"fusion": {"apart": True}, "strategy": "hybrid"}, "`apart` is for `late`, and `strategy` is hybrid"),
    ({"fusion": {"weigh": True}, "strategy": "early"}, "`weigh` is for `late`, `hybrid`, and `strategy` is early"),
    ({"fusion": {"apart": True}, "train": {"stream_loss": 0}}, "`stream_loss` alone with `apart`, which is 0"),
])  # fmt: skip
def test_streams_that_cannot_learn_apart_or_be_weighed_are_said(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        training(**changes)
