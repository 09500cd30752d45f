"""Imports: one clock for all streams, nothing invented, the same result every time."""

from __future__ import annotations

import itertools
import json
import struct
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, RecordingError
from pipeline.importing import ImportOptions, import_file, read_labels
from pipeline.importing.av import upright
from pipeline.importing.base import Opened, Piece, Session
from pipeline.importing.gopro import Motion, Series, _collect, _motion, _on_times, entries, to_xyz
from pipeline.importing.pictures import read_times
from pipeline.messages import AudioLayout, FrameLayout, ImuLayout, Message, TextLayout, array
from pipeline.recording import Label, RecordingReader, summarise
from pipeline.wire import decode_frame

MS = 1_000_000


def messages(path: Path, stream: str) -> list[Message]:
    with RecordingReader(path) as reader:
        return [message for message, _ in reader.messages([stream])]


def contiguous(blocks: list[Message]) -> bool:
    """Every block begins where the one before ended, to the nanosecond of rounding."""
    pairs = itertools.pairwise(blocks)
    return all(b.header.t_capture_ns - a.header.t_end_ns == 0 for a, b in pairs)


# Real footage.


def test_a_gopro_file_gives_three_streams_on_one_clock(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mcap"
    info = import_file(shared_data / "gopro" / "max-heromode.mp4", out)
    assert info.extra["device"] == "GoPro Max"
    assert "MAGN (260 samples), SHUT (316 samples)" in info.extra["left_out"]
    assert "SCEN (98 samples)" in info.extra["left_out"]
    assert "GPS5 (191 samples)" in info.extra["left_out"]
    assert "ACCL (" not in info.extra["left_out"]
    summary = summarise(out)
    assert summary["complete"] is True
    assert summary["duration_s"] == pytest.approx(10.5, abs=0.1)
    assert set(summary["streams"]) == {"camera", "microphone", "imu"}
    camera, microphone, imu = (summary["streams"][name] for name in ("camera", "microphone", "imu"))
    assert (camera["messages"], camera["rate_hz"]) == (315, pytest.approx(30000 / 1001))
    assert (microphone["samples"], microphone["rate_hz"]) == (504832, pytest.approx(48000))
    assert (imu["samples"], imu["rate_hz"]) == (2082, pytest.approx(197.45, abs=0.1))
    assert imu["stats"]["accel"]["mean_norm"] == pytest.approx(9.8, abs=0.2)
    assert imu["stats"]["accel"]["mean"][2] == pytest.approx(9.7, abs=0.2)  # Z is up
    assert max(abs(x) for x in imu["stats"]["gyro"]["mean"]) < 0.05
    assert {s["gaps"] + s["lost"] for s in summary["streams"].values()} == {0}
    assert min(s["start_ns"] for s in summary["streams"].values()) == 0

    samples = np.concatenate([array(message) for message in messages(out, "imu")])
    assert np.isfinite(samples["accel"]).all()
    assert np.isfinite(samples["gyro"]).all()
    blocks = messages(out, "microphone")
    assert contiguous(blocks)
    assert {block.header.layout for block in blocks[:-1]} == {AudioLayout(48000, 2, 960)}
    frame = messages(out, "camera")[0]
    assert decode_frame(frame).shape == (480, 848, 3)
    assert frame.header.uncertainty_ns == pytest.approx(16.68 * MS, rel=0.01)


def test_stamps_of_the_device_are_kept(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "walk.mcap"
    asked = ImportOptions(streams=("camera", "imu"), max_width=64)
    info = import_file(shared_data / "gopro" / "max-heromode.mp4", out, asked)
    assert "left_out" not in info.extra  # nobody asked for the rest
    first = messages(out, "imu")[0].header
    assert first.t_device_ns == 80_577_000  # STMP of the first payload
    assert first.t_capture_ns == 0
    assert messages(out, "camera")[0].header.t_device_ns == 0
    # The exposure of the first frame is stamped 85608 us on the clock that stamps the first sample 80577 us.
    assert messages(out, "camera")[0].header.t_capture_ns == (85_608 - 80_577) * 1000


def test_the_same_file_gives_the_same_recording(shared_data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        import_file(shared_data / "av" / "bbaf2n.mpg", tmp_path / f"{name}.mcap")
    assert (tmp_path / "a.mcap").read_bytes() == (tmp_path / "b.mcap").read_bytes()


def test_clips_of_other_cameras(shared_data: Path, tmp_path: Path) -> None:
    clips = sorted((shared_data / "av").glob("*.mpg"))
    assert len(clips) == 5
    for clip in clips:
        import_file(clip, tmp_path / f"{clip.stem}.mcap")
        summary = summarise(tmp_path / f"{clip.stem}.mcap")
        assert summary["complete"] is True
        assert summary["streams"]["camera"]["messages"] == 75
        assert summary["streams"]["camera"]["rate_hz"] == pytest.approx(25)
        assert summary["streams"]["microphone"]["rate_hz"] == pytest.approx(44100, rel=1e-6)
        assert summary["streams"]["microphone"]["max_gap_ms"] == 0


def test_barks_are_heard_when_they_sound(shared_data: Path, tmp_path: Path) -> None:
    import_file(shared_data / "av" / "dog.mp4", tmp_path / "dog.mcap", ImportOptions(block_ms=10))
    blocks = messages(tmp_path / "dog.mcap", "microphone")
    times = np.array([block.header.t_capture_ns for block in blocks]) / 1e9
    loudness = np.array([np.sqrt((array(block).astype(float) ** 2).mean()) for block in blocks])
    for onset in (0.51, 0.86, 2.88, 4.83, 5.16, 6.64):
        before = loudness[(times > onset - 0.08) & (times < onset - 0.02)].mean()
        after = loudness[(times > onset) & (times < onset + 0.1)].max()
        assert after > 2 * before
    assert summarise(tmp_path / "dog.mcap")["streams"]["camera"]["messages"] == 250


# Files made here.


@pytest.fixture
def make_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Matroska file: ``frames`` stamps of pictures in ms, ``sound`` stamps of 10 ms blocks (16 kHz)."""

    def make(frames: list[int] = [], sound: list[int] = [], name: str = "a.mkv", channels: int = 1) -> Path:  # noqa: B006
        path = tmp_path / name
        layout = "mono" if channels == 1 else "stereo"
        with av.open(str(path), "w") as container:
            video = container.add_stream("mjpeg", rate=25) if frames else None
            audio = container.add_stream("pcm_s16le", rate=16000, layout=layout) if sound else None
            packets: list[Any] = []
            if video is not None:
                video.width, video.height, video.pix_fmt = 64, 48, "yuvj420p"
                video.codec_context.time_base = Fraction(1, 1000)
                for ms in frames:
                    picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), ms % 256, np.uint8), "rgb24")
                    picture.pts, picture.time_base = ms, Fraction(1, 1000)
                    packets += video.encode(picture)
                packets += video.encode()
            if audio is not None:
                for index, ms in enumerate(sound):
                    block = np.full((1, 160 * channels), index, np.int16)
                    piece = av.AudioFrame.from_ndarray(block, "s16", layout)
                    piece.pts, piece.time_base, piece.sample_rate = ms * 16, Fraction(1, 16000), 16000
                    packets += audio.encode(piece)
                packets += audio.encode()
            for packet in sorted(packets, key=lambda p: p.pts * p.time_base):
                container.mux(packet)
        return path

    return make


def test_zero_is_the_earliest_capture(make_file: Callable[..., Path], tmp_path: Path) -> None:
    path = make_file(frames=[140, 180, 260], sound=[100, 110, 120, 130])
    import_file(path, tmp_path / "a.mcap")
    assert [m.header.t_capture_ns for m in messages(tmp_path / "a.mcap", "camera")] == [40 * MS, 80 * MS, 160 * MS]
    assert [m.header.t_device_ns for m in messages(tmp_path / "a.mcap", "camera")] == [140 * MS, 180 * MS, 260 * MS]
    blocks = messages(tmp_path / "a.mcap", "microphone")
    assert [(m.header.t_capture_ns, m.header.t_end_ns) for m in blocks] == [(0, 20 * MS), (20 * MS, 40 * MS)]
    assert array(blocks[0])[:, 0].tolist() == [0] * 160 + [1] * 160
    with RecordingReader(tmp_path / "a.mcap") as reader:
        arrivals = [(message.header, arrival) for message, arrival in reader.messages()]
        assert reader.info.arrival == "capture_end"
    assert all(arrival == header.t_end_ns for header, arrival in arrivals)
    assert [arrival for _, arrival in arrivals] == sorted(arrival for _, arrival in arrivals)
    assert all(header.bound_ns == header.t_end_ns + (header.stream == "camera") for header, _ in arrivals)


def test_missing_sound_leaves_a_hole_and_surplus_sound_is_dropped(
    make_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_file(sound=[0, 10, 20, 100, 110, 120, 130])
    import_file(path, tmp_path / "a.mcap")
    spans = [
        (m.header.t_capture_ns // MS, m.header.t_end_ns // MS) for m in messages(tmp_path / "a.mcap", "microphone")
    ]
    assert spans == [(0, 20), (20, 30), (100, 120), (120, 140)]
    stream = summarise(tmp_path / "a.mcap")["streams"]["microphone"]
    assert (stream["max_gap_ms"], stream["samples"]) == (70, 7 * 160)


def test_a_wave_file_of_two_channels(make_file: Callable[..., Path], tmp_path: Path) -> None:
    info = import_file(make_file(sound=[0, 10], name="a.wav", channels=2), tmp_path / "a.mcap")
    (block,) = messages(tmp_path / "a.mcap", "microphone")
    assert block.header.layout == AudioLayout(16000, 2, 320)
    assert info.unix_ns == 0
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert reader.streams == {"microphone": "audio"}


def test_further_tracks_are_said_to_be_left(make_file: Callable[..., Path], tmp_path: Path) -> None:
    both = make_file(frames=[0, 40], sound=[0, 10, 20, 30])
    assert "left_out" not in import_file(both, tmp_path / "a.mcap").extra
    with av.open(str(both)) as source, av.open(str(tmp_path / "b.mkv"), "w") as target:
        twice = [[target.add_stream_from_template(stream) for _ in range(2)] for stream in source.streams]
        for packet in source.demux():
            for stream in twice[packet.stream.index] if packet.dts is not None else ():
                packet.stream = stream
                target.mux(packet)
    info = import_file(tmp_path / "b.mkv", tmp_path / "b.mcap")
    assert info.extra["left_out"] == "1 more track of pictures; 1 more track of sound"
    assert len(messages(tmp_path / "b.mcap", "camera")) == 2


def test_pictures_raw_scaled_and_named(make_file: Callable[..., Path], tmp_path: Path) -> None:
    options = ImportOptions(jpeg_quality=None, max_width=32, camera="front")
    import_file(make_file(frames=[0, 40]), tmp_path / "a.mcap", options)
    first = messages(tmp_path / "a.mcap", "front")[0]
    assert first.header.layout == FrameLayout("bgr8", 24, 32)


@pytest.mark.parametrize(("degrees", "corner"), [(0, 0), (90, 2), (-90, 3), (180, 5), (-180, 5)])
def test_pictures_are_turned_upright(degrees: int, corner: int) -> None:
    image = np.arange(6, dtype=np.uint8).reshape(2, 3, 1).repeat(3, axis=2)
    turned = upright(image, degrees)
    assert turned[0, 0, 0] == corner
    assert turned.flags.c_contiguous


def test_labels_lie_on_the_file_as_a_player_shows_it(make_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("start_s,end_s,label\n0.5,1.25,clap\n0,0.1, hum \n")
    path = make_file(frames=[100, 140], sound=[80, 90])
    import_file(path, tmp_path / "a.mcap", labels=tmp_path / "labels.csv")
    with RecordingReader(tmp_path / "a.mcap") as reader:
        labels = reader.labels()
        zero = labels[0].start_ns
    with av.open(str(path)) as container:
        assert zero == container.start_time * 1000 - 80 * MS
    assert labels == [Label(zero, zero + 100 * MS, "hum"), Label(zero + 500 * MS, zero + 1250 * MS, "clap")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            "start_s,label\n1,x\n",
            "line 1 is `start_s,label`; it must be the heading, .* `start_s,end_s,label`",
        ),
        (
            "a.csv",
            "start_s;end_s;label\n0,5;2;x\n",
            "a.csv, line 1: .* by semicolons, .*: `start_s,end_s,label`. .* a point",
        ),
        ("a.csv", "start_s\tend_s\tlabel\n0\t2\tx\n", "line 1: the columns are separated by tabs"),
        ("a.csv", "start_s,end_s,label\n\n1,2,x\n1,y,z\n", "a.csv, line 4: `end_s` is `y`, and no number of seconds"),
        ("a.csv", 'start_s,end_s,label\n"0,5","1,5",x\n', "line 2: `start_s` is `0,5`, .* decimals with a point: 0.5$"),
        ("a.csv", "start_s,end_s,label\n0;2;x\n", "line 2: `0;2;x` has 1 value, .* separate values by commas"),
        ("a.csv", "start_s,end_s,label\n2,1,x\n", "must end later"),
        ("a.json", "{", "no valid JSON"),
        ("a.json", "{}", "no list"),
        ("a.json", "[3]", "a.json, entry 1 is 3; every entry needs `start_s`, `end_s`, `label`"),
        (
            "a.json",
            '[{"start_s": 0, "end_s": NaN, "label": "x"}]',
            "entry 1: `end_s` is `nan`, and no number of seconds",
        ),
    ],
)
def test_labels_that_make_no_sense(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_labels(tmp_path / name)


@pytest.mark.parametrize("take", [read_labels, read_times])
def test_a_table_that_is_missing_is_said_as_every_other_file(tmp_path: Path, take: Callable[[Path], Any]) -> None:
    (tmp_path / "table.csv").write_text("")
    with pytest.raises(ConfigError, match=r"tabel\.csv: there is no such file\. Did you mean `table\.csv`\?$"):
        take(tmp_path / "tabel.csv")
    with pytest.raises(ConfigError, match=r" is a folder; name a table, which is one file\.$"):
        take(tmp_path)


def test_labels_as_json(tmp_path: Path) -> None:
    rows = [{"start_s": 0.25, "end_s": 1, "label": "a"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_labels(tmp_path / "a.json") == [Label(250 * MS, 1000 * MS, "a")]
    with pytest.raises(ConfigError, match=r"b\.json: there is no such file"):
        read_labels(tmp_path / "b.json")


def test_what_cannot_be_imported_leaves_nothing_behind(make_file: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.mcap"
    (tmp_path / "text.csv").write_text("a,b\n")
    with pytest.raises(RecordingError, match="of no kind"):
        import_file(tmp_path / "text.csv", out)
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        import_file(tmp_path / "nothing.mp4", out)
    assert not out.parent.exists()
    import_file(make_file(frames=[0, 40]), out)
    with pytest.raises(ConfigError, match="exists already"):
        import_file(make_file(frames=[0, 40]), out)
    import_file(make_file(frames=[0, 40, 80]), out, overwrite=True)
    assert len(messages(out, "camera")) == 3
    mine = out.with_name("b.mcap")
    with pytest.raises(ConfigError, match="exists already"):  # somebody else's, made meanwhile
        import_file(make_file(frames=[0, 40]), mine, progress=lambda t_ns: mine.write_bytes(b"mine"))
    assert mine.read_bytes() == b"mine"
    assert sorted(entry.name for entry in out.parent.iterdir()) == ["a.mcap", "b.mcap"]


def test_an_interrupted_import_leaves_nothing_behind(make_file: Callable[..., Path], tmp_path: Path) -> None:
    def stop(t_ns: int) -> None:
        raise KeyboardInterrupt

    path = make_file(frames=[0, 40])
    with pytest.raises(KeyboardInterrupt):
        import_file(path, tmp_path / "a.mcap", progress=stop)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_pieces_out_of_order_are_dropped_and_counted() -> None:
    times = [5, 9, 9, 7, 12]
    pieces = [Piece(layout=TextLayout(1), data=b"a", t_ns=t, end_ns=t, t_device_ns=t) for t in times]
    opened = Opened(tracks={"words": iter(pieces), "empty": iter(())})
    session = Session.of(opened, Path("a"))
    assert [m.header.t_capture_ns for m in session.messages()] == [0, 4, 7]
    assert opened.dropped == {"words out of order": 2}
    with pytest.raises(RecordingError, match="no picture"):
        Session.of(Opened(tracks={"empty": iter(())}), Path("a"))


# GPMF.


def klv(key: str, kind: str, size: int, data: bytes) -> bytes:
    repeat = len(data) // size if size else 0
    return key.encode() + kind.encode() + bytes([size]) + struct.pack(">H", repeat) + data + bytes(-len(data) % 4)


def stream(key: str, rows: Any, stamp_us: int | None = None, scale: int = 10, axes: str = "XYZ") -> bytes:
    data = np.asarray(rows, ">i2")
    body = klv("STMP", "J", 8, struct.pack(">Q", stamp_us)) if stamp_us is not None else b""
    body += klv("SCAL", "s", 2, struct.pack(">h", scale)) + klv("ORIN", "c", 3, axes.encode())
    body += klv(key, "s", 2 * data.shape[1], data.tobytes())
    return klv("STRM", "\0", 1, body)


def payload(*streams: bytes) -> bytes:
    return klv("DEVC", "\0", 1, klv("DVNM", "c", 1, b"Test cam") + b"".join(streams))


def test_gpmf_samples_are_scaled_turned_and_timed() -> None:
    first = payload(stream("ACCL", [[10, 20, 30]] * 4, 1000, axes="XzY"))
    second = payload(stream("ACCL", [[40, 50, 60]] * 2, 5000, axes="XzY"))
    series, facts = _collect(iter([(0, 10**9, first), (10**9, 2 * 10**9, second)]))
    assert facts == {"device": "Test cam"}
    assert series["ACCL"].values[0][0].tolist() == [1.0, 3.0, -2.0]
    assert series["ACCL"].times_ns(True).tolist() == [n * 1_000_000 for n in (1, 2, 3, 4, 5, 6)]


def test_all_that_a_track_holds_is_counted() -> None:
    held: Counter[str] = Counter()
    scenes = klv("STRM", "\0", 1, klv("TYPE", "c", 2, b"Ff") + klv("SCEN", "?", 8, bytes(48)) * 3)
    track = [payload(stream("ACCL", [[0, 0, 9]] * n), stream("GPS5", [[1] * 5] * 2), scenes) for n in (4, 2)]
    series, _ = _collect(((n, n + 1, data) for n, data in enumerate(track)), held)
    assert set(series) == {"ACCL"}
    assert held == {"ACCL": 6, "GPS5": 4, "SCEN": 6}


def test_gpmf_without_stamps_is_timed_by_its_container() -> None:
    blocks = [
        (0, 4000, payload(stream("ACCL", [[0, 0, 9]] * 4))),
        (4000, 8000, payload(stream("ACCL", [[0, 0, 9]] * 2))),
    ]
    series, _ = _collect(iter(blocks))
    assert not series["ACCL"].stamped
    assert series["ACCL"].times_ns(False).tolist() == [0, 1000, 2000, 3000, 4000, 6000]


def test_stamps_that_go_back_are_not_relied_on() -> None:
    blocks = [
        (n * 4000, n * 4000 + 4000, payload(stream("ACCL", [[0, 0, 9]] * 4, stamp))) for n, stamp in enumerate([9, 9])
    ]
    series, facts = _collect(iter(blocks))
    assert _motion(series, 0, facts).times_ns.tolist() == [n * 1000 for n in range(8)]
    series["ACCL"].starts_ns[1] = 0
    with pytest.raises(ValueError, match="forward"):
        _motion(series, 0, facts)


def test_a_scale_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="divided"):
        _collect(iter([(0, 1, payload(stream("ACCL", [[1, 2, 3]], 1, scale=0)))]))


def test_one_payload_is_timed_by_its_length() -> None:
    series, _ = _collect(iter([(0, 4_000_000, payload(stream("ACCL", [[0, 0, 9]] * 4, 70)))]))
    assert series["ACCL"].times_ns(True).tolist() == [70_000, 1_070_000, 2_070_000, 3_070_000]


def test_a_gyroscope_of_another_rate_is_brought_to_the_accelerometers_times() -> None:
    gyro = Series(stamps_us=[0], starts_ns=[0], end_ns=4000, values=[np.array([[0.0] * 3, [2.0] * 3])])
    values = _on_times(gyro, np.array([-1, 0, 1000, 2000, 2001]), by_device=True)
    assert np.isnan(values[[0, 4]]).all()
    assert values[1:4, 0].tolist() == [0, 1, 2]


def test_batches_keep_every_samples_time() -> None:
    times = np.cumsum(np.full(23, 5_064_549))
    samples = np.zeros(23, np.dtype([("offset_ns", "<i8"), ("accel", "<f4", 3), ("gyro", "<f4", 3)]))
    pieces = list(Motion(times, times + 7, samples, {}).pieces(50, 3))
    assert [piece.layout for piece in pieces] == [ImuLayout(10), ImuLayout(10), ImuLayout(3)]
    assert np.concatenate([piece.t_ns + piece.data["offset_ns"] for piece in pieces]).tolist() == times.tolist()
    assert [piece.end_ns for piece in pieces] == [times[9], times[19], times[22]]
    assert pieces[1].t_device_ns == times[10] + 7


def test_axes() -> None:
    rows = np.array([[1.0, 2.0, 3.0]])
    assert to_xyz(rows, "ZXY").tolist() == [[2, 3, 1]]
    assert to_xyz(rows, "YxZ").tolist() == [[-2, 1, 3]]
    for wrong in ("XXZ", "XY", "ABC", ""):
        with pytest.raises(ValueError, match="axes"):
            to_xyz(rows, wrong)


@given(data=st.binary(max_size=60) | st.binary(max_size=40).map(lambda b: payload(b)))
def test_gpmf_of_any_bytes_is_read_or_refused(data: bytes) -> None:
    try:
        list(entries(data))
        _collect(iter([(0, 1, data)]))
    except ValueError:
        pass


@given(cut=st.integers(0, 200), at=st.integers(0, 199), value=st.integers(0, 255))
def test_damaged_gpmf_is_read_or_refused(cut: int, at: int, value: int) -> None:
    data = bytearray(payload(stream("ACCL", [[1, 2, 3]] * 4, 70), stream("GYRO", [[1, 2, 3]] * 4, 70)))
    data[at % len(data)] = value
    try:
        series, facts = _collect(iter([(0, 90, bytes(data[: len(data) - cut])), (90, 180, bytes(data))]))
        if "ACCL" in series:
            _motion(series, 0, facts)
    except ValueError:
        pass


def test_the_imported_picture_is_the_one_in_the_file(shared_data: Path, tmp_path: Path) -> None:
    clip = shared_data / "av" / "bbaf2n.mpg"
    import_file(clip, tmp_path / "a.mcap", ImportOptions(jpeg_quality=95))
    frames = messages(tmp_path / "a.mcap", "camera")
    with av.open(str(clip)) as container:
        for message, frame in zip(frames, container.decode(video=0), strict=True):
            assert cv2.PSNR(decode_frame(message), frame.to_ndarray(format="bgr24")) > 38
