"""Damaged recordings: whatever is intact is saved, bit for bit, and nothing else; what is lost is named."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.opcode import Opcode
from mcap.reader import make_reader
from mcap.records import Channel, Chunk
from mcap.records import Message as Stored
from mcap.stream_reader import StreamReader, breakup_chunk
from mcap.writer import IndexType, Writer
from typer.testing import CliRunner

from pipeline import cli
from pipeline.commands.recorded import info
from pipeline.errors import ConfigError, RecordingError
from pipeline.explain import Session, explain
from pipeline.messages import TextLayout
from pipeline.recording import (
    GAP_TOPIC,
    Label,
    LostMessages,
    RecordingReader,
    RecordingWriter,
    Ring,
    RingWriter,
    SessionInfo,
    summarise,
)
from pipeline.recording.damage import damage
from pipeline.recording.salvage import Recovery, SalvagedReader, recover
from pipeline.schemas import schema
from tests.mcap_places import places
from tests.test_recording import UNIX, message

MS = 1_000_000
INFO = SessionInfo(session="s1", unix_ns=UNIX, rig="name: größe\n" * 30, calibrations={"camera": "fx: 1"})
BLOCK = 4096

Record = tuple[str, int, int, int, bytes]
"""Topic, log and publish time, sequence, data."""


class Original(NamedTuple):
    """A recording as it was: its bytes, where each of its records lies, and what each chunk holds."""

    content: bytes
    records: list[tuple[int, int, int]]
    """Opcode, first byte, end."""
    chunks: dict[tuple[int, int], list[Record]]

    def __repr__(self) -> str:
        return f"Original of {len(self.content)} bytes"

    def of(self, opcode: int) -> list[tuple[int, int]]:
        return [(start, end) for kind, start, end in self.records if kind == opcode]


def stored(path: Path) -> list[list[Record]]:
    """What lies in the chunks of a file, by the MCAP library's own reader."""
    topics: dict[int, str] = {}
    chunks: list[list[Record]] = []
    with path.open("rb") as file:
        for chunk in StreamReader(file, emit_chunks=True, validate_crcs=True).records:
            if not isinstance(chunk, Chunk):
                continue
            chunks.append([])
            for one in breakup_chunk(chunk, validate_crc=True):
                if isinstance(one, Channel):
                    topics[one.id] = one.topic
                elif isinstance(one, Stored):
                    chunks[-1].append((topics[one.channel_id], one.log_time, one.publish_time, one.sequence, one.data))
    return chunks


def write(path: Path, compression: Any = "zstd", steps: bool = True) -> Original:
    """A session of two streams, one of them with a second life, with beats, windows, predictions, a label, and a gap of
    its recorder's own. Its bytes cannot be compressed much."""
    random = np.random.default_rng(7)
    with RecordingWriter(path, INFO, compression, chunk_bytes=6000) as writer:
        for n in range(120):
            now = n * 10 * MS
            epoch, seq = divmod(n, 70)
            data = bytes(random.integers(32, 127, 400, dtype=np.uint8))
            writer.write(message(TextLayout(400), data, stream="words", seq=seq, epoch=epoch, t=now), now)
            if n == 40:
                gap = LostMessages("more", 0, 20, 24, "the disk was too slow")
                writer.write_json(GAP_TOPIC, msgspec.json.encode(gap), now)
            if n % 2 == 0:
                number = n // 2 + (5 if n >= 40 else 0)
                writer.write(message(TextLayout(200), data[:200], stream="more", seq=number, t=now), now + 1)
            if n % 10 == 9:
                step = n // 10 + 1
                if steps:
                    writer.write_json("/manifest", b'{"step": %d}' % step, now + 2)
                    writer.write_json("/prediction", b'{"window": {"index": %d}}' % step, now + 3)
                writer.write(message(None, stream="words", seq=seq + 1, epoch=epoch, t=now), now + 4)
        writer.write_label(Label(0, 5, "a"), 1200 * MS)
        writer.attach("more.bin", bytes(range(256)))
    content = path.read_bytes()
    records = places(content)
    spans = [(start, end) for opcode, start, end in records if opcode == Opcode.CHUNK]
    return Original(content, records, dict(zip(spans, stored(path), strict=True)))


@pytest.fixture(scope="module", params=["zstd", "none"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return write(tmp_path_factory.mktemp("salvage") / "a.mcap", request.param)


class Hurt(NamedTuple):
    """A damaged file: its bytes, and which of the original's are not there as they were."""

    content: bytes
    start: int
    end: int


def flipped(content: bytes, at: int, bits: int = 4, count: int = 1) -> Hurt:
    hurt = bytearray(content)
    for place in range(at, at + count):
        hurt[place] ^= bits
    return Hurt(bytes(hurt), at, at + count)


def zeroed(content: bytes, block: int) -> Hurt:
    start = block * BLOCK
    end = min(start + BLOCK, len(content))
    return Hurt(content[:start] + bytes(end - start) + content[end:], start, end)


@st.composite
def hurts(draw: Any, content: bytes) -> Hurt:
    size = len(content)
    kind = draw(st.sampled_from(["flip", "cut", "hole", "zeros", "overwritten", "torn and zeros"]))
    start = draw(st.integers(0, size - 1) | st.integers(max(size - 4000, 0), size - 1))
    end = draw(st.integers(start + 1, min(start + 20_000, size)))
    match kind:
        case "flip":
            return flipped(content, start, draw(st.integers(1, 255)), min(draw(st.integers(1, 9)), size - start))
        case "cut":
            return Hurt(content[:start], start, size)
        case "hole":
            return Hurt(content[:start] + content[end:], start, end)
        case "zeros":
            return zeroed(content, start // BLOCK)
        case "torn and zeros":
            return Hurt(content[:start] + bytes(end - start), start, size)
    noise = draw(st.randoms(use_true_random=False)).randbytes(end - start)
    return Hurt(content[:start] + noise + content[end:], start, end)


def ours(record: Record) -> bool:
    """Whether a record is a gap that ``recover`` made."""
    return record[0] == GAP_TOPIC and b"the file was damaged" in record[4]


def recovered(folder: Path, content: bytes, **options: Any) -> tuple[Path, Recovery]:
    path, out = folder / "damaged.mcap", folder / "whole.mcap"
    path.write_bytes(content)
    out.unlink(missing_ok=True)
    return out, recover(path, out, **options)


def numbers(path: Path) -> Iterator[tuple[str, int, int]]:
    with RecordingReader(path) as reader:
        for header, _ in reader.headers():
            yield header.stream, header.epoch, header.seq


def gaps(path: Path) -> Iterator[dict[str, Any]]:
    with RecordingReader(path) as reader:
        for data, _, _ in reader.json(GAP_TOPIC):
            if b"the file was damaged" in data:
                yield json.loads(data)


def test_bytes_that_are_gone_from_an_index_of_messages_cost_no_chunk(original: Original, tmp_path: Path) -> None:
    """Its length then reaches into the chunk behind it."""
    everything = Counter(record for chunk in original.chunks.values() for record in chunk)
    for start, end in original.of(Opcode.MESSAGE_INDEX):
        out, _ = recovered(tmp_path, original.content[: end - 19] + original.content[end - 6 :])
        assert Counter(record for chunk in stored(out) for record in chunk if not ours(record)) == everything, start


@settings(max_examples=150)
@given(data=st.data())
def test_whatever_happens_to_a_file_all_the_rest_of_it_is_saved(
    original: Original, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hurt = data.draw(hurts(original.content))
    first = min(original.chunks)[0]
    folder = tmp_path_factory.getbasetemp()
    if hurt.content == original.content:
        return
    refused = ""
    try:
        out, made = recovered(folder, hurt.content)
    except RecordingError as error:
        refused = str(error)
    if refused:
        # What a recording says of itself is not to be guessed; only damage there, or to its attachments, refuses all.
        last = [start for start, _ in original.of(Opcode.ATTACHMENT)][-1]
        assert hurt.start < first or (hurt.start < last + 400 and hurt.end > last), refused
        assert str(folder / "damaged.mcap") in refused
        assert not (folder / "whole.mcap").exists()
        return
    assert damage(out) is None
    saved = [record for chunk in stored(out) for record in chunk]
    everything = [record for chunk in original.chunks.values() for record in chunk]
    kept = [record for record in saved if not ours(record)]
    rest = iter(everything)
    assert all(record in rest for record in kept)  # all are of the original, and in its order
    intact = [chunk for (start, end), chunk in original.chunks.items() if end <= hurt.start or start >= hurt.end]
    assert not Counter(record for chunk in intact for record in chunk) - Counter(kept)
    with RecordingReader(out) as reader:
        assert sum(1 for _ in reader.messages(beats=True)) == sum(r[0] in ("words", "more", "/beat") for r in kept)
        assert (reader.info.rig, reader.info.calibrations) == (INFO.rig, INFO.calibrations)
        assert reader.info.complete == made.complete
        assert made.complete <= (len(kept) == len(everything))
    assert made.saved == dict(sorted(Counter(record[0] for record in kept).items()))
    lacks = Counter(record[0] for record in everything) - Counter(record[0] for record in kept)
    if made.damage.counted:
        assert made.damage.lost == dict(lacks)
    assert not Counter(made.damage.lost) - lacks
    there = set(numbers(out))
    (folder / "original.mcap").write_bytes(original.content)
    before = set(numbers(folder / "original.mcap")) | {("more", 0, n) for n in range(20, 25)}
    for gap in gaps(out):
        if "stream" in gap:
            named = {(gap["stream"], gap["epoch"], seq) for seq in range(gap["from"], gap["to"] + 1)}
            assert named <= before - there


@pytest.mark.parametrize("left", [4, 7, 8, 30])
def test_bytes_that_are_gone_before_the_last_ones_make_no_killed_recorder(
    original: Original, tmp_path: Path, left: int
) -> None:
    (start, end), *_ = list(original.chunks)[-1:]
    (tmp_path / "hurt.mcap").write_bytes(original.content[: (start + end) // 2] + original.content[-left:])
    with pytest.raises(RecordingError, match=r"is damaged from byte .* on, before its end"):
        RecordingReader(tmp_path / "hurt.mcap")


@pytest.mark.parametrize("opcode", [1, 7, 15, 128, 255])
def test_a_chunk_that_says_no_longer_that_it_is_one_is_not_passed_over(
    original: Original, opcode: int, tmp_path: Path
) -> None:
    path = tmp_path / "hurt.mcap"
    path.write_bytes(original.content)
    with RecordingReader(path) as reader:
        at = min(chunk.offset for chunk in reader._chunks)
    hurt = bytearray(original.content)
    hurt[at] = opcode
    path.write_bytes(hurt)
    with pytest.raises(RecordingError, match=f"what lies at byte {at} is no chunk, and its index lists one there"):
        RecordingReader(path)


@settings(max_examples=150)
@given(data=st.data())
def test_no_damage_passes_an_ordinary_reader_unseen(
    original: Original, data: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """It gives all, or refuses; only a file whose last bytes are gone, or zeros, is one of a recorder that was killed,
    and gives what is before them as incomplete."""
    hurt = data.draw(hurts(original.content))
    path, whole = tmp_path_factory.getbasetemp() / "hurt.mcap", tmp_path_factory.getbasetemp() / "unhurt.mcap"
    path.write_bytes(hurt.content)
    whole.write_bytes(original.content)
    with RecordingReader(whole) as reader:
        everything, info = list(reader.messages(beats=True)), reader.info
    try:
        with RecordingReader(path) as reader:
            found, said = list(reader.messages(beats=True)), reader.info
    except RecordingError:
        return
    if found == everything and said == info:
        return
    # Up to three bytes of the end may be what a cut leaves by chance; four or more are told.
    assert hurt.end > len(original.content) - 4
    assert not said.complete
    rest = iter(everything)
    assert all(one in rest for one in found)
    assert msgspec.structs.replace(said, rig=None, calibrations={}, note="") == msgspec.structs.replace(
        info, rig=None, calibrations={}, complete=False, note="")  # fmt: skip


# Kinds of damage, one by one.


@pytest.mark.parametrize(
    "options",
    [
        {"enable_crcs": False},
        {"use_summary_offsets": False},
        {"repeat_channels": False, "repeat_schemas": False},
        {
            "repeat_channels": False, "repeat_schemas": False, "use_statistics": False, "use_summary_offsets": False,
            "index_types": IndexType.NONE,
        },
    ],
)  # fmt: skip
def test_what_another_tool_wrote_anew_is_not_damaged(
    original: Original, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Sums, and parts of the index or all of it, are left to who writes an MCAP file."""
    path, anew = written_anew(original, tmp_path, **options)
    with RecordingReader(path) as was, RecordingReader(anew) as found:
        assert (found.info.session, found.info.complete) == ("s1", True)
        assert [m.header for m, _ in found.messages()] == [m.header for m, _ in was.messages()]
    assert damage(anew) is None


@pytest.mark.parametrize("end", [None, -1000])
def test_what_another_tool_wrote_without_chunks_is_refused_and_not_called_damaged(
    original: Original, tmp_path: Path, end: int | None
) -> None:
    _, anew = written_anew(original, tmp_path, use_chunking=False)
    anew.write_bytes(anew.read_bytes()[:end])
    said = r"anew by another tool, and without chunks.*: mcap compress anew\.mcap"
    with pytest.raises(RecordingError, match=said):
        RecordingReader(anew)
    with pytest.raises(RecordingError, match=said):
        recover(anew, tmp_path / "out.mcap")
    with pytest.raises(RecordingError, match=said):
        info([anew], json=True)


def test_a_recording_is_read_once_to_be_recovered(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To look for what another tool wrote needs no second reader, which decodes all chunks where the end is missing."""
    path, opened = tmp_path / "cut.mcap", []
    path.write_bytes(original.content[:-1000])
    begin = RecordingReader.__init__

    def beginning(self: RecordingReader, path: Path) -> None:
        opened.append(type(self))
        begin(self, path)

    monkeypatch.setattr(RecordingReader, "__init__", beginning)
    recover(path, tmp_path / "out.mcap")
    assert opened == [SalvagedReader]


def written_anew(original: Original, folder: Path, **options: Any) -> tuple[Path, Path]:
    """A recording, and what another tool makes of it."""
    path, anew = folder / "original.mcap", folder / "anew.mcap"
    path.write_bytes(original.content)
    with path.open("rb") as file:
        reader, writer = make_reader(file), Writer(str(anew), **options)
        writer.start()
        for facts in reader.iter_metadata():
            writer.add_metadata(facts.name, facts.metadata)
        ids: dict[str, int] = {}
        for kind, channel, one in reader.iter_messages(log_time_order=False):
            assert kind is not None
            if channel.topic not in ids:
                number = writer.register_schema(kind.name, kind.encoding, kind.data)
                ids[channel.topic] = writer.register_channel(
                    channel.topic, channel.message_encoding, number, channel.metadata
                )
            writer.add_message(ids[channel.topic], one.log_time, one.data, one.publish_time, one.sequence)
        writer.finish()  # type: ignore[no-untyped-call]
    return path, anew


def middle(original: Original) -> tuple[int, int]:
    return sorted(original.chunks)[len(original.chunks) // 2]


def test_a_lost_chunk_becomes_gaps_and_is_told(original: Original, tmp_path: Path) -> None:
    start, end = middle(original)
    out, made = recovered(tmp_path, flipped(original.content, end - 30).content)
    gone = original.chunks[start, end]
    assert made.damage.lost == dict(sorted(Counter(record[0] for record in gone).items()))
    assert made.damage.counted
    (hole,) = made.damage.holes
    assert hole.from_byte == start
    assert hole.to_byte == end
    assert (hole.from_ns, hole.to_ns) == (min(r[1] for r in gone) - UNIX, max(r[1] for r in gone) - UNIX)
    lost = {(gap["stream"], gap["epoch"], n) for gap in gaps(out) if "stream" in gap
            for n in range(gap["from"], gap["to"] + 1)}  # fmt: skip
    (tmp_path / "original.mcap").write_bytes(original.content)
    assert lost == set(numbers(tmp_path / "original.mcap")) - set(numbers(out))
    with RecordingReader(out) as reader:
        assert not reader.info.complete
        assert f"words {made.damage.lost['words']}" in reader.info.note
        assert reader.info.extra["recovered_from"] == "damaged.mcap"
        assert reader.attachments["more.bin"] == bytes(range(256))
    with pytest.raises(ConfigError, match="is whole"):
        recover(out, tmp_path / "again.mcap")


def test_lost_windows_and_predictions_are_in_gaps_of_their_own(original: Original, tmp_path: Path) -> None:
    start, end = next(span for span, records in original.chunks.items() if any(r[0] == "/prediction" for r in records))
    steps = [json.loads(record[4])["step"] for record in original.chunks[start, end] if record[0] == "/manifest"]
    out, _ = recovered(tmp_path, flipped(original.content, end - 30).content)
    found = [gap for gap in gaps(out) if "stream" not in gap]
    assert [(gap["from"], gap["to"], gap.get("of", "window")) for gap in found] == [
        (steps[0], steps[-1], "window"), (steps[0], steps[-1], "prediction")]  # fmt: skip


def test_what_the_recorder_lost_itself_is_in_no_second_gap(original: Original, tmp_path: Path) -> None:
    """The chunk before the recorder's own gap of ``more`` 20 to 24 is lost, up to 19."""
    spans = sorted(original.chunks)
    at = next(n for n, span in enumerate(spans) if any(record[0] == GAP_TOPIC for record in original.chunks[span]))
    out, _ = recovered(tmp_path, flipped(original.content, spans[at - 1][1] - 30).content)
    named = {n for gap in gaps(out) if gap.get("stream") == "more" for n in range(gap["from"], gap["to"] + 1)}
    assert named
    assert not named & set(range(20, 25))


HARMLESS = {
    "magic": lambda o: 3,
    "head": lambda o: 12,
    "times of a chunk": lambda o: middle(o)[0] + 9 + 2,
    "index of messages": lambda o: o.of(Opcode.MESSAGE_INDEX)[3][0] + 20,
    "length of an index of messages": lambda o: o.of(Opcode.MESSAGE_INDEX)[3][0] + 2,
    "schema at the end": lambda o: o.of(Opcode.SCHEMA)[0][0] + 30,
    "channel at the end": lambda o: o.of(Opcode.CHANNEL)[0][0] + 20,
    "statistics": lambda o: o.of(Opcode.STATISTICS)[0][0] + 12,
    "index of chunks": lambda o: o.of(Opcode.CHUNK_INDEX)[2][0] + 12,
    "footer": lambda o: o.of(Opcode.FOOTER)[0][0] + 12,
    "sum of the data": lambda o: o.of(Opcode.DATA_END)[0][1] - 2,
    "end": lambda o: len(o.content) - 3,
}


@pytest.mark.parametrize("where", HARMLESS)
def test_damage_that_costs_no_message_leaves_the_session_complete(
    original: Original, tmp_path: Path, where: str
) -> None:
    out, made = recovered(tmp_path, flipped(original.content, HARMLESS[where](original)).content)
    assert [record for chunk in stored(out) for record in chunk] == [r for c in original.chunks.values() for r in c]
    assert made.complete
    assert len(made.damage.holes) == 1
    assert not made.damage.lost


def test_what_lies_before_the_last_words_is_missed_without_an_index(original: Original, tmp_path: Path) -> None:
    """They say how the recorder ended, and not that all before them is there."""
    start, end = max(original.chunks)
    content = flipped(original.content, end - 30).content[: original.of(Opcode.DATA_END)[0][0]]
    _, made = recovered(tmp_path, content)
    assert not made.complete
    assert "damaged, and recovered without what is lost" in made.note
    assert made.damage.holes[0].from_byte == start
    assert (made.damage.holes[0].from_ns is not None, made.damage.holes[0].to_ns) == (True, None)
    _, made = recovered(tmp_path, original.content[: original.of(Opcode.DATA_END)[0][0]] + b"more")
    assert made.complete


def test_bytes_behind_the_end_are_left_out(original: Original, tmp_path: Path) -> None:
    out, made = recovered(tmp_path, original.content + b"more")
    assert made.complete
    assert (made.damage.holes[0].from_byte, made.damage.holes[0].to_byte) == (
        len(original.content), len(original.content) + 4)  # fmt: skip
    assert damage(out) is None


def test_a_file_that_ends_too_early_gets_an_end(original: Original, tmp_path: Path) -> None:
    start, _ = middle(original)
    out, made = recovered(tmp_path, original.content[:start])
    assert not made.complete
    assert made.note == "its end is missing"
    _, made = recovered(tmp_path, original.content[: start + 50])
    assert made.note == "its end is missing"
    assert [hole.from_byte for hole in made.damage.holes] == [start]
    kept = [records for span, records in sorted(original.chunks.items()) if span < middle(original)]
    assert [record for chunk in stored(out) for record in chunk] == [record for chunk in kept for record in chunk]


def test_a_chunk_in_the_bytes_of_a_lost_one_is_no_chunk(tmp_path: Path) -> None:
    """A message may hold another recording; where its chunk is damaged that must not be taken for a part of this."""
    inner = write(tmp_path / "inner.mcap").content
    with RecordingWriter(tmp_path / "a.mcap", INFO, "none", chunk_bytes=1) as writer:
        for n in range(4):
            text = message(TextLayout(len(inner)), inner, stream="words", seq=n, t=n)
            writer.write(text, n)
    content = (tmp_path / "a.mcap").read_bytes()
    start, _ = [(a, b) for kind, a, b in places(content) if kind == Opcode.CHUNK][2]
    out, made = recovered(tmp_path, flipped(content, start + 2).content)  # its length: what lies in it is searched
    assert made.saved == {"words": 3}
    assert [seq for _, _, seq in numbers(out)] == [0, 1, 3]


# What refuses all.


def test_however_much_a_recording_says_of_itself_it_is_read(tmp_path: Path) -> None:
    said = SessionInfo(session="s1", unix_ns=UNIX, extra={"more": "x" * 100_000})
    with RecordingWriter(tmp_path / "a.mcap", said) as writer:
        writer.write(message(TextLayout(3), b"abc", stream="words"), 0)
    out, made = recovered(tmp_path, flipped((tmp_path / "a.mcap").read_bytes(), 12).content)
    assert made.saved == {"words": 1}
    with RecordingReader(out) as reader:
        assert reader.info.extra == said.extra | {"recovered_from": "damaged.mcap"}


def test_damaged_words_of_the_session_refuse_all(original: Original, tmp_path: Path) -> None:
    (start, end), *_ = original.of(Opcode.METADATA)
    hurt = flipped(original.content, original.content.index(b"unix_ns") + 14)
    assert start < hurt.start < end
    with pytest.raises(RecordingError, match=r"damaged\.mcap is damaged where it says whose session it is"):
        recovered(tmp_path, hurt.content)
    with pytest.raises(RecordingError, match="`sensorium` says does not match its sum"):
        RecordingReader(tmp_path / "damaged.mcap")


def test_without_a_sum_of_their_own_damaged_words_are_found_by_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in recordings of before there was one."""
    monkeypatch.setattr(RecordingWriter, "_add_facts", lambda self, name, facts: self._writer.add_metadata(name, facts))
    content = write(tmp_path / "a.mcap").content
    with pytest.raises(RecordingError, match="it may be what it says of its session"):
        recovered(tmp_path, flipped(content, content.index(b"unix_ns") + 14).content)


def test_a_damaged_rig_is_left_out_only_if_asked(original: Original, tmp_path: Path) -> None:
    (start, end), *_ = original.of(Opcode.ATTACHMENT)
    hurt = flipped(original.content, start + 90).content
    with pytest.raises(RecordingError, match=r"cannot be had: `rig\.yaml`\. .* add --partial"):
        recovered(tmp_path, hurt)
    out, made = recovered(tmp_path, hurt, partial=True)
    assert [(hole.from_byte, hole.to_byte, hole.what) for hole in made.damage.holes] == [(start, end, "`rig.yaml`")]
    with RecordingReader(out) as reader:
        assert reader.info.rig is None
        assert reader.info.calibrations == INFO.calibrations
        assert not reader.info.complete
    assert [record for chunk in stored(out) for record in chunk] == [r for c in original.chunks.values() for r in c]
    with pytest.raises(RecordingError, match=r"its attachment `rig\.yaml` does not match its sum"):
        RecordingReader(tmp_path / "damaged.mcap")


def test_messages_of_which_nothing_tells_what_they_are(original: Original, tmp_path: Path) -> None:
    """The first chunk, where schemas are, and the end, where they are again, are both lost."""
    first, second, *_ = sorted(original.chunks)
    hurt = flipped(original.content[: middle(original)[0]], first[1] - 30).content
    with pytest.raises(RecordingError, match="what the messages of channel 1 are"):
        recovered(tmp_path, hurt)
    out, made = recovered(tmp_path, hurt, partial=True)
    assert "words" not in made.saved
    assert not [record for chunk in stored(out) for record in chunk if record[0] == "words"]
    assert second in original.chunks


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"RIFF....WAVE", "no MCAP file"), (b"\x89MCAP0\r\n", "died before")]
)
def test_what_is_no_recording_is_said_to_be_none(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(RecordingError, match=words):
        recovered(tmp_path, content)


# Readers.


def test_an_ordinary_reader_refuses_and_names_the_way_out(original: Original, tmp_path: Path) -> None:
    start, end = middle(original)
    index = original.of(Opcode.MESSAGE_INDEX)[3][0]
    torn = original.content[: end + 40]
    early = sorted(original.chunks)[1]
    damaged = {
        "a chunk": flipped(original.content, end - 30).content,
        "length of a chunk": flipped(original.content, start + 3).content,
        "length of an index": flipped(original.content, index + 2).content,
        "a hole": original.content[: start + 50] + original.content[end - 50 :],
        "zeros": original.content[:start] + bytes(2000) + original.content[start + 2000 :],
        "the head": flipped(original.content, 12).content,
        "times of a chunk": flipped(original.content, start + 9 + 2).content,
        "the index": flipped(original.content, original.of(Opcode.CHANNEL)[0][0] + 20).content,
        "the end": flipped(original.content, len(original.content) - 3).content,
        "a chunk of a torn file": flipped(torn, early[1] - 30).content,
    }
    for what, content in damaged.items():
        path = tmp_path / "damaged.mcap"
        path.write_bytes(content)
        with pytest.raises(RecordingError, match=r"is damaged.*sensorium recover .*damaged\.mcap -o"):  # noqa: SIM117
            with RecordingReader(path) as reader:
                assert list(reader.messages(beats=True)), what


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64, 128])
def test_a_damaged_length_is_found_where_it_is(original: Original, tmp_path: Path, bits: int) -> None:
    """And not where it leads to."""
    start, _ = middle(original)
    before = max(end for _, end in original.chunks if end <= start)
    (tmp_path / "a.mcap").write_bytes(flipped(original.content, start + 2, bits).content)
    with pytest.raises(RecordingError, match=r"is damaged (in the chunk at|from) byte \d+") as raised:
        RecordingReader(tmp_path / "a.mcap")
    assert before <= int(str(raised.value).split(" byte ")[1].split()[0].rstrip(":")) <= start


def test_a_salvaged_recording_reads_as_the_recovered_one(original: Original, tmp_path: Path) -> None:
    start, _ = middle(original)
    out, _ = recovered(tmp_path, zeroed(original.content, start // BLOCK).content)
    with SalvagedReader(tmp_path / "damaged.mcap") as damaged, RecordingReader(out) as whole:
        assert summarise(damaged) == summarise(whole)
        assert list(damaged.messages(beats=True)) == list(whole.messages(beats=True))
        assert (damaged.topics, damaged.streams, damaged.counts()) == (whole.topics, whole.streams, whole.counts())
        assert {topic: list(damaged.json(topic)) for topic in ("/manifest", "/label")} == {
            topic: list(whole.json(topic)) for topic in ("/manifest", "/label")
        }
        assert sorted(damaged.json(GAP_TOPIC)) == sorted(whole.json(GAP_TOPIC))
        assert damaged.info.note == whole.info.note


def test_a_stream_of_which_nothing_is_left_is_none(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", INFO, chunk_bytes=1) as writer:
        for n, stream in enumerate(("words", "once", "words")):
            writer.write(message(TextLayout(3), b"abc", stream=stream, seq=n // 2, t=n), n)
    content = (tmp_path / "a.mcap").read_bytes()
    start, end = [(a, b) for kind, a, b in places(content) if kind == Opcode.CHUNK][1]
    (tmp_path / "b.mcap").write_bytes(flipped(content, end - 3).content)
    with SalvagedReader(tmp_path / "b.mcap") as reader:
        assert set(reader.streams) == {"words"}
        assert reader.damage.lost == {"once": 1}
        assert reader.damage.holes[0].from_byte == start
        assert list(explain(Session(reader)).streams) == ["words"]


def test_a_segment_of_a_ring(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 16 << 20)
    writer = RingWriter(ring, SessionInfo(session="s1", unix_ns=UNIX), 0, segment_ns=100)
    for n in range(300):
        writer.write(message(TextLayout(9), b"%09d" % n, stream="words", seq=n, t=n), n)
        if n % 20 == 19:
            writer._segment.flush()
    writer.close()
    segment = sorted((tmp_path / "ring").iterdir())[1]
    content = segment.read_bytes()
    (_, end), *_ = [(a, b) for kind, a, b in places(content) if kind == Opcode.CHUNK]
    out, made = recovered(tmp_path, flipped(content, end - 3).content)
    with RecordingReader(segment) as before, RecordingReader(out) as after:
        assert (after.info.ring, after.info.since) == (before.info.ring, before.info.since)
        first = before.info.since["words"][1] if before.info.since else 0
        (gap,) = gaps(out)
        assert (gap["from"], gap["to"]) == (first, first + made.damage.lost["words"] - 1)
        there = [header.seq for header, _ in after.headers()]
        assert there[0] == gap["to"] + 1
        assert summarise(after)["streams"]["words"]["lost"] == made.damage.lost["words"]


def test_a_ring_leaves_a_segment_alone_whose_beginning_is_damaged(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "ring", 16 << 20)
    RingWriter(ring, SessionInfo(session="s1", unix_ns=UNIX), 0, segment_ns=100).close()
    (segment,) = (tmp_path / "ring").iterdir()
    content = segment.read_bytes()
    segment.write_bytes(flipped(content, content.index(b'"messages"') + 1).content)  # of what was deleted
    again = Ring(tmp_path / "ring", 16 << 20)
    again.close()
    assert again.strangers == [segment.name]


# Writing.


def test_nothing_half_done_looks_whole(original: Original, tmp_path: Path) -> None:
    hurt = flipped(original.content, middle(original)[1] - 30).content
    seen: list[bool] = []

    def watch(t_ns: int) -> None:
        (part,) = tmp_path.glob("whole*")
        assert part.name != "whole.mcap"
        with RecordingReader(part) as reader:
            seen.append(reader.info.complete)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recovered(tmp_path, hurt, progress=watch)
    assert seen == [False] * 5
    assert not list(tmp_path.glob("whole*"))


def test_nothing_is_overwritten(original: Original, tmp_path: Path) -> None:
    path, out = tmp_path / "damaged.mcap", tmp_path / "whole.mcap"
    path.write_bytes(flipped(original.content, middle(original)[1] - 30).content)
    out.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        recover(path, out)
    out.unlink()
    with pytest.raises(ConfigError, match="exists already"):  # somebody else's, made meanwhile
        recover(path, out, progress=lambda t_ns: None if out.exists() else out.write_bytes(b"mine"))
    assert out.read_bytes() == b"mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged.mcap", "whole.mcap"]


def test_what_is_still_being_written_is_not_recovered(tmp_path: Path) -> None:
    path, out = tmp_path / "new.mcap", tmp_path / "whole.mcap"
    with RecordingWriter(path, INFO) as writer:
        writer.write(message(TextLayout(1), b"a", stream="words", seq=0, t=0), 0)
        writer.flush()
        with pytest.raises(ConfigError, match=r"being written at this moment.*Stop that session first"):
            recover(path, out)
        assert "incomplete: it is being written at this moment" in " ".join(sensorium("info", path).stdout.split())
        copy = tmp_path / "copy.mcap"
        copy.write_bytes(path.read_bytes())
        assert recover(copy, out).note == "its end is missing"
    with pytest.raises(ConfigError, match="is whole"):
        recover(path, tmp_path / "second.mcap")


def test_what_cannot_be_opened_is_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="cannot be opened"):
        recover(tmp_path / "none.mcap", tmp_path / "whole.mcap")


def test_memory_holds_a_chunk_and_not_the_file(tmp_path: Path) -> None:
    payload = bytes(np.random.default_rng(1).integers(32, 127, 200_000, dtype=np.uint8))
    with RecordingWriter(tmp_path / "a.mcap", INFO, "none", chunk_bytes=1) as writer:
        for n in range(60):
            writer.write(message(TextLayout(len(payload)), payload, stream="words", seq=n, t=n), n)
    content = (tmp_path / "a.mcap").read_bytes()
    spans = [(a, b) for kind, a, b in places(content) if kind == Opcode.CHUNK]
    (tmp_path / "b.mcap").write_bytes(flipped(content, spans[30][1] - 30).content)
    del content
    tracemalloc.start()
    try:
        made = recover(tmp_path / "b.mcap", tmp_path / "c.mcap")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.saved == {"words": 59}
    assert peak < 6_000_000  # of 12 MB; a chunk has 0.2 MB


# The command line.


def sensorium(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


@pytest.fixture
def plain(tmp_path: Path) -> Original:
    """A session that ran without a model."""
    return write(tmp_path / "plain.mcap", steps=False)


@pytest.fixture
def damaged(plain: Original, tmp_path: Path) -> Path:
    path = tmp_path / "damaged.mcap"
    path.write_bytes(flipped(plain.content, middle(plain)[1] - 30).content)
    return path


def test_info_shows_what_is_left_and_where_it_is_damaged(plain: Original, damaged: Path) -> None:
    start, end = middle(plain)
    result = sensorium("info", damaged, "--json")
    assert result.exit_code == 3
    found = json.loads(result.stdout)
    jsonschema.validate(found, schema("info"))
    assert not found["complete"]
    assert found["damage"]["lost"]["words"] == sum(r[0] == "words" for r in plain.chunks[start, end])
    assert [(hole["from_byte"], hole["to_byte"]) for hole in found["damage"]["holes"]] == [(start, end)]
    text = sensorium("info", damaged)
    assert text.exit_code == 3
    said = " ".join(text.stdout.split())
    assert f"bytes {start} to {end}: messages, which came from" in said
    assert f"sensorium recover {damaged}" in said


def test_info_finds_what_no_reader_minds(plain: Original, tmp_path: Path) -> None:
    path = tmp_path / "damaged.mcap"
    path.write_bytes(flipped(plain.content, plain.of(Opcode.MESSAGE_INDEX)[3][0] + 20).content)
    result = sensorium("info", path, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["complete"]
    path.write_bytes(plain.content)
    result = sensorium("info", path, "--json")
    assert result.exit_code == 0
    assert "damage" not in json.loads(result.stdout)


def test_recover_says_what_it_saved_and_what_it_lost(damaged: Path, tmp_path: Path) -> None:
    before = damaged.read_bytes()
    out = tmp_path / "whole.mcap"
    result = sensorium("recover", damaged, "-o", out, "--json")
    assert result.exit_code == 0
    made = json.loads(result.stdout)
    assert made["saved"]["words"] + made["damage"]["lost"]["words"] == 120
    assert not made["complete"]
    assert damaged.read_bytes() == before
    assert sensorium("info", out).exit_code == 0
    again = sensorium("recover", damaged, "-o", out)
    assert isinstance(again.exception, ConfigError)
    text = sensorium("recover", damaged, "-o", tmp_path / "second.mcap")
    assert text.exit_code == 0
    assert f"words {made['saved']['words']} {made['damage']['lost']['words']}" in " ".join(text.stdout.split())
    assert "incomplete" in text.stdout
