"""The schemas are valid JSON Schema, and what the code writes satisfies them."""

from __future__ import annotations

import json

import jsonschema
import msgspec
import pytest

from pipeline.errors import ConfigError
from pipeline.schemas import SCHEMAS, schema
from tests.test_summary import prediction


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_every_schema_is_one(name: str) -> None:
    found = json.loads(json.dumps(schema(name)))
    jsonschema.Draft202012Validator.check_schema(found)
    assert found["title"] == f"Sensorium {name}"


def test_a_prediction_satisfies_its_schema_and_half_of_one_does_not() -> None:
    validator = jsonschema.Draft202012Validator(schema("prediction"))
    line = json.loads(msgspec.json.encode(prediction(label=None, total=3.0)))
    validator.validate(line)
    del line["window"]
    assert not validator.is_valid(line)


def test_an_unknown_schema_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `prediction`\?.*`bundle`"):
        schema("predictions")


@pytest.mark.parametrize(
    ("called", "name"),
    [("rig", "config"), ("Model", "bundle"), ("model.yaml", "bundle"), ("TRAIN.yaml", "training"), ("Info", "info"),
     ("recording", "info"), ("evaluate", "evaluation")],
)  # fmt: skip
def test_a_schema_has_the_names_that_people_give_it(called: str, name: str) -> None:
    assert schema(called) == schema(name)


def test_names_that_are_near_to_those_are_told() -> None:
    with pytest.raises(ConfigError, match=r"no schema `rigs`\. Did you mean `rig`\? There are `prediction`, `config`"):
        schema("rigs")


def test_a_training_file_satisfies_its_schema_and_a_typo_in_an_encoder_does_not() -> None:
    pytest.importorskip("torch", reason="needs the package torch")
    validator = jsonschema.Draft202012Validator(schema("training"))
    file = {
        "name": "cart",
        "sessions": ["sessions/*.mcap"],
        "streams": {"microphone": {}, "imu": {"encoder": {"widths": [16, 32], "statistics": False}}},
        "window": {"hop_ms": 100, "steps": 10},
        "strategy": "late",
        "train": {"epochs": 3},
    }
    validator.validate(file)
    file["streams"]["imu"]["encoder"] = {"width": [16, 32]}
    assert not validator.is_valid(file)
    assert not validator.is_valid(file | {"streams": {"imu": {}}, "sesions": []})
