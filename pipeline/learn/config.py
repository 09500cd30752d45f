"""TRAIN.yaml: one file that says which sessions, which window, which streams, and how to learn from them.

The least that it needs is a name, sessions and streams; ``strategy`` is one key. Times are in the unit that a key ends
in, shares are parts of 1. Paths are relative to the file.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from pipeline.errors import ConfigError, Together
from pipeline.learn.encoders import SETTINGS
from pipeline.learn.fusion import FusionSettings
from pipeline.learn.limits import Count, NotNegative, Positive, PositiveFloat, Probability, Share
from pipeline.learn.robust import RobustSettings
from pipeline.messages import Layout, Payload, SignalLayout, payload_of
from pipeline.modelfile import (
    AllEntry,
    BundleStream,
    LatestEntry,
    NearestEntry,
    ResampleEntry,
    StreamEntry,
    WindowEntry,
    stream_of,
)
from pipeline.strict import Document, listed, nearest

Strategy = Literal["early", "late", "hybrid"]
Part = Share | tuple[str, ...]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of TRAIN.yaml."""


class LearnStream(_Strict, frozen=True):
    """One stream. What is left out comes from the sessions (``payload``, ``channels``) or is usual for such a payload
    (``rule``, see ``usual_rule``). ``recorded_as`` is its name in the sessions where that is another. ``token`` is how
    many numbers a step becomes; ``encoder`` are the settings of what makes them."""

    payload: Payload | None = None
    recorded_as: str | None = None
    rule: NearestEntry | LatestEntry | ResampleEntry | AllEntry | None = None
    channels: Positive | None = None
    context_ms: NotNegative = 0.0
    token: Positive = 32
    encoder: dict[str, Any] = {}


class SplitEntry(_Strict, frozen=True):
    """Which sessions are learnt from (the rest), held out (for the calibration, and some of them for the curves) and
    tested on (once, at the end). A part is a share of the groups, or the groups by name; ``by`` is ``session`` or an
    attribute of the sessions, all of whose sessions stay together. Of the draws by ``seed`` the one is taken whose
    parts have the labels most alike."""

    by: str = "session"
    held_out: Part = 0.2
    test: Part = 0.2
    seed: int = 0


class TrainEntry(_Strict, frozen=True):
    """The loop: AdamW with one cycle of the learning rate (up over ``warm_up`` of all steps, then down along a cosine).
    A chunk of ``chunk_steps`` is encoded once and gives all windows that end in it (default: six windows' length);
    ``batch_windows`` are seen between two changes of the weights. ``ema`` is the share that the mean of the weights,
    which is what is exported, keeps at each change. ``stream_loss`` weighs what each stream says by itself;
    ``step_loss`` what each of its steps does, by one linear layer that is thrown away: the shortest way from a label to
    an encoder (deep supervision: Lee et al. 2015), for a cue that others tell more easily."""

    epochs: Positive = 20
    batch_windows: Positive = 256
    chunk_steps: Positive | None = None
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NotNegative = 0.01
    warm_up: Share = 0.15
    ema: Share = 0.98
    label_smoothing: Share = 0.05
    class_weights: Literal["none", "root", "balanced"] = "root"
    clip_norm: PositiveFloat = 2.0
    stream_loss: NotNegative = 0.3
    step_loss: NotNegative = 0.0


class PretrainEntry(_Strict, frozen=True):
    """A phase before, on sessions with or without labels (default: those that are learnt from): tokens of one moment
    are brought together, those of different moments apart."""

    sessions: tuple[str, ...] = ()
    epochs: Positive = 10
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NotNegative = 0.01
    temperature: PositiveFloat = 0.1


class TeachersEntry(_Strict, frozen=True):
    """Distillation (see ``pipeline.learn.teaching``): ``count`` models like the one that is asked for, each from a seed
    of its own, are trained first, for ``epochs`` (default: half of those of ``train``), and the model learns from what
    they say in the mean instead of from labels; ``blend`` is the share of chunks that are blends of two, which takes
    batches of two or more. What weighs labels (``class_weights``, ``label_smoothing``, ``step_loss``), balances or
    draws together (``balance``, ``distil``, ``agree``) is for the teachers; the model itself sees two variations where
    ``agree`` is set. Teachers are pretrained, and begun from another bundle, as the model is. The whole takes some
    ``count`` times as long again; the bundle is no larger and no slower."""

    count: Annotated[int, msgspec.Meta(ge=1, le=32)] = 4
    epochs: Positive | None = None
    blend: Probability = 0.7

    def train(self, entry: TrainEntry) -> TrainEntry:
        """How each of them is trained where the model is by ``entry``."""
        return msgspec.structs.replace(entry, epochs=self.epochs or max(1, entry.epochs // 2))


class CalibrateEntry(_Strict, frozen=True):
    """``coverage`` of the prediction sets; ``wrong``: the share of any class's windows that may get a confident wrong
    answer; ``mistaken``: the share of the windows in which any one answer counts that it may be wrong in. ``mix``:
    whether a linear map of the logits is fitted for each set of streams, instead of a temperature and biases; it has so
    many numbers that it takes a hundred sessions held out, for windows of one session are alike. ``straighten``:
    whether the confidence is then moved to how often it is right, which takes as many. ``sets``: ``exact`` ones hold
    the truth as often as stated and may be empty, in which case the model abstains; those by ``mass`` or ``threshold``
    always hold the most probable label, and so the truth at least as often (see ``pipeline.confidence``)."""

    sets: Literal["exact", "mass", "threshold"] = "exact"
    coverage: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.9
    wrong: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    mistaken: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.1
    mix: bool = False
    straighten: bool = False


class InitEntry(_Strict, frozen=True):
    """Begin with the weights of another trained bundle, as far as its streams are the same; ``freeze`` keeps its
    encoders as they are."""

    bundle: Path
    freeze: bool = False


class TrainFile(_Strict, frozen=True):
    """TRAIN.yaml. ``labels`` (default: all that the sessions have, sorted) fixes their order; windows under one of
    ``ignore_labels`` are not learnt from. ``windows: recorded`` makes windows as the live session made them where a
    session recorded that, so that what was late, partial or missing stays so; ``event_time`` never does.
    ``missing_streams: allow`` takes sessions that lack a stream. ``cache`` holds prepared steps between runs."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
    streams: dict[str, LearnStream]
    sessions: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    ignore_labels: tuple[str, ...] = ()
    window: WindowEntry = WindowEntry(hop_ms=100.0, steps=10)
    strategy: Strategy = "hybrid"
    fusion: FusionSettings = FusionSettings()
    split: SplitEntry = SplitEntry()
    train: TrainEntry = TrainEntry()
    robust: RobustSettings = RobustSettings()
    pretrain: PretrainEntry | None = None
    teachers: TeachersEntry | None = None
    calibration: CalibrateEntry = CalibrateEntry()
    init: InitEntry | None = None
    windows: Literal["recorded", "event_time"] = "recorded"
    missing_streams: Literal["refuse", "allow"] = "refuse"
    seed: Count = 0
    cache: Path | None = None


class Config(msgspec.Struct, frozen=True):
    """A TRAIN.yaml that was read, and the document, which knows the line of every key."""

    file: TrainFile
    document: Document

    def sessions(self, patterns: tuple[str, ...], at: str) -> list[Path]:
        """The files that ``patterns`` mean, sorted, each once. ConfigError for patterns that nothing matches."""
        folder, found, wrong = self.document.folder, dict[Path, None](), Together()
        for pattern in patterns:
            whole = str(folder / Path(pattern).expanduser())
            files = sorted(glob.glob(whole, recursive=True)) if glob.has_magic(whole) else [whole]
            files = [name for name in files if Path(name).is_file()]
            if not files:
                wrong.add(self.document.error((at,), f"`{pattern}` matches no file in {folder}."))
            found |= {Path(name): None for name in files}
        return wrong.settled(list(found))

    def names(self) -> dict[str, str]:
        """Stream -> its name in the sessions."""
        return {name: entry.recorded_as or name for name, entry in self.file.streams.items()}


def training_schema() -> dict[str, Any]:
    """The JSON Schema of a TRAIN.yaml, for editors. ``encoder`` may hold what that of any payload may."""
    (schema, *encoders), defs = msgspec.json.schema_components(
        [TrainFile, *SETTINGS.values()],
        schema_hook=lambda type_: {"type": "string"} if type_ is Path else {},
        ref_template="#/$defs/{name}",
    )
    defs["LearnStream"]["properties"]["encoder"] = {"anyOf": encoders, "default": {}}
    return schema | {"$defs": defs}


def read_config(path: Path | str) -> Config:
    """The TRAIN.yaml at ``path``. Raises ConfigError."""
    return check_config(Document.load(path))


def check_config(document: Document) -> Config:
    """The configuration in ``document``. Raises ConfigError, which says everything that is wrong."""
    file, wrong = document.read(TrainFile)
    if file is None and isinstance(document.value, dict):  # any name will do to see what else is wrong
        file, _ = document.read(TrainFile, value={"streams": {}} | document.value | {"name": "model"})
    if file is None:
        return wrong.settled(None)
    if document.value.get("streams") == {}:
        wrong.add(document.error(("streams",), "a model needs at least one stream, like `imu: {}`."))
    for name, entry in file.streams.items():
        if entry.payload is not None:  # else the sessions tell, later
            with wrong:
                document.decode(SETTINGS[entry.payload], ("streams", name, "encoder"), entry.encoder)
    for key, allowed in (("apart", ("late",)), ("weigh", ("late", "hybrid"))):
        if getattr(file.fusion, key) and file.strategy not in allowed:
            said = f"`{key}` is for {listed(allowed)}, and `strategy` is {file.strategy}; change one of the two."
            wrong.add(document.error(("fusion", key), said))
    if file.fusion.apart and not file.train.stream_loss:
        said = "each stream learns from its `stream_loss` alone with `apart`, which is 0 under `train`; change one."
        wrong.add(document.error(("fusion", "apart"), said))
    both = sorted(set(file.labels or ()) & set(file.ignore_labels))
    if both:
        said = f"{listed(both)} cannot be learnt and ignored; remove one of the two."
        wrong.add(document.error(("ignore_labels",), said))
    return wrong.settled(Config(file, document))


def streams_of(config: Config, layouts: Mapping[str, Layout]) -> dict[str, BundleStream]:
    """The model's streams in the pipeline's terms, and what ``layouts`` (of the sessions' streams, by their names
    there) tell of those that the file does not describe. ConfigError names the key."""
    found, wrong = dict[str, BundleStream](), Together()
    for name, recorded in config.names().items():
        with wrong:
            entry = stream_entry(config, name, layouts.get(recorded), listed(sorted(layouts)))
            at, given = ("streams", name, "encoder"), config.file.streams[name].encoder
            config.document.decode(SETTINGS[entry.payload], at, given)
            found[name] = stream_of(config.document, name, entry, config.file.window)
    return wrong.settled(found)


def stream_entry(config: Config, name: str, layout: Layout | None, known: str = "") -> StreamEntry:
    """The stream ``name`` as model.yaml states it, its encoder's file and token included."""
    given, at = config.file.streams[name], ("streams", name)
    payload = given.payload or (payload_of(layout) if layout is not None else None)
    if payload is None:
        raise config.document.error(
            at,
            f"no session has a stream `{config.names()[name]}`; they have {known or 'none'}. Name it by `recorded_as`, "
            f"or state its `payload`.{nearest(config.names()[name], known.replace('`', '').split(', '))}",
        )
    names = layout.channels if isinstance(layout, SignalLayout) and payload == "signal" else ()
    channels = len(names) if given.channels is None and names else given.channels
    if payload == "signal" and given.rule is None:
        raise config.document.error(
            at,
            "a signal needs its `rule`, like {kind: resample, rate_hz: 50, max_gap_ms: 100}, for its rate is its own.",
        )
    return StreamEntry(
        payload=payload,
        rule=given.rule or usual_rule(payload, config.file.window.hop_ms),
        encoder=f"encoder.{name}.onnx",
        token=given.token,
        channels=channels,
        channel_names=names if len(names) == channels else (),
        context_ms=given.context_ms,
    )


def usual_rule(payload: Payload, hop_ms: float) -> NearestEntry | LatestEntry | ResampleEntry:
    """What a step of such a stream usually holds: the frame nearest to its end, audio at 16 kHz, an IMU at 100 Hz, the
    last sweep of a quarter of a second, the last line of ten."""
    match payload:
        case "frame":
            return NearestEntry(tolerance_ms=max(hop_ms / 2, 20.0))
        case "audio":
            return ResampleEntry(rate_hz=16_000, max_gap_ms=20.0, method="band_limited")
        case "imu" | "signal":
            return ResampleEntry(rate_hz=100, max_gap_ms=50.0)
        case "sweep":
            return LatestEntry(max_age_ms=250.0)
    return LatestEntry(max_age_ms=10_000.0)


def with_overrides(config: Config, **changes: Any) -> Config:
    """``config`` with what the command line says instead; None changes nothing. ConfigError names the option."""
    file = config.file
    epochs = changes.pop("epochs", None)
    if epochs is not None:  # of teachers half as many, then
        teachers = None if file.teachers is None else msgspec.structs.replace(file.teachers, epochs=None)
        train = msgspec.structs.replace(file.train, epochs=epochs)
        file = msgspec.structs.replace(file, train=train, teachers=teachers)
    kept = {key: value for key, value in changes.items() if value is not None}
    for key in kept:
        if key not in TrainFile.__struct_fields__:
            raise ConfigError(f"`{key}` is no key of a training file.")
    return Config(msgspec.structs.replace(file, **kept), config.document)


def beginning_from(config: Config, bundle: Path | None, freeze: bool) -> Config:
    """``config`` with another bundle to begin from, or with its encoders frozen. ConfigError if there is none."""
    given = config.file.init
    if bundle is not None:
        given = InitEntry(bundle=bundle.resolve(), freeze=given is not None and given.freeze)
    if given is None:
        raise ConfigError("--freeze keeps the encoders of another bundle as they are; name one with --init-from.")
    return with_overrides(config, init=msgspec.structs.replace(given, freeze=freeze or given.freeze))
