"""model.yaml: what its author may write, read strictly, and the same in the pipeline's own terms."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec

from pipeline import align
from pipeline.errors import BundleError, ConfigError, Together, joined
from pipeline.messages import Payload
from pipeline.strict import Document, listed, nearest

PYTHON = "python:"
MODEL_FILE = "model.yaml"

Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of model.yaml."""


class WindowEntry(_Strict, frozen=True):
    """Time is cut into hops of ``hop_ms``; the model sees the last ``steps`` of them."""

    hop_ms: Annotated[float, msgspec.Meta(ge=1, le=3_600_000)]
    steps: Annotated[int, msgspec.Meta(ge=1, le=100_000)]


class NearestEntry(_Strict, frozen=True, tag_field="kind", tag="nearest"):
    """``align.Nearest``."""

    tolerance_ms: PositiveFloat


class LatestEntry(_Strict, frozen=True, tag_field="kind", tag="latest"):
    """``align.Latest``."""

    max_age_ms: PositiveFloat


class ResampleEntry(_Strict, frozen=True, tag_field="kind", tag="resample"):
    """``align.Resample``."""

    rate_hz: Positive
    max_gap_ms: PositiveFloat
    method: Literal["linear", "band_limited"] = "linear"


class AllEntry(_Strict, frozen=True, tag_field="kind", tag="all"):
    """``align.All``."""


class StreamEntry(_Strict, frozen=True):
    """One stream: what it carries, what a step of it holds, and what turns that into a token of ``token`` numbers.
    ``channel_names`` are those of a signal, in the order in which the model takes them: a stream whose channels are
    called otherwise is not taken for it; left out, any of their number are. ``context_ms`` of past samples are put
    before a step's own (resampled streams only). A bundle with a ``model`` of whole windows has no encoders."""

    payload: Payload
    rule: NearestEntry | LatestEntry | ResampleEntry | AllEntry
    encoder: str | None = None
    token: Positive | None = None
    channels: Positive | None = None
    channel_names: tuple[str, ...] = ()
    context_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    settings: dict[str, Any] = {}


class WholeInput(_Strict, frozen=True):
    """What one input of a whole-window model is fed with, f4. ``btc`` and ``bct``: the samples of a resampled stream,
    [batch, time, channel] or [batch, channel, time], audio in [-1, 1). ``bhwc`` and ``bchw``: the window's newest
    picture of a camera, resized to the input's fixed height and width, 0 to 255 times ``scale``."""

    stream: str
    layout: Literal["btc", "bct", "bhwc", "bchw"]
    scale: PositiveFloat = 1.0
    color: Literal["rgb", "bgr"] = "rgb"


class WholeEntry(_Strict, frozen=True):
    """A user's own ONNX model of whole windows: which stream each input takes, and what its output (the first unless
    named) gives for the labels. What is missing or masked is zeros to it."""

    file: str
    inputs: dict[str, WholeInput]
    output: str = ""
    gives: Literal["logits", "probabilities"] = "logits"


class SubsetCalibration(_Strict, frozen=True, omit_defaults=True):
    """What differs from the general calibration when exactly one set of streams has something in the window; the fields
    are those of ``Calibration``, and what is not stated is as there."""

    temperature: PositiveFloat | None = None
    bias: dict[str, float] | None = None
    mix: dict[str, dict[str, float]] | None = None
    confidence: tuple[tuple[Share, Share], ...] | None = None
    abstain_below: Share | None = None
    answer_above: dict[str, Share] | None = None
    set_threshold: Share | None = None
    set_mass: Share | None = None


class Calibration(_Strict, frozen=True, omit_defaults=True):
    """From held-out data: logits are divided by ``temperature``, and the ``bias`` of their label is added, where one is
    stated, and from ``mix`` (label -> label -> weight) so many times the logits of those labels, each less the mean
    of all. Then the greatest of the probabilities, which is the confidence, is moved along the line through (0, 0),
    the points ``confidence`` (what it is, how often it is right) and (1, 1), though not to where another label would
    have more, and the others share in proportion what is left. Below a confidence of ``abstain_below`` the model
    abstains, and so it does when its answer is a label in ``answer_above`` and its confidence not above what stands
    there (1: it never answers with that label). The prediction set is the most probable label, those of at least
    ``set_threshold``, and those before which the more probable ones have together no more than ``set_mass``; one of
    the two is measured, so that the set holds the truth in a share ``set_coverage`` of cases. A mass adapts better
    where streams may be missing: sets then grow with every label that becomes possible, even if each of them is
    improbable. With ``set_may_be_empty`` the most probable label is no exception: where it has less than
    ``set_threshold`` the set is empty, and the model abstains.

    A model that lacks a sensor is wrong in its own way, so ``subsets`` may state all of it anew for each set of streams
    that may be left. Its keys are the names of the streams that are there, sorted and joined by ``+``
    (``camera+imu``)."""

    temperature: PositiveFloat = 1.0
    bias: dict[str, float] = {}
    mix: dict[str, dict[str, float]] = {}
    confidence: tuple[tuple[Share, Share], ...] = ()
    abstain_below: Share = 0.0
    answer_above: dict[str, Share] = {}
    set_threshold: Share = 1.0
    set_mass: Share = 0.0
    set_coverage: Share | None = None
    set_may_be_empty: bool = False
    subsets: dict[str, SubsetCalibration] = {}

    def at(self, streams: Iterable[str]) -> Calibration:
        """What holds when just ``streams`` have something in the window."""
        own = self.subsets.get(subset_key(streams))
        stated = {} if own is None else {k: v for k, v in msgspec.structs.asdict(own).items() if v is not None}
        return msgspec.structs.replace(self, subsets={}, **stated)


def subset_key(streams: Iterable[str]) -> str:
    """The key of a set of streams in ``Calibration.subsets``."""
    return "+".join(sorted(streams))


class Lineage(_Strict, frozen=True):
    """Where the model comes from: SHA-256 of its files and of the recordings that were there when it was made, by name.
    Of these, it was calibrated on those ``held_out`` and tested on those ``tested``, and trained on the rest. ``card``
    is the file that describes it in words."""

    files: dict[str, Sha256]
    recordings: dict[str, Sha256] = {}
    held_out: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    card: str = ""


class ModelFile(_Strict, frozen=True):
    """model.yaml."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, examples=["rover-2"])]
    window: WindowEntry
    streams: dict[str, StreamEntry]
    labels: tuple[str, ...]
    lineage: Lineage
    fusion: str | None = None
    model: WholeEntry | None = None
    strategy: Literal["early", "late", "hybrid"] = "late"
    calibration: Calibration = Calibration()


class Window(msgspec.Struct, frozen=True):
    """Hop in ns, and how many of them a window has."""

    hop_ns: int
    steps: int


class BundleStream(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a bundle, in the pipeline's own terms. For a resampled stream a step is a grid
    [samples, channels], and an encoder sees ``context`` samples before it. ``encoder`` is empty, and ``token`` as long
    as the step's content, for a model of whole windows."""

    payload: Payload
    rule: align.Rule
    channels: int
    encoder: str
    settings: dict[str, Any]
    context_ms: float
    token: int
    samples: int = 0
    context: int = 0
    channel_names: tuple[str, ...] = ()

    @property
    def is_python(self) -> bool:
        return self.encoder.startswith(PYTHON)


def read_model(file: Path) -> tuple[ModelFile, dict[str, BundleStream], str]:
    """What ``file`` says, its streams in the pipeline's terms, and its text. Raises BundleError."""
    try:
        document = Document.load(file)
        model, wrong = document.read(ModelFile)
        known, unsure = (model, frozenset[str]()) if model is not None and not wrong.found else _readable(document)
        streams = {}
        for name, entry in known.streams.items():
            with wrong:
                streams[name] = stream_of(document, name, entry, known.window)
        _check_model(document, known, unsure, wrong)
        return wrong.settled(model), streams, document.text
    except ConfigError as error:
        raise joined([BundleError(str(part)) for part in error.parts]) from None


def _readable(document: Document) -> tuple[ModelFile, frozenset[str]]:
    """What can be read of a model.yaml in spite of what is wrong, with something that is never wrong where it is, and
    the keys of which nothing can be said, because they, or something in them, may be meant otherwise."""
    given = document.value if isinstance(document.value, dict) else {}
    found: dict[str, Any] = {"name": "model", "window": WindowEntry(hop_ms=1000.0, steps=1), "streams": {},
                             "labels": ("a", "b"), "lineage": Lineage(files={})}  # fmt: skip
    types, unsure = get_type_hints(ModelFile, include_extras=True), {key for key in found if key not in given}
    for key in types.keys() & given.keys():
        value, wrong = document.read(types[key], (key,))
        if wrong.found:
            unsure.add(key)
        if value is not None and (key == "calibration" or not wrong.found):
            found[key] = value
    streams = given.get("streams")
    for name in streams if isinstance(streams, dict) else ():
        entry, wrong = document.read(StreamEntry, ("streams", name))
        if entry is not None and not wrong.found:
            found["streams"] = found["streams"] | {name: entry}
    if not given or given.keys() - types.keys():  # one of which may be meant to be either
        unsure |= {"fusion", "model"}
    return ModelFile(**found), frozenset(unsure)


def to_ns(ms: float) -> int:
    return round(ms * 1_000_000)


def _rule(entry: NearestEntry | LatestEntry | ResampleEntry | AllEntry) -> align.Rule:
    match entry:
        case NearestEntry():
            return align.Nearest(to_ns(entry.tolerance_ms))
        case LatestEntry():
            return align.Latest(to_ns(entry.max_age_ms))
        case ResampleEntry():
            return align.Resample(entry.rate_hz, to_ns(entry.max_gap_ms), entry.method)
    return align.All()


def stream_of(document: Document, name: str, entry: StreamEntry, window: WindowEntry) -> BundleStream:
    """The stream ``name`` of ``document`` in the pipeline's terms. Raises ConfigError."""
    at, hop_ns = ("streams", name), to_ns(window.hop_ms)
    samples = context = 0
    if isinstance(entry.rule, ResampleEntry):
        if entry.payload not in ("audio", "imu", "signal"):
            raise document.error((*at, "rule"), f"a {entry.payload} cannot be resampled; use `nearest` or `latest`.")
        if entry.rule.method == "band_limited" and entry.payload != "audio":
            raise document.error((*at, "rule"), "`method: band_limited` is for audio; use `linear`.")
        rate = entry.rule.rate_hz
        if rate * hop_ns % 1_000_000_000:
            fitting = max(1, round(rate * hop_ns / 1e9)) * 1000 / rate
            raise document.error(
                ("window", "hop_ms"),
                f"{window.hop_ms:g} ms of `{name}` at {rate} Hz are no whole number of samples; the nearest hop that "
                f"fits is {fitting:.9g} ms.",
            )
        samples = rate * hop_ns // 1_000_000_000
        context = round(entry.context_ms * rate / 1000)
    elif entry.context_ms:
        raise document.error((*at, "context_ms"), "only a resampled stream can have context; remove it.")
    if entry.settings and not (entry.encoder or "").startswith(PYTHON):
        raise document.error((*at, "settings"), "only a `python:` encoder takes settings; remove them.")
    channels = _channels(document, name, entry)
    _check_channel_names(document, at, entry)
    return BundleStream(
        payload=entry.payload, rule=_rule(entry.rule), channels=channels, encoder=entry.encoder or "",
        settings=entry.settings, context_ms=entry.context_ms, token=entry.token or samples * channels, samples=samples,
        context=context, channel_names=entry.channel_names,
    )  # fmt: skip


def _channels(document: Document, name: str, entry: StreamEntry) -> int:
    """Columns of a sample: 6 for an IMU, 1 for audio unless stated, for a signal as stated; 0 for the rest."""
    at, stated = ("streams", name), entry.channels
    fixed = {"audio": None, "signal": None, "imu": 6}.get(entry.payload, 0)
    if fixed is not None:
        if stated is not None and stated != fixed:
            raise document.error(
                (*at, "channels"), f"found {stated}, but {entry.payload} has {fixed or 'none'}; remove the key."
            )
        return fixed
    if entry.payload == "signal" and stated is None:
        raise document.error(at, "the key `channels` is missing; a signal needs its number of channels.")
    return stated or 1


def _check_channel_names(document: Document, at: tuple[str, ...], entry: StreamEntry) -> None:
    names = entry.channel_names
    if names and entry.payload != "signal":
        raise document.error((*at, "channel_names"), f"{entry.payload} has none; remove the key.")
    if names and len(names) != entry.channels:
        raise document.error((*at, "channel_names"), f"found {len(names)} for {entry.channels} channels; name each.")


def _check_kind(document: Document, model: ModelFile, wrong: Together) -> None:
    """Either encoders and a fusion, or one model of whole windows."""
    if (model.fusion is None) is (model.model is None):
        said = "a bundle has either `fusion` and an encoder a stream, or a `model` of whole windows."
        wrong.add(document.error((), said))
        return
    for name, entry in model.streams.items():
        for key in ("encoder", "token"):
            if (getattr(entry, key) is None) is (model.model is None):
                what = f"the key `{key}` is missing" if model.model is None else f"`{key}` has no place beside `model`"
                wrong.add(document.error(("streams", name), f"{what}: tokens are for a bundle with `fusion`."))
        if model.model is not None and entry.context_ms:
            said = "a `model` sees the whole window; remove the key."
            wrong.add(document.error(("streams", name, "context_ms"), said))


def _check_inputs(document: Document, model: ModelFile, whole: WholeEntry, names: Collection[str]) -> None:
    """The inputs of a model of whole windows against the streams ``names``, of which those are ``model.streams`` that
    nothing is wrong with."""
    fed, wrong = sorted(given.stream for given in whole.inputs.values()), Together()
    if fed != sorted(names):
        raise document.error(
            ("model", "inputs"),
            f"the inputs take the streams {listed(fed) or 'none'}, but `streams` has {listed(sorted(names))}; "
            "each needs one input.",
        )
    for name, given in whole.inputs.items():
        entry = model.streams.get(given.stream)
        if entry is None:
            continue
        kind = "btc" if isinstance(entry.rule, ResampleEntry) else "bhwc" if entry.payload == "frame" else ""
        if sorted(given.layout) != sorted(kind):
            allowed = {"btc": "`btc` or `bct`", "bhwc": "`bhwc` or `bchw`", "": "an encoder and a `fusion`"}[kind]
            wrong.add(document.error(
                ("model", "inputs", name, "layout"),
                f"found `{given.layout}`, but `{given.stream}` is {entry.payload}, with the rule "
                f"`{entry.rule.__struct_config__.tag}`; that needs {allowed}.",
            ))  # fmt: skip
    wrong.settled(whole)


def _check_model(document: Document, model: ModelFile, unsure: Collection[str], wrong: Together) -> None:
    """Notes what the types alone do not say; nothing of the keys that are ``unsure``, nor of streams that could not be
    read."""
    written = document.value.get("streams") if isinstance(document.value, dict) else None
    names: Collection[str] | None = written if isinstance(written, dict) else None
    if names is not None and not names:
        wrong.add(document.error(("streams",), "a bundle needs at least one stream."))
    if not {"fusion", "model"} & set(unsure):
        _check_kind(document, model, wrong)
        if model.model is not None and model.fusion is None and names is not None:
            with wrong:
                _check_inputs(document, model, model.model, names)
    for name in names or ():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name):
            wrong.add(document.error(
                ("streams", name), f"`{name}` cannot name a stream: use up to 32 lower-case letters, digits and _."
            ))  # fmt: skip
    if len(model.labels) < 2 or len(set(model.labels)) < len(model.labels):
        said = f"found {listed(model.labels)}; a model needs two or more different labels."
        wrong.add(document.error(("labels",), said))
    calibration, doubtful = model.calibration, "calibration" in unsure
    if (calibration.set_coverage is not None and calibration.set_threshold == 1.0 and calibration.set_mass == 0.0
            and not doubtful):  # fmt: skip
        wrong.add(document.error(
            ("calibration", "set_coverage"),
            "a coverage needs the `set_threshold` or the `set_mass` that it was measured with.",
        ))  # fmt: skip
    _check_calibration(document, calibration, names, None if "labels" in unsure else model.labels, wrong)


def _check_calibration(
    document: Document, calibration: Calibration, streams: Collection[str] | None, labels: Collection[str] | None,
    wrong: Together,
) -> None:  # fmt: skip
    """Every subset is one of the bundle's streams, written as it is looked up; every label is one of the bundle's. None
    where these are not known."""
    at: tuple[str, ...] = ("calibration",)
    _check_fitted(document, labels, at, calibration, wrong)
    for key, own in calibration.subsets.items():
        where = (*at, "subsets", key)
        names = key.split("+")
        unknown = next((name for name in names if streams is not None and name not in streams), None)
        if unknown is not None and streams is not None:
            wrong.add(document.error(
                where,
                f"`{unknown}` is no stream of this bundle, which has {listed(streams)}; a subset is written as "
                f"the names of its streams, sorted and joined by +.{nearest(unknown, streams)}",
            ))  # fmt: skip
        elif key != subset_key(set(names)):
            said = f"write this subset as `{subset_key(set(names))}`: sorted, each name once."
            wrong.add(document.error(where, said))
        _check_fitted(document, labels, where, own, wrong)


def _check_fitted(
    document: Document, labels: Collection[str] | None, at: tuple[str, ...], stated: Calibration | SubsetCalibration,
    wrong: Together,
) -> None:  # fmt: skip
    points = ((0.0, 0.0), *(stated.confidence or ()), (1.0, 1.0))
    if not all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(points)):
        said = "both numbers of each point have to be more than those before, and between 0 and 1."
        wrong.add(document.error((*at, "confidence"), said))
    mix = stated.mix or {}
    named = [(key, label) for key, by in (("bias", stated.bias), ("answer_above", stated.answer_above), ("mix", mix))
             for label in by or {}]  # fmt: skip
    for where in [*named, *(("mix", one, other) for one, row in mix.items() for other in row)]:
        label = where[-1]
        if labels is not None and label not in labels:
            wrong.add(document.error(
                (*at, *where),
                f"`{label}` is no label of this bundle, which has {listed(labels)}.{nearest(label, labels)}",
            ))  # fmt: skip
