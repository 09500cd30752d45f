"""Folders of pictures with a CSV of their times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.errors import ConfigError, RecordingError
from pipeline.importing import ImportOptions, import_file
from pipeline.messages import FrameLayout, Message
from pipeline.recording import RecordingReader
from pipeline.wire import decode_frame

MS = 1_000_000


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A folder of four pictures, gray 0, 50, 100, 150, with this text as its CSV."""

    def make(table: str) -> Path:
        place = tmp_path / "walk"
        (place / "left").mkdir(parents=True, exist_ok=True)
        for k in range(4):
            image = np.full((24, 32, 3), 50 * k, np.uint8)
            cv2.imwrite(str(place / "left" / f"{k}.{'png' if k % 2 else 'jpg'}"), image)
        (place / "times.csv").write_text(table)
        return place

    return make


def frames(path: Path, options: ImportOptions | None = None) -> list[Message]:
    out = path.parent / "out.mcap"
    import_file(path, out, options, overwrite=True)
    with RecordingReader(out) as reader:
        return [message for message, _ in reader.messages()]


@pytest.mark.parametrize(
    "table",
    [
        "time_s,file\n10.00,left/0.jpg\n10.04,left/1.png\n10.10,left/2.jpg\n",
        "file;exposure;Timestamp [ms]\nleft/0.jpg;1;10000\nleft/1.png;1;10040\n\nleft/2.jpg;2;10100\n",
        "#timestamp [ns],filename\n10000000000, left/0.jpg\n10040000000, left/1.png\n10100000000, left/2.jpg\n",
        "t_us\timage\n10000000\tleft/0.jpg\n10040000\tleft/1.png\n10100000\tleft/2.jpg\n",
        "\ufefftime(s) path\n1e1 left/0.jpg\n10.04 left/1.png\n10.1 left/2.jpg\n",
    ],
)
def test_every_way_to_write_the_times(folder: Callable[[str], Path], table: str) -> None:
    path = folder(table)
    found = frames(path)
    assert [message.header.t_capture_ns for message in found] == [0, 40 * MS, 100 * MS]
    assert [message.header.t_device_ns for message in found] == [10_000 * MS, 10_040 * MS, 10_100 * MS]
    assert {message.header.layout for message in found} == {FrameLayout("jpeg", 24, 32)}
    assert [round(float(decode_frame(message).mean())) for message in found] == [0, 50, 100]
    assert found[0].data == (path / "left" / "0.jpg").read_bytes()  # a JPEG keeps its bytes


def test_unix_times_are_kept_to_the_nanosecond_and_what_is_left_is_said(folder: Callable[[str], Path]) -> None:
    path = folder("time_ns,file,gain\n1700000000000000001,left/0.jpg,1\n1700000000040000003,left/1.png,1\n")
    (path / "left" / "1.png").write_bytes(b"\x89PNG nothing")
    info = import_file(path, path.parent / "a.mcap", ImportOptions(streams=("front=camera",)))
    assert info.unix_ns == 1700000000000000001
    left_out = "2 pictures that times.csv does not name, the first 2.jpg; columns of times.csv: gain"
    assert info.extra["left_out"] == left_out
    assert info.note == "dropped: 1 pictures of camera: the picture cannot be decoded"
    with RecordingReader(path.parent / "a.mcap") as reader:
        assert reader.streams == {"front": "frame"}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("time_s,file\n1,left/0.jpg\n,left/1.png\n", "line 3 of .* lacks its time or its file"),
        ("time_s,file\n1\n", "line 2 of .* lacks"),
        ("time_s,file\nsoon,left/0.jpg\n", "line 2 of .* 'soon', which is no number"),
        ("time_s,file\nnan,left/0.jpg\n", "no number"),
        ("time_s,file\n1,left/0.jpg\n1,left/1.png\n", "do not increase: line 2 says 1000000000 ns and line 3"),
        ("time_s,file\n2,left/0.jpg\n1,left/1.png\n", "do not increase"),
        ("time,file\n1,left/0.jpg\n", "does not say what unit its column `time` has"),
        ("time_weeks,file\n1,left/0.jpg\n", "does not say what unit"),
        ("seconds,file\n1,left/0.jpg\n", "has the columns seconds, file; it needs one column of times"),
        ("time_s,time_ns,file\n1,1,left/0.jpg\n", "needs one column of times"),
        ("time_s,where\n1,left/0.jpg\n", "one called `file`"),
        ("time_s,file\n", "holds no times"),
        ("time_s,file\n33000000,left/0.jpg\n66000000,left/1.png\n", "every 3.3e[+]07 s.* cannot be its unit"),
        ("time_ms,file\n1.000,left/0.jpg\n1.033,left/1.png\n", "every 3.3e-05 s.* cannot be its unit"),
        ("time_s,file\n1700000000000,left/0.jpg\n1700000000033,left/1.png\n", "the first at 1.7e[+]12 s"),
        ("time_s,file\n1,left/9.jpg\n2,left/1.png\n3,x.jpg\n", r"2 of the 3 pictures .* left/9.jpg \(line 2\), x.jpg"),
    ],
)
def test_times_that_make_no_sense(folder: Callable[[str], Path], table: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        frames(folder(table))


def test_a_folder_without_times_or_with_several(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("time_s,file\n1,left/0.jpg\n")
    (path / "more.csv").write_text("time_s,file\n1,left/1.png\n2,left/2.jpg\n")
    with pytest.raises(ConfigError, match=r"2 CSV files \(more.csv, times.csv\).*--times"):
        frames(path)
    assert len(frames(path, ImportOptions(times=path / "more.csv"))) == 2
    with pytest.raises(ConfigError, match=r"none.csv: there is no such file. Did you mean `more.csv`\?$"):
        frames(path, ImportOptions(times=path / "none.csv"))
    (path / "more.csv").write_bytes("time_s,file\n1,left/1.png\n2,gr\u00fcn.jpg\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"more.csv, line 3: the byte 0xfc is not UTF-8"):
        frames(path, ImportOptions(times=path / "more.csv"))
    for table in path.glob("*.csv"):
        table.unlink()
    with pytest.raises(ConfigError, match="no CSV file; one must say"):
        frames(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordingError, match="of no kind"):
        frames(tmp_path / "empty")


def test_pictures_of_which_none_can_be_decoded(folder: Callable[[str], Path]) -> None:
    path = folder("time_s,file\n1,left/0.jpg\n")
    (path / "left" / "0.jpg").write_bytes(b"")
    with pytest.raises(RecordingError, match="1 pictures of camera: the picture cannot be decoded"):
        frames(path)
