"""Encoders and fusion models: shapes, any subset, nothing leaks through a mask, the exported graph says the same."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align import Latest, Resample
from pipeline.errors import ConfigError
from pipeline.modelfile import BundleStream, Calibration, SubsetCalibration
from pipeline.onnxfile import open_session

torch = pytest.importorskip("torch", reason="the package torch is missing: pip install -e '.[learn]'")
pytest.importorskip("onnxscript", reason="the package onnxscript is missing: pip install -e '.[learn]'")

from pipeline.learn.blocks import Moments, Normalise, averaging, pooled, statistics  # noqa: E402
from pipeline.learn.encoders import SETTINGS, StepGraph, StreamEncoder, build_encoder, encode_steps  # noqa: E402
from pipeline.learn.export import _plain  # noqa: E402
from pipeline.learn.fusion import STRATEGIES, Fusion, build_fusion  # noqa: E402
from pipeline.learn.graphs import encoder_graph, fusion_graph  # noqa: E402
from pipeline.learn.pictures import TURN, azimuths  # noqa: E402
from pipeline.learn.series import Principal, lagged  # noqa: E402
from pipeline.learn.sound import fourier, triangles  # noqa: E402
from pipeline.learn.summaries import Moved, spans  # noqa: E402

ENCODERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "frame": ("frame", {"size": 32, "widths": [8, 16]}, {}),
    "audio": ("audio", {"mels": 16, "widths": [8]},
              {"samples": 800, "context": 800, "channels": 2, "rate_hz": 8000}),
    "imu": ("imu", {"widths": [16]}, {"samples": 10, "context": 20, "channels": 6, "rate_hz": 100}),
    "imu level": ("imu", {"widths": [16], "frame": "level"}, {"samples": 10, "channels": 6, "rate_hz": 100}),
    "imu rows": ("imu", {"widths": [16]}, {"channels": 6}),
    "imu without differences": ("imu", {"widths": [16], "differences": []},
                                {"samples": 9, "channels": 6, "rate_hz": 90}),
    "signal": ("signal", {"widths": [16, 16], "dims": 3, "origin": 1, "pairs": [[0, 2]], "differences": [1, 2, 30]},
               {"samples": 24, "channels": 9, "rate_hz": 30}),
    "signal by components": ("signal", {"widths": [16], "components": 3},
                             {"samples": 12, "channels": 7, "rate_hz": 20}),
    "signal of one sample": ("signal", {"widths": [16]}, {"samples": 1, "channels": 2, "rate_hz": 10}),
    "signal rows": ("signal", {"widths": [16], "points": 8, "dims": 2, "origin": 1}, {"channels": 4}),
    "sweep": ("sweep", {"widths": [8], "columns": 32, "rows": 8}, {}),
    "sweep above": ("sweep", {"widths": [8, 16], "columns": 32, "view": "above"}, {}),
    "text": ("text", {"buckets": 256, "width": 16}, {}),
}  # fmt: skip


def encoder_of(name: str) -> StreamEncoder:
    payload, given_settings, stream = ENCODERS[name]
    torch.manual_seed(1)
    kw = {"samples": 0, "context": 0, "channels": 0, "rate_hz": 0} | stream
    encoder: StreamEncoder = build_encoder(payload, given_settings, token=12, **kw)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    prepared = [encoder.prepare(*inputs) for inputs in (content(name, 5, rng) for _ in range(8))]
    encoder.fit([torch.stack(prepared[:6]), prepared[6], prepared[7]])
    return encoder.eval()


def content(name: str, size: int, rng: np.random.Generator) -> tuple[Any, ...]:
    """One step as the runtime would feed it; ``size`` counts whatever may vary."""
    payload, _, stream = ENCODERS[name]
    rows, channels = stream.get("samples", 0) + stream.get("context", 0), stream.get("channels", 0)
    if payload == "frame":
        return (torch.from_numpy(rng.integers(0, 256, (size, 2 * size + 1, 3), np.uint8)),)
    if payload == "text":
        return (torch.from_numpy(rng.integers(0, 256, size, np.uint8)),)
    if payload == "sweep":
        return (torch.from_numpy(rng.normal(0, 8, (size, 5)).astype(np.float32)),)
    if not rows:
        return (torch.from_numpy(rng.normal(0, 2, (size, channels)).astype(np.float32)),)
    x = rng.normal(0, 2 if payload != "audio" else 0.1, (rows, channels)).astype(np.float32)
    valid = (rng.random(rows) < size / 10).astype(np.float32)
    return torch.from_numpy(x * valid[:, None]), torch.from_numpy(valid)


def stream_of(name: str) -> BundleStream:
    payload, _, stream = ENCODERS[name]
    rule = Resample(int(stream["rate_hz"]), 10**8) if stream.get("samples") else Latest(10**9)
    return BundleStream(
        payload=payload,
        rule=rule,
        channels=stream.get("channels", 0),
        encoder="",
        settings={},
        context_ms=0,
        token=12,
        samples=stream.get("samples", 0),
        context=stream.get("context", 0),
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_prepares_a_fixed_shape_and_gives_a_finite_token(name: str) -> None:
    encoder, rng = encoder_of(name), np.random.default_rng(3)
    for size in (1, 2, 7, 10):
        prepared = encoder.prepare(*content(name, size, rng))
        assert tuple(prepared.shape) == encoder.shape
        assert prepared.dtype == torch.float32
        token = encoder(prepared[None])
        assert token.shape == (1, encoder.token)
        assert torch.isfinite(token).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_learns_from_every_step_that_is_there(name: str) -> None:
    encoder, rng = encoder_of(name), np.random.default_rng(4)
    encoder.train()
    prepared = torch.stack([encoder.prepare(*content(name, 10, rng)) for _ in range(6)]).reshape(2, 3, *encoder.shape)
    present = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    tokens = encode_steps(encoder, prepared, present)
    assert tokens.shape == (2, 3, encoder.token)
    assert (tokens[present == 0] == 0).all()
    tokens.square().sum().backward()
    for parameter, value in encoder.named_parameters():
        assert value.grad is not None, parameter
        assert torch.isfinite(value.grad).all()
    assert max(float(p.grad.abs().max()) for p in encoder.parameters()) > 0


@pytest.mark.parametrize("name", ENCODERS)
def test_steps_that_are_not_there_change_nothing_even_while_training(name: str) -> None:
    encoder, rng = encoder_of(name), np.random.default_rng(4)
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    prepared = torch.stack([encoder.prepare(*content(name, 10, rng)) for _ in range(4)])[None]
    present = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    one = encode_steps(encoder, prepared, present)
    prepared[:, 1] = torch.nan
    assert torch.equal(one, encode_steps(encoder, prepared, present))
    assert (encode_steps(encoder, prepared, torch.zeros(1, 4)) == 0).all()
    alone = encode_steps(encoder, prepared, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert torch.isfinite(alone).all()


SIZES = {"frame": (1, 2, 40, 333), "text": (0, 1, 2, 700), "sweep": (0, 1, 2, 3000)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["frame", "audio", "imu", "signal rows", "sweep", "text"])
def test_the_exported_encoder_says_the_same_for_any_size(name: str) -> None:
    encoder, graph = encoder_of(name), StepGraph(encoder_of(name)).eval()
    example = content(name, 10, np.random.default_rng(5))
    names = ["x", "valid"][: len(example)]
    data = encoder_graph(encoder, stream_of(name), dict(zip(names, (v.numpy() for v in example), strict=True)))
    session = open_session(data, name)
    payload = ENCODERS[name][0]
    for size in SIZES.get(payload, (0, 1, 5, 10) if len(example) == 2 else (0, 1, 2, 5, 64, 500)):
        for seed in range(3):
            some = content(name, size, np.random.default_rng(seed))
            with torch.no_grad():
                wanted = graph(*some).numpy()
            found = session.run(["token"], {n: v.numpy() for n, v in zip(names, some, strict=True)})[0]
            np.testing.assert_allclose(found, wanted, atol=1e-4)
            assert found.shape == (encoder.token,)


def test_prepared_pictures_are_means_of_the_pixels_in_each_cell() -> None:
    encoder = encoder_of("frame")
    pixels = np.zeros((128, 256, 3), np.uint8)
    pixels[:64, :128] = (10, 20, 30)  # a quarter of the picture
    prepared = encoder.prepare(torch.from_numpy(pixels))
    assert prepared[:, :16, :16].unique().tolist() == pytest.approx([10 / 255, 20 / 255, 30 / 255])
    assert (prepared[:, 16:] == 0).all()
    single = encoder.prepare(torch.full((1, 1, 3), 51, dtype=torch.uint8))
    assert (single == 51 / 255).all()


@given(st.integers(1, 300), st.integers(1, 300))
@settings(deadline=None, max_examples=30)
def test_pictures_of_any_size_keep_their_mean(height: int, width: int) -> None:
    encoder = encoder_cached("frame")
    ramp = np.linspace(0, 250, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    prepared = encoder.prepare(torch.from_numpy(ramp))
    assert float(prepared.mean()) == pytest.approx(float(ramp.mean()) / 255, abs=0.08)


@cache
def encoder_cached(name: str) -> StreamEncoder:
    return encoder_of(name)


def test_the_spectrogram_finds_a_tone_where_it_is() -> None:
    encoder = encoder_of("audio")
    time = torch.arange(1600) / 8000
    for hz in (300.0, 1000.0, 2500.0):
        sound = 0.5 * torch.sin(2 * torch.pi * hz * time)
        bands = encoder.prepare(torch.stack([sound, sound], 1), torch.ones(1600))[:-1].mean(1)
        edges = 700 * (10 ** (torch.linspace(*(2595 * np.log10(1 + f / 700) for f in (50, 4000)), 18) / 2595) - 1)
        assert int(bands.argmax()) == int((edges[1:-1] - hz).abs().argmin())


def test_noise_of_power_1_has_power_1_in_every_bin_and_band() -> None:
    noise = torch.randn(1, 1, 200_000, generator=torch.Generator().manual_seed(0))
    found = torch.nn.functional.conv1d(noise, fourier(200), stride=100)[0]
    power = (found[:101].square() + found[101:].square()).mean(1)
    assert power[1:-1].mean() == pytest.approx(1, abs=0.02)
    bands = triangles(40, 200, 16_000, 50, 8_000)
    assert torch.allclose(bands.sum(1), torch.ones(40))


def test_silence_and_holes_are_told_apart() -> None:
    encoder = encoder_of("audio")
    silence, hole = torch.zeros(1600, 2), torch.zeros(1600)
    heard, unheard = encoder.prepare(silence, hole + 1), encoder.prepare(silence, hole)
    assert (heard[:-1] == 0).all()
    assert (heard[-1] == 1).all()
    assert (unheard[-1] == 0).all()


@given(st.floats(-180, 180), st.floats(1, 40), st.floats(-1, 1))
@settings(deadline=None, max_examples=50)
def test_a_point_lies_in_one_cell_at_its_own_azimuth(degrees: float, metres: float, height: float) -> None:
    encoder = encoder_cached("sweep")
    angle = np.deg2rad(degrees)
    point = torch.tensor([[metres * np.cos(angle), metres * np.sin(angle), height * metres * 0.2, 3.0, 0.0]])
    near, count, bright = encoder.prepare(point.float())
    assert int((near > 0).sum()) == int((count > 0).sum()) == int((bright > 0).sum()) == 1
    row, column = divmod(int(near.argmax()), 32)
    wanted = (degrees / 360 + 0.25 + 0.1234 / 32) % 1 * 32
    assert abs((column + 0.5 - wanted + 16) % 32 - 16) < 0.52
    assert 0 <= row < 8
    assert float(near.max()) == pytest.approx(1 / (1 + metres * np.hypot(1, height * 0.2)), rel=1e-4)


def test_a_sweep_keeps_the_nearest_return_and_drops_what_is_none() -> None:
    encoder = encoder_of("sweep")
    points = torch.tensor(
        [[5.0, 0, 0, 1, 0], [3.0, 0, 0, 9, 0], [np.nan, 0, 0, 1, 0], [0, 0, 0, 1, 0], [900, 0, 0, 1, 0]]
    )
    near, count, bright = encoder.prepare(points.float())
    assert float(near.max()) == pytest.approx(1 / 4)
    assert float(count.sum()) == pytest.approx(np.log(3))
    assert float(bright.max()) == pytest.approx(np.log(10))
    assert (encoder.prepare(torch.zeros(0, 5)) == 0).all()


def test_the_table_of_azimuths_is_even() -> None:
    assert len(azimuths(64)) == TURN
    assert azimuths(64).bincount(minlength=64).min() > 0.4 * TURN / 64  # the square's corners have fewer entries


def test_text_does_not_care_for_case_and_tells_words_apart() -> None:
    encoder = encoder_of("text")

    def bag(text: str) -> Any:
        return encoder.prepare(torch.tensor(list(text.encode()), dtype=torch.uint8))

    assert torch.equal(bag("Stop THERE"), bag("stop there"))
    alike, other = float(bag("stop there") @ bag("stop here")), float(bag("stop there") @ bag("go on"))
    assert other < alike < 1
    assert float(bag("").norm()) == pytest.approx(1)


def test_samples_that_are_not_valid_have_no_say() -> None:
    encoder, rng = encoder_of("imu"), np.random.default_rng(1)
    x, valid = content("imu", 5, rng)
    noise = torch.from_numpy(rng.normal(0, 9, x.shape).astype(np.float32)) * (1 - valid[:, None])
    assert torch.equal(encoder.prepare(x, valid), encoder.prepare(x + noise, valid))


def test_an_imu_in_the_level_frame_does_not_care_how_it_is_turned() -> None:
    encoder, rng = encoder_of("imu level"), np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(0, 1, (10, 6)).astype(np.float32)) + torch.tensor([0, 0, 9.8, 0, 0, 0])
    turn = torch.from_numpy(np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32))
    turn = turn * torch.linalg.det(turn)
    other = torch.cat([x[:, :3] @ turn.T, x[:, 3:] @ turn.T], 1)
    tokens = [encoder(encoder.prepare(v, torch.ones(10))[None]) for v in (x, other)]
    assert torch.allclose(*tokens, atol=1e-3)


def test_rows_of_any_number_are_stretched_linearly() -> None:
    encoder = encoder_of("signal rows")
    for n in (8, 16, 80):
        ramp = ((torch.arange(n) + 0.5) / n)[:, None].expand(n, 4)
        prepared = encoder.prepare(ramp.contiguous())
        assert torch.allclose(prepared[0], (torch.arange(8) + 0.5) / 8, atol=1e-5)
        assert (prepared[-1] == 1).all()
    assert (encoder.prepare(torch.zeros(0, 4)) == 0).all()
    broken = encoder.prepare(torch.full((8, 4), torch.nan))
    assert (broken == 0).all()


def test_components_are_those_of_what_is_valid() -> None:
    """Channels that three hidden ones make, some of them in large units: three components hold all of it."""
    rng = np.random.default_rng(2)
    mixed = rng.normal(0, 1, (3, 20)) * 10.0 ** rng.integers(-1, 3, 20)
    steps = torch.from_numpy((rng.normal(0, 1, (40, 12, 3)) @ mixed + 5).astype(np.float32)).transpose(1, 2)
    valid = torch.from_numpy((rng.random((40, 1, 12)) < 0.7).astype(np.float32))
    wild = torch.cat([torch.where(valid > 0, steps, 1e6), valid], 1)
    found = Principal(20, 3)
    found.take([wild[:30], wild[30:]])
    assert torch.isfinite(found.axes).all()
    parts = found(steps)
    centred = (steps - steps.transpose(1, 2)[valid[:, 0] > 0].mean(0)[None, :, None]).transpose(1, 2).reshape(-1, 20)
    rows = parts.transpose(1, 2).reshape(-1, 3)
    again = rows @ torch.linalg.lstsq(rows, centred).solution
    assert torch.allclose(again, centred, rtol=1e-3, atol=1e-3 * float(centred.abs().max()))
    apart = torch.corrcoef(parts.transpose(1, 2)[valid[:, 0] > 0].T) - torch.eye(3)
    assert float(apart.abs().max()) < 1e-3
    nothing = Principal(20, 3)
    nothing.take([])
    assert torch.equal(nothing(steps), steps[:, :3])


def test_normalisation_counts_what_is_valid_only() -> None:
    layer, moments = Normalise(2, 1), Moments()
    values = torch.tensor([[[1.0, 3.0, 99.0], [2.0, 2.0, 99.0]]])
    moments.add(values, torch.tensor([[[1.0, 1.0, 0.0]]]))
    layer.take(moments)
    assert layer.mean.flatten().tolist() == [2, 2]
    assert layer.scale.flatten().tolist() == [1, pytest.approx(1e-4)]
    layer.take(Moments())
    assert layer.mean.flatten().tolist() == [2, 2]


@given(points=st.integers(1, 20), lag=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_difference_stands_in_the_middle_of_its_samples(points: int, lag: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = torch.from_numpy(rng.normal(size=(2, 3, points)))
    valid = torch.from_numpy((rng.random((2, 1, points)) < 0.7).astype(float))
    change, both = lagged(values, valid, min(lag, points))
    assert change.shape == values.shape
    assert both.shape == valid.shape
    expected, known = torch.zeros_like(values), torch.zeros_like(valid)
    for last in range(lag, points):
        expected[:, :, last - lag // 2] = values[:, :, last] - values[:, :, last - lag]
        known[:, :, last - lag // 2] = valid[:, :, last] * valid[:, :, last - lag]
    assert torch.equal(change, expected)
    assert torch.equal(both, known)


@given(st.integers(1, 60), st.integers(1, 12))
def test_averaging_keeps_the_mean(length: int, parts: int) -> None:
    matrix = averaging(length, parts)
    assert torch.allclose(matrix.sum(0), torch.ones(parts), atol=1e-5)
    assert float(matrix.min()) >= 0


def test_pooling_and_statistics_see_what_is_valid() -> None:
    values, valid = torch.tensor([[[1.0, 2.0, 50.0]]]), torch.tensor([[[1.0, 1.0, 0.0]]])
    assert pooled(values, valid).tolist() == [[1.5, 2.0]]
    assert statistics(values, valid)[0].tolist() == pytest.approx([1.5, 0.5, 1, 2], abs=1e-5)
    assert statistics(values, valid * 0)[0].abs().max() < 0.01
    assert pooled(values, valid * 0).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("payload", "given_settings", "words"),
    [
        ("frame", {"sise": 32}, "Did you mean `size`"),
        ("frame", {"size": 4}, "size"),
        ("imu", {"frame": "sideways"}, "sideways"),
        ("audio", {"low_hz": 9000.0}, "do not fit a rate"),
        ("signal", {"dims": 3, "origin": 7}, "points"),
        ("signal", {"dims": 3, "pairs": [[0, 9]]}, "points"),
        ("signal", {"dims": 2}, "2"),
        ("signal", {"origin": 0}, "dims"),
        ("signal", {"components": 10}, "9 channels have no 10"),
        ("signal", {"components": 2, "dims": 3}, "one of both"),
    ],
)
def test_settings_that_do_not_fit_are_refused(payload: Any, given_settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_encoder(payload, given_settings, samples=100, context=0, channels=9, rate_hz=1000, token=4)


def test_audio_needs_a_rate() -> None:
    with pytest.raises(ConfigError, match="resample"):
        build_encoder("audio", {}, samples=0, context=0, channels=1, rate_hz=0, token=4)


def test_every_payload_has_an_encoder() -> None:
    assert {payload for payload, _, _ in ENCODERS.values()} == set(SETTINGS)


# -- fusion ----------------------------------------------------------------------------------------------------------

WIDTHS = {"one": 5, "two": 3, "three": 4}
STEPS, LABELS = 7, 4
KINDS = [*STRATEGIES, *(f"{strategy} linear" for strategy in STRATEGIES), "early change", "hybrid change"]
LOG_PRIOR = np.log(np.array([6, 3, 2, 1]) / 12)


def fusion_of(strategy: str, widths: dict[str, int] | None = None, steps: int = STEPS) -> Fusion:
    torch.manual_seed(2)
    name, _, other = strategy.partition(" ")
    small = {"width": 16, "queries": 2, "layers": 1, "heads": 2, "fine": 4, "change": other == "change"}
    small["head"] = "linear" if other == "linear" else "perceptron"
    fusion: Fusion = build_fusion(name, widths or WIDTHS, steps, LABELS, small)
    fusion.set_prior([5, 2, 1, 0])
    for parameter in fusion.parameters():  # nothing may hide behind a weight that begins with 0
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, 0, 0.1)
    return fusion.eval()


def window(lots: int, seed: int = 0, widths: dict[str, int] | None = None, steps: int = STEPS) -> tuple[Any, Any]:
    rng = torch.Generator().manual_seed(seed)
    sizes = widths or WIDTHS
    tokens = {name: torch.randn(lots, steps, n, generator=rng) for name, n in sizes.items()}
    masks = {name: (torch.rand(lots, steps, generator=rng) < 0.6).float() for name in sizes}
    return tokens, masks


@pytest.mark.parametrize("strategy", KINDS)
def test_every_subset_gives_finite_logits_and_none_gives_the_prior(strategy: str) -> None:
    fusion = fusion_of(strategy)
    tokens, _ = window(8)
    members = torch.tensor([[b >> i & 1 for i in range(3)] for b in range(8)]).float()
    masks = {name: members[:, i : i + 1].expand(8, STEPS) for i, name in enumerate(WIDTHS)}
    logits = fusion(tokens, masks)
    assert logits.shape == (8, LABELS)
    assert torch.isfinite(logits).all()
    np.testing.assert_allclose(logits[0].softmax(0).log().detach(), LOG_PRIOR, atol=1e-6)
    out = fusion.train_step(tokens, masks)
    assert torch.equal(out.logits, logits)
    for values in out.stream_logits.values():
        np.testing.assert_allclose(values[0].detach(), LOG_PRIOR, atol=1e-6)
    for name, weight in out.reliability.items():
        assert ((weight > 0) == (masks[name][:, 0] > 0)).all()
        assert (weight <= 2).all()


@pytest.mark.parametrize("strategy", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_what_is_masked_cannot_change_a_bit(strategy: str, data: st.DataObject) -> None:
    fusion = fusion_cached(strategy)
    tokens, masks = window(4, data.draw(st.integers(0, 99)))
    before = fusion(tokens, masks)
    filling = data.draw(st.sampled_from([0.0, 1e30, -1.0, float("nan"), float("inf")]))
    changed = {n: torch.where(masks[n][..., None] > 0, x, filling) for n, x in tokens.items()}
    assert torch.equal(before, fusion(changed, masks))


@cache
def fusion_cached(strategy: str) -> Fusion:
    return fusion_of(strategy)


@pytest.mark.parametrize("strategy", KINDS)
def test_windows_of_a_batch_do_not_know_of_each_other(strategy: str) -> None:
    fusion = fusion_of(strategy)
    tokens, masks = window(6)
    all_of_them = fusion(tokens, masks)
    for i in range(6):
        one = fusion({n: x[i : i + 1] for n, x in tokens.items()}, {n: m[i : i + 1] for n, m in masks.items()})
        assert torch.allclose(one[0], all_of_them[i], atol=1e-5)


@pytest.mark.parametrize("strategy", KINDS)
def test_all_of_a_fusion_learns(strategy: str) -> None:
    fusion = fusion_of(strategy).train()
    tokens, masks = window(16)
    out = fusion.train_step(tokens, masks)
    total = out.logits.square().sum() + sum(z.square().sum() for z in out.stream_logits.values())
    (total + sum(out.extra_losses.values())).backward()
    still = [name for name, p in fusion.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not still


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["early", "hybrid", "hybrid linear", "hybrid change"])  # which hold all of `late`
def test_the_exported_fusion_says_the_same_for_any_batch(strategy: str) -> None:
    widths = {"one": 5, "two": 3}
    fusion = fusion_of(strategy, widths, 6)
    session = open_session(fusion_graph(fusion), strategy)
    for lots in (1, 2, 9):
        tokens, masks = window(lots, lots, widths, 6)
        masks["two"][0] = 0
        if lots == 9:
            masks = {name: mask * (torch.arange(9) > 0)[:, None] for name, mask in masks.items()}
        feed = {n: x.numpy() for n, x in tokens.items()} | {f"mask.{n}": m.numpy() for n, m in masks.items()}
        with torch.no_grad():
            wanted = fusion(tokens, masks).numpy()
        np.testing.assert_allclose(session.run(["logits"], feed)[0], wanted, atol=1e-4)


@pytest.mark.parametrize("strategy", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 33])
def test_a_window_may_have_any_length_and_one_stream(strategy: str, steps: int) -> None:
    fusion = fusion_of(strategy, {"only": 3}, steps)
    tokens, masks = window(2, 0, {"only": 3}, steps)
    assert torch.isfinite(fusion(tokens, masks)).all()


def test_change_is_found_in_places_that_differ_more_than_it_changes() -> None:
    """A light flashes by a tenth of what the brightness of two places differs by, in half of the windows."""
    rng = torch.Generator().manual_seed(5)

    def some(lots: int) -> tuple[Any, Any, Any]:
        flashes = torch.arange(lots) % 2
        place = 3 * torch.randn(lots, 1, 6, generator=rng)
        toggled = (torch.rand(lots, 8, 1, generator=rng) < 0.5).float() * flashes[:, None, None]
        light = torch.tensor([0.3, -0.3, 0.0, 0.0, 0.0, 0.0]) * toggled
        return {"camera": place + light}, {"camera": torch.ones(lots, 8)}, flashes

    def learnt(change: bool) -> float:
        torch.manual_seed(3)
        fusion: Fusion = build_fusion("late", {"camera": 6}, 8, 2, {"width": 16, "queries": 2, "change": change})
        optimiser = torch.optim.AdamW(fusion.parameters(), 3e-3)
        for _ in range(80):
            tokens, masks, truth = some(64)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(fusion.train_step(tokens, masks).logits, truth).backward()
            optimiser.step()
        tokens, masks, truth = some(512)
        with torch.no_grad():
            return float((fusion.eval()(tokens, masks).argmax(1) == truth).float().mean())

    assert learnt(True) > 0.95 > learnt(False) + 0.1


def test_after_a_gap_nothing_has_changed() -> None:
    moved = Moved(1, 1).eval()
    torch.nn.init.ones_(moved.enter.weight)
    known = torch.tensor([1.0, 1, 0, 1, 1]).reshape(1, 5, 1)
    found = moved(torch.tensor([1.0, 3, 0, 9, 8]).reshape(1, 5, 1), known)[0, :, 0]
    np.testing.assert_allclose(found.detach(), [0, 4, 0, 0, 0], atol=1e-4)  # up: 2 + |2|; down: -1 + |-1|


@given(st.integers(1, 5000), st.integers(1, 40))
def test_spans_cover_the_window_and_grow_slowly(steps: int, fine: int) -> None:
    found = spans(steps, fine)
    assert sum(parts * length for parts, length in found) == steps
    assert all(parts >= 1 and length >= 1 for parts, length in found)
    lengths = [length for _, length in found]
    if len(lengths) > 1:
        assert sorted(lengths[1:], reverse=True) == lengths[1:]
        assert found[-1] == (fine, 1)
    assert sum(parts for parts, _ in found) <= fine + (fine // 2 + 1) * (steps // fine).bit_length() + 1


def test_a_broken_stream_loses_its_say_after_learning_from_broken_ones() -> None:
    """Two streams know the truth, in part; one of them is noise in half of the windows, with its mask saying that all
    is well. What pools them learns to tell."""
    generator = torch.Generator().manual_seed(0)
    fusion = fusion_of("late", {"good": 4, "bad": 4}, 2).train()
    optimiser = torch.optim.Adam(fusion.parameters(), 5e-3)

    def draw(lots: int, broken: Any) -> tuple[Any, Any, Any]:
        truth = torch.randint(0, LABELS, (lots,), generator=generator)
        clean = torch.nn.functional.one_hot(truth, 4).float()[:, None].expand(lots, 2, 4)
        tokens = {n: 2 * clean + torch.randn(lots, 2, 4, generator=generator) for n in ("good", "bad")}
        wild = 4 * torch.randn(lots, 2, 4, generator=generator)
        tokens["bad"] = torch.where(broken[:, None, None], wild, tokens["bad"])
        return tokens, {n: torch.ones(lots, 2) for n in tokens}, truth

    for _ in range(150):
        tokens, masks, truth = draw(128, torch.rand(128, generator=generator) < 0.5)
        out = fusion.train_step(tokens, masks)
        loss = torch.nn.functional.cross_entropy(out.logits, truth)
        loss = loss + sum(torch.nn.functional.cross_entropy(z, truth) for z in out.stream_logits.values())
        optimiser.zero_grad()
        (loss + sum(out.extra_losses.values())).backward()
        optimiser.step()
    fusion.eval().requires_grad_(False)
    tokens, masks, truth = draw(2000, torch.arange(2000) >= 1000)
    out = fusion.train_step(tokens, masks)
    say = out.reliability["bad"] * (out.stream_logits["bad"] - fusion.log_prior).std(1)
    assert float(say[1000:].mean()) < 0.8 * float(say[:1000].mean())
    right = (out.logits.argmax(1) == truth).float()
    alone = (out.stream_logits["good"].argmax(1) == truth).float()
    assert float(right[1000:].mean()) > float(alone[1000:].mean()) - 0.03
    assert float(right[:1000].mean()) > float(alone[:1000].mean()) + 0.02


@pytest.mark.parametrize(
    ("strategy", "given_settings", "words"),
    [
        ("hybird", {}, "Did you mean `hybrid`"),
        ("late", {"widht": 3}, "Did you mean `width`"),
        ("late", {"width": 2}, "width"),
        ("hybrid", {"width": 10, "heads": 4}, "no multiple"),
    ],
)
def test_fusion_settings_that_do_not_fit_are_refused(strategy: str, given_settings: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_fusion(strategy, WIDTHS, STEPS, LABELS, given_settings)


def test_a_calibration_is_written_as_it_was_fitted() -> None:
    """A set of streams that has no limits or no map of its own does not get those of all sets together."""
    general = {"mix": {"a": {"b": 0.5}}, "answer_above": {"a": 0.7}, "confidence": ((0.5, 0.4), (0.7, 0.8))}
    subsets = {
        "x": SubsetCalibration(temperature=2.0, mix={}, answer_above={}, confidence=()),
        "y": SubsetCalibration(mix={"b": {}}, confidence=((0.25, 0.5),)),
    }
    fitted = Calibration(**general, subsets=subsets, set_coverage=0.9)
    written = yaml.safe_load(yaml.safe_dump(_plain(fitted)))
    assert msgspec.convert(written, Calibration) == fitted
    assert fitted.at(("x",)).mix == {}
    assert fitted.at(("x",)).confidence == ()
    assert "temperature" not in written  # what is as by default is not written
