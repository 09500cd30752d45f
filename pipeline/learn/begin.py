"""Where weights come from that are not drawn at random: another bundle's ``weights.npz``, which holds plain arrays."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
import torch

from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import BundleError, ConfigError, Together
from pipeline.learn.config import Config, InitEntry, check_config
from pipeline.learn.encoders import StreamEncoder, settings_of
from pipeline.learn.model import Model
from pipeline.messages import SignalLayout
from pipeline.modelfile import BundleStream
from pipeline.rules import All, StreamSpec, misfit
from pipeline.strict import Document, listed

WEIGHTS, CONFIG = "weights.npz", "train.yaml"


def check_beginning(
    config: Config, entry: InitEntry, streams: Mapping[str, BundleStream], encoders: Mapping[str, StreamEncoder]
) -> None:
    """BundleError if nothing can be taken from the bundle of ``entry``, or if it has another encoder for one of the
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
            wrong.add(BundleError(_other_encoder(bundle, name, here)))
        elif words := _other_channels(bundle.streams[name], streams[name]):
            wrong.add(BundleError(
                f"{bundle.path}: its encoder of `{name}` learnt from other channels: the stream here {words}. Record "
                f"it with the same ones, or call it otherwise (`recorded_as: {name}`), and its encoder begins at random"
            ))  # fmt: skip
    wrong.settled(bundle)


def _other_channels(there: BundleStream, here: BundleStream) -> str:
    """How the channels of a signal differ from those that an encoder learnt from, as far as both are named."""
    if not there.channel_names or not here.channel_names:
        return ""
    learnt = StreamSpec(name="", payload="signal", rule=All(), channel_names=there.channel_names)
    return misfit(learnt, SignalLayout(1, here.channel_names))


def _other_encoder(bundle: Bundle, name: str, here: Mapping[str, Any]) -> str:
    """How the bundle's encoder of a stream differs from one that is as it is said ``here``, and what to do."""
    there = _facts(bundle.streams[name], bundle.window.hop_ns / 1e6, _stated_encoder(bundle, name))
    differ = [f"`{key}` is {_shown(value)} there and {_shown(here.get(key))} here" for key, value in there.items()
              if value != here.get(key)]  # fmt: skip
    return (
        f"{bundle.path}: its encoder of `{name}` is another one than the training file describes: "
        f"{'; '.join(differ) or 'it was made by another version'}. Training begins from an encoder of the same shape "
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


def _stated_encoder(bundle: Bundle, name: str) -> Mapping[str, Any]:
    """The settings of a stream's encoder as the training file in the bundle states them."""
    try:
        text = bundle.files.get(CONFIG, b"").decode()
        return check_config(Document(text, bundle.path / CONFIG)).file.streams[name].encoder
    except (ConfigError, KeyError, UnicodeDecodeError):  # of a version that had other keys
        return {}


def _shown(value: Any) -> str:
    """A value as a training file has it."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _shapes(weights: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
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
    if bundle.labels == labels and _shapes(fusion) == _shapes(model.fusion.state_dict()):
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
