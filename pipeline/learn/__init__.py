"""From labelled sessions to a bundle that runs live: datasets, models, training, export. Needs the extra ``learn``.

``train_bundle`` is the whole way, from a TRAIN.yaml; a program that has sessions of its own calls ``train`` with them
(``Recorded``, ``Made``, or whatever keeps the protocol ``Session``) and ``export``.
"""

from pipeline.learn.config import Config, beginning_from, check_config, read_config, with_overrides
from pipeline.learn.export import Exported, export, say_all, train_bundle
from pipeline.learn.sessions import Made, Recorded, Session
from pipeline.learn.train import Trained, train

__all__ = [
    "Config",
    "Exported",
    "Made",
    "Recorded",
    "Session",
    "Trained",
    "beginning_from",
    "check_config",
    "export",
    "read_config",
    "say_all",
    "train",
    "train_bundle",
    "with_overrides",
]
