"""Where weights come from that are not drawn at random: another bundle's ``weights.npz``, which holds plain arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import BundleError, ConfigError, Together
from pipeline.learn.config import Config, InitEntry, TrainFile, check_config
from pipeline.learn.encoders import StreamEncoder, build_encoder, settings_of
from pipeline.learn.fusion import FusionSettings, build_fusion
from pipeline.learn.model import Model
from pipeline.messages import SignalLayout
from pipeline.modelfile import BundleStream
from pipeline.rules import All, StreamSpec, misfit
from pipeline.strict import Document, listed

WEIGHTS, CONFIG = "weights.npz", "train.yaml"


Shapes = dict[str, tuple[int, ...]]


def check_beginning(
    config: Config, entry: InitEntry, streams: Mapping[str, BundleStream], encoders: Mapping[str, StreamEncoder]
) -> Bundle:
    """The bundle of ``entry``. BundleError if nothing can be taken from it, or if it has another encoder for one of the
    model's ``streams`` than that of ``encoders``. ConfigError if there is no bundle."""
    bundle, wrong = load_bundle(entry.bundle), Together()
    weights = _weights(bundle)
    shared = [name for name in encoders if _part(weights, f"encoders.{name}.")]
    if not shared:
        raise BundleError(
            f"{bundle.path} has encoders for {listed(bundle.streams)}, and the model is of {listed(encoders)}: they "
            "have no stream in common to begin from. Name its streams alike"
        )
    for name in shared:
        if _shapes(_part(weights, f"encoders.{name}.")) != _shapes(encoders[name].state_dict()):
            here = _facts(streams[name], config.file.window.hop_ms, config.file.streams[name].encoder)
            found = _shapes(_part(weights, f"encoders.{name}."))
            wrong.add(BundleError(_other_encoder(bundle, name, here, found)))
        elif words := _other_channels(bundle.streams[name], streams[name]):
            wrong.add(BundleError(
                f"{bundle.path}: its encoder of `{name}` learnt from other channels: the stream here {words}. Record "
                f"it with the same ones, or call it otherwise (`recorded_as: {name}`), and its encoder begins at random"
            ))  # fmt: skip
    return wrong.settled(bundle)


def _other_channels(there: BundleStream, here: BundleStream) -> str:
    """How the channels of a signal differ from those that an encoder learnt from, as far as both are named."""
    if not there.channel_names or not here.channel_names:
        return ""
    learnt = StreamSpec(name="", payload="signal", rule=All(), channel_names=there.channel_names)
    return misfit(learnt, SignalLayout(1, here.channel_names))


def not_taken(config: Config, bundle: Bundle, encoders: Mapping[str, StreamEncoder], labels: tuple[str, ...]) -> str:
    """What of a model with these ``encoders`` and ``labels`` begins at random although it begins from ``bundle``, and
    why, in a sentence; "" if nothing does."""
    weights = _weights(bundle)
    new = [name for name in encoders if not _part(weights, f"encoders.{name}.")]
    said = [f"the encoder of `{name}`" for name in new]
    if why := _other_fusion(config, bundle, _part(weights, "fusion."), encoders, labels):
        said.append(f"the fusion, for {why}")
    return f"what {bundle.path} does not give begins at random: {'; '.join(said)}" if said else ""


def _other_fusion(
    config: Config,
    bundle: Bundle,
    weights: Mapping[str, Any],
    encoders: Mapping[str, StreamEncoder],
    labels: tuple[str, ...],
) -> str:
    """How the fusion of ``bundle`` differs from the model's; "" if it can be taken."""
    file, given = config.file, _stated(bundle)
    tokens = {name: encoder.token for name, encoder in encoders.items()}
    here = _fusion_facts(tokens, labels, file.strategy, file.window.steps, file.fusion)
    tokens = {name: stream.token for name, stream in bundle.streams.items()}
    settings = FusionSettings() if given is None else given.fusion
    there = _fusion_facts(tokens, bundle.labels, bundle.strategy, bundle.window.steps, settings)
    shapes = _shapes(weights)
    if (bundle.labels, *bundle.streams) == (labels, *encoders) and shapes == _fusion_shapes(here):
        return ""
    matter = [key for key in ("streams", "labels") if there[key] != here[key]]  # the order of both is that of weights
    matter += _telling(here, there, _fusion_shapes)
    differ = _differing(here, there, dict.fromkeys(matter))
    return differ if differ and _fusion_shapes(there) == shapes else "it was made by another version"


def _fusion_facts(
    tokens: Mapping[str, int], labels: Sequence[str], strategy: str, steps: int, settings: FusionSettings
) -> dict[str, Any]:
    """Key -> value of all that the shape of a fusion may depend on."""
    stated = {"streams": list(tokens), "labels": list(labels), "strategy": strategy, "window.steps": steps}
    stated |= {f"streams.{name}.token": token for name, token in tokens.items()}
    return stated | {f"fusion.{key}": value for key, value in msgspec.structs.asdict(settings).items()}


def _fusion_shapes(facts: Mapping[str, Any]) -> Shapes | None:
    """The shapes of the fusion that ``facts`` describe; None where there cannot be one."""
    tokens = {name: facts.get(f"streams.{name}.token", 1) for name in facts["streams"]}
    settings = {key.removeprefix("fusion."): value for key, value in facts.items() if key.startswith("fusion.")}
    try:
        fusion = build_fusion(facts["strategy"], tokens, facts["window.steps"], len(facts["labels"]), settings)
    except ConfigError:
        return None
    return _shapes(fusion.state_dict())


def _telling(
    here: Mapping[str, Any], there: Mapping[str, Any], shapes: Callable[[Mapping[str, Any]], Shapes | None]
) -> list[str]:
    """The keys that both have with other values, and of which a shape depends: it becomes another one where the value
    of the other side is put in the place of that key's alone."""
    return [
        key for key, value in there.items() if key in here and value != here[key]
        and (shapes({**here, key: value}) != shapes(here) or shapes({**there, key: here[key]}) != shapes(there))
    ]  # fmt: skip


def _differing(here: Mapping[str, Any], there: Mapping[str, Any], keys: Iterable[str]) -> str:
    return "; ".join(f"`{key}` is {_shown(there[key])} there and {_shown(here[key])} here" for key in keys)


def _other_encoder(bundle: Bundle, name: str, here: Mapping[str, Any], found: Shapes) -> str:
    """How the bundle's encoder of a stream, whose weights have the shapes ``found``, differs from one that is as it is
    said ``here``, and what to do."""
    file = _stated(bundle)
    stated = {} if file is None or name not in file.streams else file.streams[name].encoder
    there = _facts(bundle.streams[name], bundle.window.hop_ns / 1e6, stated)
    same_payload = there["payload"] == here["payload"]  # else nothing else can be compared
    matter = _telling(here, there, _encoder_shapes) if same_payload else ["payload"]
    differ = _differing(here, there, matter) if _encoder_shapes(there) == found else ""
    return (
        f"{bundle.path}: its encoder of `{name}` is another one than the training file describes: "
        f"{differ or 'it was made by another version'}. Training begins from an encoder of the same shape "
        + ("alone: give it these settings, " if differ else "alone: train the bundle anew, ")
        + f"or call the stream otherwise (`recorded_as: {name}`), and its encoder begins at random"
    )


def _facts(stream: BundleStream, hop_ms: float, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of all that the shape of a stream's encoder may depend on."""
    rule = stream.rule
    stated = {
        "window.hop_ms": hop_ms, "payload": stream.payload, "rule.kind": type(rule).__name__.lower(),
        "rule.rate_hz": getattr(rule, "rate_hz", None), "context_ms": stream.context_ms, "channels": stream.channels,
        "token": stream.token,
    }  # fmt: skip
    settings = msgspec.to_builtins(settings_of(stream.payload, encoder))
    return stated | {f"encoder.{key}": value for key, value in settings.items()}


def _encoder_shapes(facts: Mapping[str, Any]) -> Shapes | None:
    """The shapes of the encoder that ``facts`` describe; None where there cannot be one."""
    rate_hz, hop_ms = facts["rule.rate_hz"] or 0.0, facts["window.hop_ms"]
    settings = {key.removeprefix("encoder."): value for key, value in facts.items() if key.startswith("encoder.")}
    try:
        encoder = build_encoder(
            facts["payload"], settings, samples=round(rate_hz * hop_ms / 1000),
            context=round(rate_hz * facts["context_ms"] / 1000), channels=facts["channels"], rate_hz=rate_hz,
            token=facts["token"],
        )  # fmt: skip
    except ConfigError:
        return None
    return _shapes(encoder.state_dict())


def _stated(bundle: Bundle) -> TrainFile | None:
    """The training file in the bundle; None if it has none, or one of a version that had other keys."""
    try:
        return check_config(Document(bundle.files.get(CONFIG, b"").decode(), bundle.path / CONFIG)).file
    except (ConfigError, UnicodeDecodeError):
        return None


def _shown(value: Any) -> str:
    """A value as a training file has it."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _shapes(weights: Mapping[str, Any]) -> Shapes:
    return {key: tuple(value.shape) for key, value in weights.items()}


def begin_from(model: Model, entry: InitEntry, labels: tuple[str, ...]) -> dict[str, str]:
    """Gives ``model`` the encoders of a bundle (see ``check_beginning``) for the streams that both have, and its fusion
    where that fits, too. Returns what was taken, and from which bundle."""
    bundle = load_bundle(entry.bundle)
    weights = _weights(bundle)
    source = f"{bundle.name} {bundle.sha256[:12]}"
    taken = {}
    for name in model.encoders:
        if own := _part(weights, f"encoders.{name}."):
            _load(model.encoder(name), own)
            taken[f"encoder of {name}"] = source + (", frozen" if entry.freeze else "")
    fusion = _part(weights, "fusion.")
    same = bundle.labels == labels and list(bundle.streams) == list(model.encoders)  # whose order is that of weights
    if same and _shapes(fusion) == _shapes(model.fusion.state_dict()):
        _load(model.fusion, fusion)
        taken["fusion"] = source
    if entry.freeze:
        model.freeze([name for name in model.encoders if f"encoder of {name}" in taken])
    return taken


def _weights(bundle: Bundle) -> dict[str, Any]:
    if WEIGHTS not in bundle.files:
        raise BundleError(
            f"{bundle.path} has no {WEIGHTS}, so no training can begin from it; bundles made by `sensorium train` have"
        )
    with np.load(io.BytesIO(bundle.files[WEIGHTS]), allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def _part(weights: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def _load(module: torch.nn.Module, weights: Mapping[str, Any]) -> None:
    module.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in weights.items()})
