"""The speech expert: is there a human voice in the sound?

Silero VAD (MIT licence), the ONNX file inside the package ``silero-vad``, run by ONNX Runtime on one thread. The
package itself is never imported, because importing it needs torch; only its folder is looked up.

The detector hears chunks of 512 samples (32 ms), each with the 64 samples before it, and keeps a recurrent state. A
step is no whole number of chunks, so that the rest of one step's samples waits for the next. Time that was masked
leaves no rest and no context, for a splice of sounds that were not neighbours is a click; the recurrent state lives
through a short gap and is cleared by a longer one. Holes in the grid are heard as silence and counted.

Token, f4 [2]:

0. p_voice: the mean probability of speech over the chunks that this step completed.
1. known: the part of the step's samples that were not holes.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnxruntime as ort

from pipeline.errors import BundleError

Array = np.ndarray[Any, Any]
RATE_HZ, CHUNK, CONTEXT = 16_000, 512, 64
PACKAGE = "silero-vad==6.2.3"
INSTALL = f"pip install --no-deps {PACKAGE}"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``weights_sha256``: the detector that the bundle was made with; another file is refused where it is stated."""

    weights_sha256: str = ""
    reset_after_steps: int = 5
    """This many masked steps in a row clear the recurrent state."""


def find_weights() -> Path:
    """Where the installed package keeps ``silero_vad.onnx``. Raises BundleError."""
    spec = importlib.util.find_spec("silero_vad")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "data" / "silero_vad.onnx"
        if path.is_file():
            return path
    found = "is not installed" if spec is None else "is installed without data/silero_vad.onnx"
    raise BundleError(
        f"the speech expert needs the file silero_vad.onnx of the package silero-vad, which {found}; "
        f"run: {INSTALL}  (without its dependencies, as torch is not needed)"
    )


def _session(weights: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return ort.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


class Speech:
    """See the module's text. Content: the step's grid, f4 [samples, channels] at 16 kHz; channels are averaged."""

    token = 2

    def __init__(self, stream: str, settings: Mapping[str, Any]) -> None:
        self._stream = stream
        try:
            self._settings = msgspec.convert(dict(settings), Settings)
        except msgspec.ValidationError as error:
            raise BundleError(
                f"the speech expert of stream {stream!r} cannot use its settings: {error}; "
                f"allowed are {', '.join(Settings.__struct_fields__)}"
            ) from None
        weights = find_weights().read_bytes()
        digest, wanted = hashlib.sha256(weights).hexdigest(), self._settings.weights_sha256
        if wanted and digest != wanted:
            raise BundleError(
                f"the installed silero_vad.onnx has SHA-256 {digest[:16]}… where the bundle was made with "
                f"{wanted[:16]}…; run: {INSTALL}"
            )
        self._detector = _session(weights)
        self.holes = 0
        """Samples heard as silence because they were holes, since the expert was made."""
        self.reset()

    def reset(self) -> None:
        self._state = np.zeros((2, 1, 128), np.float32)
        self._skipped = 0
        self._last = 0.0
        self._splice()

    def _splice(self) -> None:
        self._context = np.zeros(CONTEXT, np.float32)
        self._rest = np.zeros(0, np.float32)

    def skip(self) -> None:
        self._skipped += 1
        self._splice()
        if self._skipped >= self._settings.reset_after_steps:
            self.reset()

    def encode(self, content: Array, start_ns: int, end_ns: int) -> Array:
        """Raises BundleError when the grid is not one of 16 kHz."""
        if len(content) * 1_000_000_000 != RATE_HZ * (end_ns - start_ns):
            raise BundleError(
                f"the speech expert of stream {self._stream!r} got {len(content)} samples for "
                f"{(end_ns - start_ns) / 1e6:g} ms; its rule must be resample at rate_hz: {RATE_HZ}"
            )
        self._skipped = 0
        mono = np.asarray(content, np.float32).reshape(len(content), -1).mean(axis=1)
        holes = np.isnan(mono)
        missing = int(holes.sum())
        self.holes += missing
        heard = self._hear(np.where(holes, np.float32(0), mono))
        return np.array([heard, 1 - missing / len(mono)], np.float32)

    def _hear(self, samples: Array) -> float:
        waiting = np.concatenate([self._rest, samples])
        whole = len(waiting) // CHUNK * CHUNK
        self._rest = waiting[whole:]
        heard = [self._chunk(waiting[at : at + CHUNK]) for at in range(0, whole, CHUNK)]
        if heard:
            self._last = sum(heard) / len(heard)
        return self._last

    def _chunk(self, chunk: Array) -> float:
        samples = np.concatenate([self._context, chunk])[None]
        feeds = {"input": samples, "state": self._state, "sr": np.array(RATE_HZ, np.int64)}
        probability, self._state = self._detector.run(["output", "stateN"], feeds)
        self._context = chunk[-CONTEXT:]
        return float(probability[0, 0])
