"""What a model might say: logits and truths with known odds."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.answers import softmax

Array = np.ndarray[Any, Any]


def world(seed: int, n: int, sharp: float = 1.0) -> tuple[Array, Array]:
    """Logits [n, 4] and truths that follow their softmax, once the logits are multiplied by ``sharp``."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 2, (n, 4))
    p = softmax(logits * sharp)
    truth = (p.cumsum(axis=1) < random.random((n, 1))).sum(axis=1)
    return logits, np.minimum(truth, 3)
