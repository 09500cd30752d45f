"""Rigs are read strictly, and what is refused says where, what and what instead."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    AlignEntry,
    RecordEntry,
    Rig,
    RigFile,
    check_environment,
    check_rig,
    config_schema,
    load_rig,
    load_yaml,
    long_times,
)
from pipeline.errors import ConfigError
from pipeline.strict import Document, dotted

RIG = "name: demo\nsources:\n  camera: {kind: synthetic, rate_hz: 30}\n"


def rig(text: str) -> RigFile:
    return check_rig(Document(text, "rig.yaml"))


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        rig(text)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_small_rig_has_the_documented_defaults() -> None:
    read = rig(RIG).rig
    assert read.sources["camera"].kind == "synthetic"
    assert read.sources["camera"].settings == {"rate_hz": 30}
    assert not read.sources["camera"].required
    assert (read.align.max_delay_ms, read.align.max_future_ms, read.align.idle_ms) == (250, 100, 1000)
    assert read.bundle is None
    assert read.record is None


# What is wrong in a rig, the line that has to be named, and words that the error must contain.
REFUSED: list[tuple[str, int | None, tuple[str, ...]]] = [
    (RIG + "algin: {}\n", 4, ("`algin`", "Did you mean `align`?", "`fusion`")),
    (RIG + "align: {max_dela_ms: 250}\n", 4, ("align.max_dela_ms", "`max_delay_ms`?")),
    (RIG + "align: {max_delay_s: 0.25}\n", 4, ("The key is `max_delay_ms`", "`max_delay_ms: 250`")),
    (RIG + "align: {ms: 5}\n", 4, ("`ms` is no key here. Allowed",)),
    (RIG + "align: {max_delay_us: 500}\n", 4, ("`max_delay_ms: 0.5`",)),
    (RIG + "align: {max_delay: 250}\n", 4, ("Units stand in the names", "`max_delay_ms`")),
    (RIG + "align: {max_delay_ms: 0.25}\n", 4, ("0.25 (a number)", "The unit is milliseconds: 0.25 s is 250.")),
    (RIG + "align: {max_delay_ms: 250ms}\n", 4, ("'250ms' (text)", "a whole number", "number alone: 250")),
    (RIG + "align: {max_delay_ms: 0.25s}\n", 4, ("'0.25s' (text)", "number alone, in ms: 250.")),
    (RIG + "align: {max_delay_ms: 5 hz}\n", 4, ("'5 hz' (text)", "write the number alone, in ms.")),
    (RIG + "align: {max_delay_ms: '250'}\n", 4, ("'250' (text)", "without quotes: 250")),
    (RIG + "align:\n  streams:\n    lidar: {idle_s: 2}\n", 6, ("align.streams.lidar.idle_s", "`idle_ms: 2000`")),
    (RIG + "restart: {limit: -1}\n", 4, ("restart.limit", "at least 0")),
    (RIG + "restart: {limit: 1.5}\n", 4, ("1.5 (a number)", "a whole number")),
    (RIG + "restart: {window_s: .nan}\n", 4, ("restart.window_s", "more than 0")),
    (RIG + "record: {path: a, compression: zip}\n", 4, ("'zip'", "`zstd`, `lz4`, `none`")),
    (RIG + "record: {path: a, streams: [camera, 1]}\n", 4, ("record.streams[1]", "1 (a whole number)", "text")),
    (RIG + "record: {}\n", 4, ("`path` is missing", "needs text")),
    (RIG + "bundle: {path: 5}\n", 4, ("bundle.path: found 5 (a whole number)", 'a number; write "5" if you mean text')),
    (RIG + "bundle: {path: no}\n", 4, ("bundle.path", 'YAML reads no without quotes as false; write "no"')),
    (RIG + "name: again\n", 4, ("`name` stands here twice", "line 1")),
    (RIG + "align:\n\tmax_delay_ms: 1\n", 5, ("tab",)),
    (RIG + "align: [max_delay_ms\n", 5, ("no valid YAML",)),
    (RIG + "align:\t{max_delay_ms:\t1}\n", 4, ("a tab stands here",)),
    (RIG + "record: {path: {{time}}}\n", 4, ("a list or a mapping stands where a key must be",)),
    (RIG + "? [a, b]\n: 3\n", 4, ("put what has braces or brackets of its own in quotes",)),
    (RIG + "---\nname: b\n", 4, ("a second document begins here",)),
    (f"name: {'[' * 3000}{']' * 3000}\n", None, ("nested too deeply",)),
    (RIG + "align: 3\n", 4, ("a mapping with the keys", "`max_delay_ms`")),
    (RIG + "bundle: models/demo\n", 4, ("`allow_code`. Write it out: `bundle: {path: models/demo}`.",)),
    (RIG + "  imu: synthetic\n", 4, ("`offset_uncertainty_ms`. Write it out: `imu: {kind: synthetic}`.",)),
    (RIG + "transport: {predictions: 'tcp://0.0.0.0:5599'}\n", 4, ("loopback", "tcp://127.0.0.1:5599")),
    (RIG + "transport: {predictions: 'tcp://127.0.0.1:99999'}\n", 4, ("99999 is no port", "from 1 to 65535")),
    (RIG + "transport: {predictions: 'tcp://127.0.0.1:0'}\n", 4, ("0 is no port",)),
    (RIG + "transport: {predictions: 5599}\n", 4, ("expected text. Write `predictions: tcp://127.0.0.1:5599`.",)),
    (RIG + "transport: {predictions: no}\n", 4, ("YAML reads no without quotes as false",)),
    (RIG + "transport: {predictions: }\n", 4, ("found nothing, expected text.",)),
    (RIG + "fusion: {providers: cpu}\n", 4, ("fusion.providers", "a list")),
    ("name: demo\nsources:\n  no: {kind: synthetic}\n", 3, ("a key must be text", '"no"')),
    ("name: demo\nsources:\n  camera:\n    rate_hz: 3\n", 3, ("sources.camera", "`kind` is missing")),
    ("name: demo\nsources:\n  camera: {kind: synthetic, required: 'yes'}\n", 3, ("'yes' (text)", "true or false")),
    ("name: demo\nsources:\n  Camera: {kind: synthetic}\n", 3, ("cannot name a source", "lower-case")),
    ("name: demo\nsources:\n  align: {kind: synthetic}\n", 3, ("`align` cannot name a source",)),
    ("name: demo\nsources: {}\n", 2, ("at least one source",)),
    ("name: demo\nsources:\n  a: &a [*a]\n", 3, ("an alias",)),
    (RIG.replace("demo", "'a b'"), 1, ("name", "matching")),
    (RIG.removeprefix("name: demo\n"), None, ("`name` is missing; it needs text matching ^", "64, like `rover-2`.")),
    (RIG.replace("demo", "yes"), 1, ("YAML reads yes without quotes as true",)),
    (RIG.replace("name", "nmae"), 1, ("`nmae` is no key here. Did you mean `name`?",)),
    (RIG + "  imu: {kidn: imu}\n", 4, ("the key `kind` is missing; it needs text. Is `kidn` meant to be it?",)),
    (RIG + "record: {path: '../{time}.bag'}\n", 4, ("it ends in `.bag`", "name it like ../{time}.mcap")),
    (RIG + "record: {path: '{time}', limit_mb: 3}\n", 4, ("record.limit_mb", "at least 32")),
    ("", None, ("found nothing", "`sources`")),
    ("- a\n", None, ("a list", "`name`")),
]


@pytest.mark.parametrize(("text", "line", "words"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_is_wrong_is_refused_in_one_paragraph(text: str, line: int | None, words: tuple[str, ...]) -> None:
    said = refusal(text)
    assert said.startswith(f"rig.yaml, line {line}" if line is not None else "rig.yaml"), said
    assert "\n" not in said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize("name", ["walk", "walk.mcap", "walk.MCAP", "walk-1.5s", "walk.2026-05-01", "{session}.{time}"])
def test_a_point_in_the_name_of_a_recording_is_not_always_a_suffix(name: str) -> None:
    assert RecordEntry(path=name).path == name
    with pytest.raises(ValueError, match=r"name it like walk-1.5s.mcap"):
        RecordEntry(path="walk-1.5s.db3")


def test_a_few_aliases_stand_for_no_millions_of_values() -> None:
    lines = [f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 10)}]\n" for n in range(7)]
    said = refusal("x0: &x0 [1]\n" + "".join(lines))
    assert said.startswith("rig.yaml: this is no valid YAML: its aliases (*name) stand for more than 100000 values;")
    used = Document("x0: &x0 [1]\n" + "".join(lines[:3]), "rig.yaml").value
    assert used["x3"] == [[[[1]] * 10] * 10] * 10


def test_a_bare_unit_is_the_one_key_of_its_kind() -> None:
    class Camera(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        rate_hz: float = 30
        delay_ms: float = 0
        timeout_ms: float = 0

    with pytest.raises(ConfigError, match=r"`fps` is no key here. The key is `rate_hz`: write `rate_hz: 25`"):
        Document("fps: 25\n", "camera.yaml").decode(Camera)
    with pytest.raises(ConfigError, match=r"`s` is no key here. Allowed here"):  # of two nobody can tell
        Document("s: 2\n", "camera.yaml").decode(Camera)


MANY = """\
nmae: two words
sources:
  camera: {kind: synthetic, required: 'yes', rate_hz: 3}
  Lidar: {kind: synthetic}
  imu: 3
align: {max_delay_s: 0.25, idle_ms: 0.5, streams: {camera: {idle: 5}}}
record: {path: x, streams: [camera, 1, no]}
transport: {predictions: here, lease_ms: 0}
"""


def test_everything_that_is_wrong_is_said_at_once_in_the_order_of_the_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        rig(MANY)
    said = [str(part).removeprefix("rig.yaml, line ") for part in caught.value.parts]
    assert str(caught.value) == "\n".join(f"rig.yaml, line {one}" for one in said)
    assert [one.partition(": ")[0] for one in said] == [
        "1, nmae", "3, sources.camera.required", "4, sources.Lidar", "5, sources.imu", "6, align.max_delay_s",
        "6, align.idle_ms", "6, align.streams.camera.idle", "7, record.streams[1]", "7, record.streams[2]",
        "8, transport.lease_ms",  # and no word of what the whole of `transport` would be without it
    ]  # fmt: skip
    assert caught.value.exit_code == 2


def test_what_is_wrong_with_keys_is_said_at_once() -> None:
    said = refusal(
        "name: a\nname: b\nsources:\n  on: {kind: synthetic}\n  a: {kind: x, b: 1, b: 2, b: 3}\n"
    ).splitlines()
    assert [one.partition(": ")[0] for one in said] == [
        "rig.yaml, line 2, name", "rig.yaml, line 4, sources.on", "rig.yaml, line 5, sources.a.b",
    ]  # fmt: skip


def test_what_can_be_read_is_read_in_spite_of_what_is_wrong() -> None:
    found, wrong = Document(MANY, "rig.yaml").read(Rig, value=Document(MANY, "rig.yaml").value | {"name": "a"})
    assert found is not None
    assert found.sources["camera"].settings == {"rate_hz": 3}
    assert (found.align.max_delay_ms, found.record) == (250, RecordEntry(path="x", streams=("camera",)))
    assert len(wrong.found) == 9
    assert Document("", "rig.yaml").read(Rig)[0] is None


def test_so_many_milliseconds_that_seconds_may_be_meant_are_noted() -> None:
    text = RIG.replace("rate_hz: 30", "rate_hz: 30000, delay_ms: 15000, other_ms: 10000")
    (note,) = long_times(rig(text + "align: {max_delay_ms: 1000000000}\n").document)[:1]
    assert note.endswith("max_delay_ms: 1000000000 ms are 1000000 s; is that meant?")
    notes = long_times(rig(text + "align: {max_delay_ms: 250000}\n").document)
    assert [note.split(", ", 1)[1] for note in notes] == [
        "line 4, align.max_delay_ms: 250000 ms are 250 s; is that meant?",
        "line 3, sources.camera.delay_ms: 15000 ms are 15 s; is that meant?",
    ]


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400"])
def test_every_number_is_finite(number: str) -> None:
    said = refusal(
        f"name: t\nsources:\n  a: {{kind: b, offset_ms: {number}}}\nalign:\n  idle_ms: {number}\n"
        f"  max_delay_ms: {number}\nrestart: {{window_s: {number}}}\nrecord: {{path: {number}}}\n"
    ).splitlines()
    assert [one.partition(": ")[0] for one in said] == [
        "rig.yaml, line 3, sources.a.offset_ms", "rig.yaml, line 5, align.idle_ms", "rig.yaml, line 6, "
        "align.max_delay_ms", "rig.yaml, line 7, restart.window_s", "rig.yaml, line 8, record.path",
    ]  # fmt: skip
    assert all("(a number), expected " in one for one in said)
    assert [one.endswith(" Write a finite number.") for one in said] == [True] * 4 + [False]


def test_also_numbers_in_what_may_be_anything_are_finite() -> None:
    document = Document("settings:\n  a: [1, {b: .inf}]\n  c: .nan\n", "f")
    with pytest.raises(ConfigError) as caught:
        document.decode(dict[str, Any], ("settings",))
    assert str(caught.value).splitlines() == [
        "f, line 2, settings.a[1].b: found inf (a number), expected a finite number.",
        "f, line 3, settings.c: found nan (a number), expected a finite number.",
    ]


def test_yaml_is_not_read_in_surprising_ways() -> None:
    text = RIG.replace("rate_hz: 30", "a: 010, b: 1:30, c: 1e3, d: 2020-01-01, e: -5, f: 0x10, g: .5, h: 1_000")
    settings = rig(text).rig.sources["camera"].settings
    assert settings == {"a": "010", "b": "1:30", "c": 1000.0, "d": "2020-01-01", "e": -5, "f": 16, "g": 0.5, "h": 1000}


def test_anchors_are_merged_and_a_mappings_own_keys_win() -> None:
    text = "name: d\nsources:\n  a: &a {kind: k, x: 1, y: 2}\n  b: {<<: *a, y: 3}\n"
    assert rig(text).rig.sources["b"].settings == {"x": 1, "y": 3}


class Paths(msgspec.Struct):
    here: Path
    home: Path | None = None


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "rig.yaml"
    file.write_text(RIG + "bundle: {path: ../models/demo}\n")
    assert load_rig(file).resolve("../models/demo") == tmp_path / "models" / "demo"
    assert load_rig(file).resolve("/abs") == Path("/abs")
    decoded = Document.load(file).decode(Paths, value={"here": "../x", "home": "~/y"})
    assert decoded == Paths(tmp_path / "x", Path.home() / "y")


def test_a_missing_file_names_a_similar_one(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text(RIG)
    with pytest.raises(ConfigError, match=r"there is no such file\. Did you mean `demo.yaml`\?$"):
        load_rig(tmp_path / "dmeo.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rig.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"rig\.yaml: this is no text, so it cannot be read as YAML"):
        load_yaml(tmp_path / "rig.yaml", Rig)
    (tmp_path / "rig.yaml").write_bytes(b"\x89MCAP0\r\n")
    with pytest.raises(ConfigError, match=r"this is a recording and no YAML file; .*: sensorium info /.*rig.yaml$"):
        load_yaml(tmp_path / "rig.yaml", Rig)


class One(msgspec.Struct, frozen=True, tag="one", tag_field="rule"):
    size: int


class Two(msgspec.Struct, frozen=True, tag="two", tag_field="rule"):
    pass


class Either(msgspec.Struct, frozen=True):
    what: One | Two


def test_tagged_structs_are_chosen_by_their_tag() -> None:
    def decode(text: str) -> Any:
        return Document(text, "f").decode(Either)

    assert decode("what: {rule: one, size: 3}") == Either(One(3))
    assert decode("what: {rule: two}") == Either(Two())
    for text, words in [
        ("what: {rule: tow}", "Did you mean `two`"),
        ("what: {size: 3}", "found no `rule`"),
        ("what: {rule: [1]}", "allowed are `one`, `two`"),
        ("what: {rule: two, size: 3}", "`size` is no key here"),
    ]:
        with pytest.raises(ConfigError, match=words):
            decode(text)


class Span(msgspec.Struct, frozen=True):
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.end <= self.start:
            raise ValueError("`end` must lie after `start`")


class Spans(msgspec.Struct, frozen=True):
    spans: dict[str, Span]


def test_a_structs_own_rules_are_placed() -> None:
    with pytest.raises(ConfigError, match=r"f, line 3, spans.b: `end` must lie after `start`"):
        Document("spans:\n  a: {start: 1, end: 2}\n  b: {start: 2, end: 2}\n", "f").decode(Spans)


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner))


@given(values)
def test_whatever_stands_in_a_rig_is_decoded_or_refused(value: Any) -> None:
    document = Document("{}", "rig.yaml")
    try:
        document.decode(Rig, value=value)
    except ConfigError:
        return
    raise AssertionError("only a mapping with a name and sources is a rig")


@given(st.text(max_size=80))
def test_whatever_stands_in_a_file_is_parsed_or_refused(text: str) -> None:
    with suppress(ConfigError):
        Document(text, "rig.yaml")


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_valid_part_round_trips(delay: int, idle: int) -> None:
    part = Document(f"max_delay_ms: {delay}\nidle_ms: {idle}\n", "f").decode(AlignEntry)
    assert (part.max_delay_ms, part.idle_ms) == (delay, idle)


def test_the_schema_knows_every_key_and_leaves_sources_open() -> None:
    schema = config_schema()
    assert {"name", "sources", "bundle", "align", "record"} <= set(schema["$defs"]["Rig"]["properties"])
    assert schema["$defs"]["SourceEntry"]["additionalProperties"] is True
    assert "settings" not in schema["$defs"]["SourceEntry"]["properties"]


def test_two_wheels_of_opencv_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_environment() == []
    monkeypatch.setattr("pipeline.config._installed", lambda name: True)
    assert "pip uninstall" in check_environment()[0]


def test_paths_in_words() -> None:
    assert dotted(("sources", "camera", "rate_hz")) == "sources.camera.rate_hz"
    assert dotted(("streams", 1)) == "streams[1]"
