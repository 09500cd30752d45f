"""Lanes: one stream's part of the window, in which no step is encoded twice.

A lane holds the tokens of the last N steps. Each step it moves on by one: an encoded token, or a masked place of zeros.
A message that serves two steps (a slow LiDAR's sweep) is encoded once: tokens of encoders without memory are kept by
the messages that they were made of.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Any

import numpy as np

from pipeline.align import Manifest, StreamManifest
from pipeline.encoding import Encoder, Unusable

Array = np.ndarray[Any, Any]
KEPT_TOKENS = 4
"""A slow sensor's message serves a few steps, one after another."""


class Lane:
    """One stream: ``tokens`` f4 [steps, token] and ``mask`` f4 [steps], oldest step first. ``rig`` is the rig's name of
    the stream, None if the rig has none; ``encoded`` counts the encoder's runs on content; ``note`` says in words why
    the newest content could not be used."""

    def __init__(self, rig: str | None, encoder: Encoder, steps: int, token: int) -> None:
        self.rig = rig
        self.tokens, self.mask = np.zeros((steps, token), np.float32), np.zeros(steps, np.float32)
        self.encoded, self.note = 0, ""
        self._encoder = encoder
        self._epoch: int | None = None
        self._kept: OrderedDict[Any, Array] = OrderedDict()

    @property
    def present(self) -> bool:
        """Whether anything in the window is not masked."""
        return bool(self.mask.any())

    def advance(self, manifest: Manifest, content: Any, masked: str | None) -> str | None:
        """Takes a step. ``masked`` says why ``content`` was lost downstream of the aligner, if it was. Returns why the
        step is masked although the aligner had content; None if it is not, or if the aligner had none."""
        stated = None if self.rig is None else manifest.streams.get(self.rig)
        self.note = ""
        if stated is None or stated.verdict in ("late", "missing"):
            self.skip()
            return None
        reason = masked or ("absent" if content is None else None)
        if reason is not None:
            self.skip()
            return reason
        try:
            self._push(self._token(stated, content, manifest))
        except Unusable as error:
            self.note = str(error)
            self._push(None)
            return error.reason
        return None

    def skip(self) -> None:
        """Takes a masked step."""
        if self._epoch is not None:  # before the first content there is no state to move on
            self._encoder.skip()
        self._push(None)

    def clear(self) -> None:
        """Forgets the past: a whole window is missing."""
        self._encoder.reset()
        self.tokens[:], self.mask[:], self._epoch = 0, 0, None

    def _push(self, token: Array | None) -> None:
        self.tokens[:-1] = self.tokens[1:]
        self.mask[:-1] = self.mask[1:]
        self.tokens[-1] = 0 if token is None else token
        self.mask[-1] = token is not None

    def _token(self, stated: StreamManifest, content: Any, manifest: Manifest) -> Array:
        key = stated.used if self._encoder.repeatable else ()
        if key and key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        epoch = max((used[0] for used in stated.used), default=stated.epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._encoder.reset()
        self.encoded += 1
        token = self._encoder.encode(content, manifest.start_ns, manifest.end_ns)
        if key:
            self._kept[key] = token
            if len(self._kept) > KEPT_TOKENS:
                self._kept.popitem(last=False)
        return token


def cross_gap(lanes: Collection[Lane], missing: int, steps: int) -> None:
    """Masks ``missing`` steps that will never come. Beyond a whole window of ``steps`` nothing of the past is left, and
    encoders start anew."""
    for lane in lanes:
        if missing >= steps:
            lane.clear()
            continue
        for _ in range(missing):
            lane.skip()
