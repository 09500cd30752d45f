"""The fault bench: what each fault does to messages, to windows and to predictions, and that it can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline import cli
from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import ConfigError
from pipeline.faultbench import FaultReport, fault_bench, live_steps
from pipeline.faults import (
    Delay,
    Drift,
    Duplicate,
    Fault,
    FaultFile,
    Freeze,
    Future,
    Item,
    Jitter,
    Jump,
    Loss,
    Offset,
    Reorder,
    Restart,
    deaths,
    faulty,
    load_faults,
    runs,
    unordered,
)
from pipeline.recording import Label, RecordingReader
from tests.conftest import ROOT
from tests.test_replay import SPEC, record, session
from tests.tiny_bundle import FRAME, GRID, write_bundle

pytestmark = pytest.mark.usefixtures("conserved")
MS, S = 1_000_000, 1_000_000_000
EXAMPLE = ROOT / "examples" / "faults.yaml"
ITEMS: list[Item] = [(message, at) for at, message in session(10)]
KINDS = {
    "loss": "{kind: loss, streams: [camera], share: 0.5, start_s: 2, end_s: 8}",
    "delay": "{kind: delay, delay_ms: 100}",
    "jitter": "{kind: jitter, jitter_ms: 80}",
    "reorder": "{kind: reorder, streams: [camera], share: 0.3, delay_ms: 120}",
    "duplicate": "{kind: duplicate, share: 0.2}",
    "offset": "{kind: offset, streams: [imu], offset_ms: -40}",
    "drift": "{kind: drift, streams: [imu], drift_ppm: -2000}",
    "jump": "{kind: jump, streams: [camera], at_s: 5, jump_ms: 700}",
    "freeze": "{kind: freeze, streams: [camera], start_s: 3, end_s: 6}",
    "restart": "{kind: restart, streams: [imu], at_s: 4, away_s: 2}",
    "future": "{kind: future, share: 0.1, ahead_ms: 60000}",
}


def struck(fault: Fault, seed: int = 0) -> list[Item]:
    return list(faulty(ITEMS, {"it": fault}, seed))


def of(items: list[Item], stream: str) -> list[Item]:
    return [(message, at) for message, at in items if message.header.stream == stream]


def stamps(items: list[Item]) -> list[tuple[int, int, int]]:
    return [(m.header.epoch, m.header.seq, m.header.t_capture_ns) for m, _ in items]


# -- what happens to messages ------------------------------------------------------------------------------------------


def test_a_share_is_lost_in_runs_and_only_while_the_fault_is_there() -> None:
    left = of(struck(Loss(streams=("camera",), share=0.4, run=5, start_s=2, end_s=8)), "camera")
    numbers = {m.header.seq for m, _ in left}
    gone = [m.header.seq for m, at in of(ITEMS, "camera") if m.header.seq not in numbers]
    assert 20 < len(gone) < 80  # 120 messages, 0.4 of them
    assert all(2 * S <= at < 8 * S for m, at in of(ITEMS, "camera") if m.header.seq in gone)
    lengths = sum(number - 1 not in gone for number in gone)
    assert len(gone) / lengths > 2
    assert of(struck(Loss(streams=("camera",), share=1)), "imu") == of(ITEMS, "imu")
    assert of(struck(Loss(streams=("camera",), share=1)), "camera") == []
    assert struck(Loss(share=0)) == ITEMS


def test_what_only_takes_longer_is_the_same_later() -> None:
    assert struck(Delay(delay_ms=70)) == [(message, at + 70 * MS) for message, at in ITEMS]
    late = struck(Jitter(jitter_ms=200, streams=("camera",)))
    assert stamps(of(late, "camera")) == stamps(of(ITEMS, "camera"))
    waits = [at - before for (_, at), (_, before) in zip(of(late, "camera"), of(ITEMS, "camera"), strict=True)]
    assert min(waits) >= 0
    assert len(set(waits)) > 50
    held = of(struck(Freeze(streams=("imu",), start_s=2, end_s=4)), "imu")
    assert stamps(held) == stamps(of(ITEMS, "imu"))
    assert not any(2 * S <= at < 4 * S for _, at in held)
    assert sum(at == 4 * S for _, at in held) >= 20


def test_some_are_overtaken_and_some_come_twice() -> None:
    mixed = of(struck(Reorder(streams=("camera",), share=0.3, delay_ms=120)), "camera")
    assert sorted(stamps(mixed)) == stamps(of(ITEMS, "camera"))
    assert stamps(mixed) != stamps(of(ITEMS, "camera"))
    twice = struck(Duplicate(share=0.25))
    assert len(ITEMS) * 1.1 < len(twice) < len(ITEMS) * 1.4
    assert sorted(set(stamps(of(twice, "imu")))) == stamps(of(ITEMS, "imu"))


def test_clocks_that_are_wrong() -> None:
    for stream, fault, moved in (
        ("imu", Offset(offset_ms=-30), lambda t: t - 30 * MS),
        ("camera", Drift(drift_ppm=1000), lambda t: t + t // 1000),
        (
            "camera",
            Drift(drift_ppm=1000, start_s=2, end_s=4),
            lambda t: t + (min(max(t, 2 * S), 4 * S) - 2 * S) // 1000,
        ),
    ):
        for (one, _), (was, _) in zip(of(struck(fault), stream), of(ITEMS, stream), strict=True):
            assert one.header.t_capture_ns == moved(was.header.t_capture_ns)
            assert one.header.bound_ns - one.header.t_capture_ns == was.header.bound_ns - was.header.t_capture_ns
            assert one.data is was.data
    ahead = struck(Future(share=0.5, ahead_ms=1000))
    assert {m.header.t_capture_ns - w.header.t_capture_ns for (m, _), (w, _) in zip(ahead, ITEMS, strict=True)} == {
        0,
        S,
    }


@pytest.mark.parametrize("fault", [Jump(at_s=5, jump_ms=-200), Restart(at_s=5, away_s=0)])
def test_a_jump_and_a_restart_open_an_epoch(fault: Fault) -> None:
    camera = of(struck(fault), "camera")
    new = [(epoch, seq) for epoch, seq, _ in stamps(camera) if epoch]
    assert new == [(5 * S, seq) for seq in range(len(new))]
    assert 95 < len(new) < 105


def test_a_node_that_is_away_sends_nothing_and_loses_nothing() -> None:
    fault = Restart(streams=("imu",), at_s=4, away_s=2)
    left = of(struck(fault), "imu")
    assert not any(4 * S <= at < 6 * S for _, at in left)
    assert {m.header.epoch for m, _ in left} == {0, 6 * S}
    assert deaths([fault, Delay(delay_ms=1)], ["camera", "imu"]) == [(4 * S, "imu")]
    assert deaths([Restart(at_s=1)], ["a", "b"]) == [(S, "a"), (S, "b")]


@given(
    faults=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 9),
)
def test_arrivals_never_go_back_and_a_seed_says_it_all(faults: list[str], seed: int) -> None:
    chosen: dict[str, Any] = {name: FILE.faults[name] for name in faults}
    first, again = (list(faulty(ITEMS, chosen, seed)) for _ in range(2))
    assert first == again
    assert [at for _, at in first] == sorted(at for _, at in first)


def test_a_further_fault_or_stream_changes_no_other() -> None:
    loss = Loss(share=0.5, streams=("camera",))
    alone = stamps(of(list(faulty(ITEMS, {"loss": loss})), "camera"))
    assert stamps(of(list(faulty(ITEMS, {"loss": Loss(share=0.5)})), "camera")) == alone
    assert (
        stamps(of(list(faulty(ITEMS, {"loss": loss, "more": Duplicate(share=1, streams=("imu",))})), "camera")) == alone
    )
    assert stamps(of(list(faulty(ITEMS, {"other": loss})), "camera")) != alone
    assert stamps(of(list(faulty(ITEMS, {"loss": loss}, 1)), "camera")) != alone


# -- the file ----------------------------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> FaultFile:
    file = tmp_path / "faults.yaml"
    file.write_text(text)
    return load_faults(file, ["camera", "imu"])


FILE_TEXT = "seed: 3\ntogether: true\nfaults:\n" + "".join(f"  {name}: {text}\n" for name, text in KINDS.items())
FILE = msgspec.convert(
    {"seed": 3, "together": True, "faults": {n: yaml.safe_load(t) for n, t in KINDS.items()}}, FaultFile
)


def test_a_file_is_read_strictly(tmp_path: Path) -> None:
    assert read(tmp_path, FILE_TEXT) == FILE
    assert list(runs(FILE)) == [*KINDS, "all together"]
    assert unordered(FILE.faults.values(), ["camera", "imu"]) == {"camera"}
    assert unordered([Reorder(share=0.1, delay_ms=1)], ["camera", "imu"]) == {"camera", "imu"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {kind: los, share: 0.1}", r"line 2.*`kind: los`.*Did you mean `loss`"),
        ("a: {kind: delay, delay_s: 0.1}", r"write `delay_ms: 100`"),
        ("a: {kind: loss, share: 1.5}", r"faults\.a\.share.*at most 1"),
        ("a: {kind: loss, share: 0.1, streams: [camra]}", r"no stream `camra`.*Did you mean `camera`"),
        ("a: {kind: freeze, end_s: .inf}", r"line 2, faults\.a\.end_s: found inf .* Write a finite number"),
        ("a: {kind: freeze, start_s: 5}", r"needs an `end_s`"),
        ("a: {kind: loss, share: 0.9, run: 2}", r"cannot be lost in runs of less than 9"),
        ("a: {share: 0.5}", r"no `kind`, allowed are"),
        ("all together: {kind: loss, share: 0.5}\ntogether: true", r"taken by the run of all"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, text: str, words: str) -> None:
    first, _, more = text.partition("\n")
    with pytest.raises(ConfigError, match=words):
        read(tmp_path, f"faults:\n  {first}\n{more}\n")


def test_a_file_without_faults_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        read(tmp_path, "faults: {}\n")


# -- what comes of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    record(folder / "a.mcap", session(10), (Label(0, 10 * S, "yes"),))
    write_bundle(folder / "model", {"camera": FRAME, "imu": GRID})
    (folder / "faults.yaml").write_text(FILE_TEXT)
    return folder


@pytest.fixture(scope="module")
def report(place: Path) -> FaultReport:
    bundle: Bundle = load_bundle(place / "model")
    with RecordingReader(place / "a.mcap") as reader:
        return fault_bench(reader, bundle, FILE)


def test_every_fault_is_seen_where_it_strikes(report: FaultReport) -> None:
    clean, found = report.clean, {result.name: result for result in report.faults}
    assert clean.windows_changed == clean.label_changes == 0
    assert clean.verdicts["camera"]["ok"] >= clean.windows - 2
    assert clean.accuracy is not None
    assert report.with_truth == clean.windows
    assert found["loss"].messages["camera"]["lost"] > 30
    assert found["loss"].verdicts["camera"].get("missing(gap)", 0) > 10
    assert found["loss"].verdicts["imu"] == clean.verdicts["imu"]
    assert found["delay"].wait_ms["p50"] - clean.wait_ms["p50"] == pytest.approx(100, rel=0.05)
    assert found["reorder"].verdicts["camera"]["ok"] >= clean.windows - 4
    assert found["duplicate"].messages["imu"]["duplicate"] > 5
    assert found["duplicate"].windows_changed == 0
    assert found["offset"].windows_changed > 90
    assert found["drift"].windows_changed > 90
    assert found["jump"].windows_changed > 5
    assert found["freeze"].verdicts["camera"]["missing(silent)"] > 10
    assert found["freeze"].verdicts["camera"]["late"] > 5
    assert 15 <= found["restart"].verdicts["imu"]["missing(dead)"] <= 21
    assert found["restart"].messages["imu"]["lost"] == 0
    assert found["future"].messages["camera"]["rejected"] > 5
    changed = {name: result.mean_score_change for name, result in found.items()}
    assert (changed["freeze"] or 0) > 0
    assert changed["duplicate"] == 0
    assert found["all together"].windows_changed >= found["drift"].windows_changed


def test_no_window_is_left_out_whatever_happens(report: FaultReport) -> None:
    for result in report.faults:
        assert result.windows >= report.clean.windows - 3, result.name  # the end may be cut by what is lost
        assert all(sum(counts.values()) == result.windows for counts in result.verdicts.values())


def test_the_clean_run_is_the_live_rules_without_faults() -> None:
    steps = list(live_steps(ITEMS, msgspec.structs.replace(SPEC, max_delay_ns=250 * MS, max_future_ns=S, max_open=64)))
    assert [step.manifest.step for step in steps] == list(range(1, len(steps) + 1))
    assert {step.manifest.cause for step in steps} & {"deadline", "idle", "proven"}


def test_the_command_prints_a_table_and_json(place: Path) -> None:
    arguments = [
        "replay",
        str(place / "a.mcap"),
        "--bundle",
        str(place / "model"),
        "--faults",
        str(place / "faults.yaml"),
    ]
    table = CliRunner().invoke(cli.app, arguments)
    assert table.exit_code == 0, table.exception
    assert all(name in table.stdout for name in KINDS)
    assert "accuracy is over" in table.stdout
    printed = CliRunner().invoke(cli.app, [*arguments, "--json"])
    found = msgspec.convert(json.loads(printed.stdout), FaultReport)
    assert [result.name for result in found.faults] == [*KINDS, "all together"]


@pytest.mark.parametrize("other", [["--verify"], ["--out", "x.jsonl"]])
def test_two_things_at_once_are_refused(place: Path, other: list[str]) -> None:
    result = CliRunner().invoke(cli.app, ["replay", str(place / "a.mcap"), "--faults", "f.yaml", *other])
    assert isinstance(result.exception, ConfigError)
    assert "choose one" in str(result.exception)


@pytest.mark.slow
def test_the_shipped_example_is_run_as_its_first_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    command = EXAMPLE.read_text().splitlines()[0].removeprefix("# ").split()
    assert command[0] == "sensorium"
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli.app, [*command[1:], "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert len(found["faults"]) == len(load_faults(EXAMPLE, found["clean"]["verdicts"]).faults) + 1
    worst = min(found["faults"], key=lambda one: one["accuracy"])
    assert worst["name"] == "all together"
