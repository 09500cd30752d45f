"""Where weights come from that are not drawn at random: another bundle's ``weights.npz``, which holds plain arrays."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import BundleError
from pipeline.learn.config import InitEntry
from pipeline.learn.model import Model
from pipeline.strict import listed

WEIGHTS = "weights.npz"


def begin_from(model: Model, entry: InitEntry, labels: tuple[str, ...]) -> dict[str, str]:
    """Gives ``model`` the encoders of a bundle for the streams that both have, and its fusion where that fits, too.
    Returns what was taken, and from which bundle. BundleError if there is nothing to take, or if an encoder of the same
    name is another one."""
    bundle = load_bundle(entry.bundle)
    weights = _weights(bundle)
    source = f"{bundle.name} {bundle.sha256[:12]}"
    taken = {}
    for name in model.encoders:
        own = {
            key.removeprefix(f"encoders.{name}."): v
            for key, v in weights.items()
            if key.startswith(f"encoders.{name}.")
        }
        if own:
            _load(model.encoder(name), own, f"{bundle.path}: the encoder of `{name}`")
            taken[f"encoder of {name}"] = source + (", frozen" if entry.freeze else "")
    if not taken:
        raise BundleError(
            f"{bundle.path} has encoders for {listed(bundle.streams)}, and the model is of {listed(model.encoders)}: "
            "they have no stream in common to begin from. Name its streams alike"
        )
    fusion = _part(weights, "fusion.")
    shapes = {key: tuple(value.shape) for key, value in model.fusion.state_dict().items()}
    if bundle.labels == labels and {key: value.shape for key, value in fusion.items()} == shapes:
        _load(model.fusion, fusion, f"{bundle.path}: its fusion")
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


def _load(module: torch.nn.Module, weights: Mapping[str, Any], what: str) -> None:
    try:
        module.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in weights.items()})
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise BundleError(
            f"{what} is another one than the training file describes: {why[:300]}. Give it the same settings and token"
        ) from None
