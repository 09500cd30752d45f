"""A bundle: the folder of a trained model, read, checked and refused with one clear error.

``model.yaml`` states the window, the streams and what makes tokens of them, the labels, the calibration, and the
SHA-256 of every file that the model is made of. Loading checks all of it against the files: digests, and each ONNX
graph's inputs and outputs against what the declared streams will feed it. What runs later are the bytes that were
checked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline import align
from pipeline.align import AlignSpec, StreamSpec
from pipeline.errors import BundleError, ConfigError, Together, closest, listed, nearest
from pipeline.foreign import SHIPPED, load_experts
from pipeline.messages import Payload
from pipeline.modelfile import (
    MODEL_FILE,
    PYTHON,
    BundleStream,
    Calibration,
    Lineage,
    ModelFile,
    WholeEntry,
    Window,
    read_model,
    to_ns,
)
from pipeline.onnxfile import Dim, Tensor, check_signature, open_session

__all__ = ["SHIPPED", "Bundle", "load_bundle"]


class Bundle(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle that has passed every check. ``sha256`` is that of model.yaml, which holds those of all other files;
    ``files`` the checked bytes; ``experts`` the classes of the streams that are encoded by Python code; ``fusion`` the
    file that makes logits. Where that is a user's ``whole`` model, ``frame_sizes`` are the heights and widths that it
    wants."""

    path: Path
    name: str
    sha256: str
    window: Window
    streams: dict[str, BundleStream]
    fusion: str
    whole: WholeEntry | None
    frame_sizes: dict[str, tuple[int, int]]
    labels: tuple[str, ...]
    strategy: str
    calibration: Calibration
    lineage: Lineage
    files: dict[str, bytes]
    experts: dict[str, type[Any]]

    def align_spec(
        self,
        streams: Mapping[str, str | None] | None = None,
        max_delay_ns: int | None = None,
        *,
        available: Mapping[str, Payload | None] | None = None,
        idle_ns: Mapping[str, int | None] | None = None,
        max_buffer: Mapping[str, int] | None = None,
        unordered: frozenset[str] = frozenset(),
        **limits: Any,
    ) -> AlignSpec:
        """What the aligner must know to make this bundle's windows from a rig's streams.

        ``streams`` maps bundle stream -> rig stream where the names differ; None leaves a stream out on purpose (it is
        then always masked). ``available`` are the rig's streams and payloads, if they are known; None for a payload
        that nobody knows. ``idle_ns``, ``max_buffer`` and ``unordered`` go by rig stream; ``limits`` are further fields
        of AlignSpec. Raises ConfigError, naming both sides, wherever bundle and rig do not fit.
        """
        names = self.rig_streams(streams, available)
        specs = []
        for name, rig in names.items():
            stream, kw = self.streams[name], dict[str, Any]()
            if idle_ns is not None and rig in idle_ns:
                kw["idle_ns"] = idle_ns[rig]
            if max_buffer is not None and rig in max_buffer:
                kw["max_buffer"] = max_buffer[rig]
            kw |= {"channels": stream.channels if stream.samples else 0, "ordered": rig not in unordered}
            kw["channel_names"] = stream.channel_names
            specs.append(StreamSpec(name=rig, payload=stream.payload, rule=stream.rule, **kw))
        return AlignSpec(hop_ns=self.window.hop_ns, streams=tuple(specs), max_delay_ns=max_delay_ns, **limits)

    def rig_streams(
        self, streams: Mapping[str, str | None] | None = None, available: Mapping[str, Payload | None] | None = None
    ) -> dict[str, str]:
        """Bundle stream -> rig stream, without those left out. Raises ConfigError as ``align_spec`` does."""
        mapping, wrong = streams or {}, Together()
        unknown = [name for name in mapping if name not in self.streams]
        for name in unknown:
            wrong.add(ConfigError(
                f"the rig maps a stream `{name}` that the bundle `{self.name}` does not have; it has "
                f"{listed(self.streams)}.{nearest(name, self.streams)}"
            ))  # fmt: skip
        chosen = {name: mapping.get(name, name) for name in self.streams}
        result = {name: rig for name, rig in chosen.items() if rig is not None}
        twice = next((rig for rig in result.values() if list(result.values()).count(rig) > 1), None)
        if twice is not None or not result:
            both = [name for name, rig in result.items() if rig == twice]
            wrong.add(ConfigError(
                f"the rig maps {listed(both)} of the bundle `{self.name}` to the same stream `{twice}`; each needs its "
                "own." if both else f"the rig leaves out every stream of the bundle `{self.name}`; map at least one."
            ))  # fmt: skip
        meant = {closest(name, self.streams) for name in unknown}
        for name in [name for name in result if name not in meant] if available is not None else ():
            with wrong:
                self._check_available(name, result[name], available or {})
        return wrong.settled(result)

    def _check_available(self, name: str, rig: str, available: Mapping[str, Payload | None]) -> None:
        expected = self.streams[name].payload
        if rig not in available:
            raise ConfigError(
                f"the bundle `{self.name}` needs a stream `{name}` ({expected}), but the rig has no `{rig}`; it has "
                f"{listed(available)}.{nearest(rig, available)} Map it (`streams: {{{name}: …}}`), or leave it out "
                f"(`streams: {{{name}: null}}`) and it stays masked."
            )
        if available[rig] not in (expected, None):
            raise ConfigError(
                f"the bundle `{self.name}` needs {expected} on its stream `{name}`, but the rig's `{rig}` carries "
                f"{available[rig]}. Map another stream to it."
            )


def load_bundle(path: Path | str, allow_code: bool = False) -> Bundle:
    """The bundle in the folder ``path``, checked throughout. Raises BundleError; ConfigError if there is none."""
    folder = Path(path).expanduser().resolve()
    file = folder / MODEL_FILE
    if not file.is_file():
        if folder.is_file():
            meant = f" Name its folder {folder.parent}." if folder.name == MODEL_FILE else ""
            raise ConfigError(f"{path} is a file, and a bundle is a folder with a file {MODEL_FILE}.{meant}")
        names = [p.parent.name for p in SHIPPED.glob(f"*/{MODEL_FILE}")]
        raise ConfigError(
            f"{path}: here is no bundle, which is a folder with a file {MODEL_FILE}.{nearest(folder.name, names)} "
            f"Shipped are {listed(f'models/{name}' for name in sorted(names)) or 'none'}."
        )
    model, streams, text = read_model(file)
    files = _read_files(folder, model)
    bundle = Bundle(
        path=folder, name=model.name, sha256=hashlib.sha256(text.encode()).hexdigest(),
        window=Window(to_ns(model.window.hop_ms), model.window.steps), streams=streams, fusion=_fusion_file(model),
        whole=model.model, frame_sizes={}, labels=model.labels, strategy=model.strategy,
        calibration=model.calibration, lineage=model.lineage, files=files,
        experts=load_experts(folder, streams, files, allow_code),
    )  # fmt: skip
    if bundle.whole is not None:
        return _check_whole(bundle, bundle.whole)
    for name, stream in streams.items():
        if not stream.is_python:
            _check_encoder(bundle, name, stream)
    _check_fusion(bundle)
    return bundle


def _fusion_file(model: ModelFile) -> str:
    return model.model.file if model.model is not None else model.fusion or ""


def _read_files(folder: Path, model: ModelFile) -> dict[str, bytes]:
    """The files of the lineage, each with its digest checked; all that the model uses must be among them."""
    encoders = [s.encoder for s in model.streams.values() if s.encoder and not s.encoder.startswith(PYTHON)]
    used = [*encoders, _fusion_file(model)]
    for name in used:
        if name not in model.lineage.files:
            file = folder / name
            write = f" Add the line `{name}: {_sha256(file)}` to it." if file.is_file() else ""
            raise BundleError(
                f"{folder / MODEL_FILE}, lineage.files: the model uses `{name}`, whose SHA-256 is not listed; listed "
                f"are {listed(model.lineage.files) or 'none'}.{nearest(name, model.lineage.files) or write}"
            )
    return {name: _read_file(folder, name, digest) for name, digest in model.lineage.files.items()}


def _sha256(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return "…"


def _read_file(folder: Path, name: str, digest: str) -> bytes:
    file = folder / name
    if not file.resolve().is_relative_to(folder):
        raise BundleError(f"{folder / MODEL_FILE}, lineage.files: `{name}` lies outside of the bundle; move it inside.")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{file}: model.yaml lists this file, but it cannot be read ({error.strerror or error}). Copy the whole "
            "bundle again."
        ) from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise BundleError(
            f"{file}: this file is not the one that the bundle was made with: its SHA-256 is {found}, model.yaml says "
            f"{digest}. Copy the bundle again; if you changed the file on purpose, write its digest into "
            "model.yaml under lineage.files."
        )
    return data


def encoder_input(stream: BundleStream) -> Tensor:
    """What an ONNX encoder of ``stream`` is fed with under the name ``x``."""
    if stream.samples:
        return Tensor("f4", (stream.context + stream.samples, stream.channels))
    shapes: dict[Payload, tuple[Dim, ...]] = {
        "frame": ("?", "?", 3), "sweep": ("*", 5), "text": ("*",), "audio": ("*", stream.channels),
        "imu": ("*", stream.channels), "signal": ("*", stream.channels),
    }  # fmt: skip
    return Tensor("u1" if stream.payload in ("frame", "text") else "f4", shapes[stream.payload])


def _check_encoder(bundle: Bundle, name: str, stream: BundleStream) -> None:
    where = str(bundle.path / stream.encoder)
    if stream.payload == "frame" and isinstance(stream.rule, align.All):
        raise BundleError(f"{where}: the rule `all` on frames `{name}` needs a `python:` encoder; use `nearest`.")
    session = open_session(bundle.files[stream.encoder], where, optimise=False)
    inputs, outputs = {"x": encoder_input(stream)}, {"token": Tensor("f4", (stream.token,))}
    states = [t for t in session.get_inputs() if t.name == "state"]
    if stream.samples:
        inputs["valid"] = Tensor("f4", (stream.context + stream.samples,))
    elif states:
        raise BundleError(
            f"{where}: a model with `state` must run through masked steps too, which only a resampled stream defines; "
            f"`{name}` is {stream.payload}. Make it a `python:` encoder."
        )
    if states:
        shape = tuple(states[0].shape)
        if not all(isinstance(d, int) for d in shape):
            raise BundleError(f"{where}: its input `state` has the shape {list(shape)}; it must be fixed.")
        inputs["state"] = outputs["state_out"] = Tensor("f4", shape)
    check_signature(session, where, inputs, outputs, optional=("valid",))


def _check_fusion(bundle: Bundle) -> None:
    where, steps = str(bundle.path / bundle.fusion), bundle.window.steps
    inputs = {name: Tensor("f4", ("*", steps, stream.token)) for name, stream in bundle.streams.items()}
    inputs |= {f"mask.{name}": Tensor("f4", ("*", steps)) for name in bundle.streams}
    session = open_session(bundle.files[bundle.fusion], where, optimise=False)
    check_signature(session, where, inputs, {"logits": Tensor("f4", ("?", len(bundle.labels)))})


def _check_whole(bundle: Bundle, whole: WholeEntry) -> Bundle:
    """The bundle with the sizes of pictures that its model wants."""
    where = str(bundle.path / whole.file)
    session = open_session(bundle.files[whole.file], where, optimise=False)
    shapes = {t.name: list(t.shape) for t in session.get_inputs()}
    sizes: dict[str, tuple[int, int]] = {}
    inputs: dict[str, Tensor] = {}
    for name, given in whole.inputs.items():
        stream = bundle.streams[given.stream]
        length = stream.samples * bundle.window.steps
        if stream.samples:
            order: tuple[Dim, ...] = (length, stream.channels) if given.layout == "btc" else (stream.channels, length)
        else:
            order = ("?", "?", 3) if given.layout == "bhwc" else (3, "?", "?")
            size = (shapes.get(name, [])[1:3] if given.layout == "bhwc" else shapes.get(name, [])[2:4]) or [0, 0]
            if name in shapes and not all(isinstance(d, int) for d in size):
                raise BundleError(f"{where}: its input `{name}` is {shapes[name]}; height and width must be fixed.")
            sizes[given.stream] = (size[0], size[1])
        batch: Dim = 1 if shapes.get(name, [None])[0] == 1 else "*"
        inputs[name] = Tensor("f4", (batch, *order))
    output = whole.output or session.get_outputs()[0].name
    check_signature(session, where, inputs, {output: Tensor("f4", ("?", len(bundle.labels)))})
    streams = {
        name: msgspec.structs.replace(stream, token=sizes[name][0] * sizes[name][1] * 3) if name in sizes else stream
        for name, stream in bundle.streams.items()
    }
    return msgspec.structs.replace(bundle, streams=streams, frame_sizes=sizes)
