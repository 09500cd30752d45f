"""Slots, leases and leftovers of the shared-memory ring."""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clock import ManualClock
from pipeline.errors import ConfigError, WireError
from pipeline.session import FileLock, SessionFolder, remove_leftovers
from pipeline.shm import ROWS, Ring, RingReader, RingSpec, Segment, new_name, remove_segment, unlink
from pipeline.wire import Slot

SPEC = RingSpec(slots=3, slot_bytes=5000, lease_ms=100)
CAMERA = frozenset({"camera"})


def ring(spec: RingSpec = SPEC, *, expire: bool = True) -> tuple[Ring, ManualClock]:
    clock = ManualClock()
    return Ring(Segment.private(new_name(), spec), spec, clock, expire=expire), clock


def reader_of(ring: Ring, token: int, streams: frozenset[str] = CAMERA) -> tuple[RingReader, int]:
    reader = RingReader(ring.segment)
    row = ring.add_reader(token, streams)
    reader.grant(row, token, ring.next_generation)
    return reader, row


def put(ring: Ring, content: int, stream: str = "camera") -> Slot | None:
    index = ring.acquire()
    if index is None:
        return None
    slot = ring.lend(index, stream, 5000)
    ring.fill(slot, np.full(5000, content, np.uint8))
    return slot


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder /dev/shm on this system")
def test_a_segment_has_its_exact_name_is_private_and_takes_all_its_memory_at_once() -> None:
    name = new_name()
    segment = Segment.create(name, SPEC)
    try:
        info = os.stat("/dev/shm" + name)
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert info.st_blocks * 512 >= info.st_size >= 3 * 5000
        assert len(name) <= 31
        other = Segment.attach(name)
        assert (other.slots, other.stride, other.offset) == (segment.slots, segment.stride, segment.offset)
        with pytest.raises(TypeError):
            other.data[other.offset] = 1
    finally:
        assert unlink(name)
    assert not unlink(name)


def test_attaching_from_another_process_never_removes_the_segment() -> None:
    name = new_name()
    Segment.create(name, SPEC)
    code = f"from pipeline.shm import Segment; print(Segment.attach({name!r}).slots)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("3\n", "")
    assert unlink(name)


def test_too_little_shared_memory_is_refused_with_the_sizes_and_leaves_nothing() -> None:
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system does not allocate shared memory in advance: no posix_fallocate")
    name = new_name()
    with pytest.raises(ConfigError, match=r"needs 3145728\.\d MiB of .*/dev/shm has [\d.]+ MiB free of"):
        Segment.create(name, RingSpec(slots=3, slot_bytes=1 << 40))
    assert not unlink(name)


@pytest.mark.parametrize("wrong", [{"slots": 1}, {"slots": 2000}, {"slot_bytes": 0}, {"lease_ms": 0}])
def test_a_ring_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="2 to 1024 slots"):
        RingSpec(**{"slots": 4, "slot_bytes": 10, **wrong})


def test_what_is_no_ring_is_not_mapped() -> None:
    with pytest.raises(WireError, match="not a name"):
        Segment.attach("/etc/passwd")
    with pytest.raises(FileNotFoundError):
        Segment.attach(new_name())
    name = new_name()
    segment = Segment.create(name, SPEC)
    segment.words[0] = 1
    with pytest.raises(WireError, match="layout"):
        Segment.attach(name)
    unlink(name)


def test_without_readers_one_slot_serves_all() -> None:
    made, _ = ring()
    assert {put(made, k).index for k in range(10)} == {0}  # type: ignore[union-attr]


def test_the_slot_freed_last_is_used_first() -> None:
    made, _ = ring()
    reader, _ = reader_of(made, 1)
    first, second, third = (put(made, k) for k in range(3))
    assert first
    assert second
    assert third
    assert put(made, 3) is None
    for slot in (first, second, third):
        reader.hold(slot)
    reader.release(first)
    reader.release(second)
    assert put(made, 4).index == second.index  # type: ignore[union-attr]


def test_a_slot_is_not_reused_while_one_of_two_readers_holds_it() -> None:
    made, _ = ring(RingSpec(2, 5000))
    one, _ = reader_of(made, 1)
    two, _ = reader_of(made, 2)
    a, b = put(made, 1), put(made, 2)
    assert a
    assert b
    for reader in (one, two):
        reader.hold(a)
        reader.hold(b)
    one.release(a)
    one.release(b)
    assert put(made, 3) is None
    two.release(b)  # its floor stays at a, which it still holds
    assert put(made, 3) is None
    two.release(a)
    assert put(made, 3) is not None


def test_what_was_skipped_counts_as_released() -> None:
    made, _ = ring()
    reader, _ = reader_of(made, 1)
    put(made, 1)
    put(made, 2)
    last = put(made, 3)
    assert last
    reader.hold(last)
    reader.release(last)
    assert [put(made, k) is not None for k in range(4)] == [True, True, True, False]


def test_a_reader_of_other_streams_holds_nothing_up() -> None:
    made, _ = ring()
    reader_of(made, 1, frozenset({"lidar"}))
    assert all(put(made, k) for k in range(10))
    assert [put(made, k, "lidar") is not None for k in range(4)] == [True, True, True, False]


def test_a_lease_that_ran_out_costs_its_reader_the_slot_and_is_counted() -> None:
    made, clock = ring(RingSpec(2, 5000, lease_ms=100))
    reader, _ = reader_of(made, 1)
    a, b = put(made, 1), put(made, 2)
    assert a
    assert b
    view = reader.hold(a)
    clock.advance(99_999_999)
    assert put(made, 3) is None
    assert reader.valid(a)
    assert view[0] == 1
    clock.advance(1)
    assert put(made, 3) is not None
    assert made.counters.expired == 1
    assert not reader.valid(a)
    assert reader.valid(b)


def test_leases_never_run_out_where_nothing_may_be_lost() -> None:
    made, clock = ring(RingSpec(2, 5000, lease_ms=1), expire=False)
    reader_of(made, 1)
    put(made, 1)
    put(made, 2)
    clock.advance(10**12)
    assert put(made, 3) is None


def test_a_reader_that_died_frees_what_it_held() -> None:
    made, _ = ring()
    reader, row = reader_of(made, 1)
    held = [put(made, k) for k in range(3)]
    assert put(made, 4) is None
    made.remove_reader(row)
    assert made.counters.revoked == 1
    assert put(made, 4) is not None
    _, again = reader_of(made, 2)
    assert again == row
    before = made.segment.words[made.segment.row(row)]
    assert held[0] is not None
    reader.hold(held[0])
    reader.release(held[0])  # the dead reader's row belongs to another now
    assert made.segment.words[made.segment.row(row)] == before


def test_more_readers_than_rows_read_without_a_lease() -> None:
    made, _ = ring()
    for token in range(ROWS):
        reader_of(made, token + 1)
    reader, row = reader_of(made, ROWS + 1)
    assert (row, made.counters.unleased) == (-1, 1)
    slot = put(made, 1)
    assert slot
    assert reader.hold(slot)[0] == 1
    reader.release(slot)


def test_a_loan_is_published_without_a_copy_and_returns_when_forgotten() -> None:
    made, _ = ring(RingSpec(2, 5000))
    reader_of(made, 1)
    loan = made.loan(4000)
    assert loan is not None
    view = loan.reshape(40, 100)
    del loan
    gc.collect()
    assert made.acquire() is not None  # the other slot
    assert made.loan(10) is None  # the view keeps the first loan alive
    view[:] = 7
    index = made.loaned(view.reshape(-1))
    assert index is not None
    assert made.loaned(view.reshape(-1)) is None  # published once only
    slot = made.lend(index, "camera", view.nbytes)
    made.fill(slot, None)
    assert RingReader(made.segment).hold(slot)[3999] == 7


def test_a_forgotten_loan_comes_back() -> None:
    made, _ = ring(RingSpec(2, 5000))
    for _ in range(20):
        assert made.loan(5000) is not None
    assert made.loaned(np.zeros(10, np.uint8)) is None


@pytest.mark.parametrize(
    ("index", "generation", "length"), [(-1, 1, 1), (3, 1, 1), (0, 1, 10**9), (0, 1, -1), (0, 0, 1), (0, 99, 1)]
)
def test_a_descriptor_that_cannot_be_is_refused(index: int, generation: int, length: int) -> None:
    made, _ = ring()
    put(made, 1)
    with pytest.raises(WireError, match="descriptor"):
        RingReader(made.segment).check(Slot(made.segment.name, index, generation, length))


@given(st.data())
def test_no_interleaving_overwrites_what_is_held(data: st.DataObject) -> None:
    """Against a model: what is held keeps its content, and a slot is refused only while all are held or awaited."""
    made, _ = ring(RingSpec(3, 64))
    readers = [reader_of(made, token) for token in (1, 2)]
    sent: dict[int, list[tuple[Slot, int]]] = {0: [], 1: []}  # on the way to each reader
    held: dict[int, list[tuple[Slot, int]]] = {0: [], 1: []}
    for content in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["put", "put", "take", "skip", "release", "release"]))
        who = data.draw(st.sampled_from([0, 1]))
        reader = readers[who][0]
        if action == "put":
            index = made.acquire()
            floors = [min((s.generation for s, _ in held[w] + sent[w]), default=10**9) for w in (0, 1)]
            busy = [g for g in range(max(1, made.next_generation - 3), made.next_generation) if g >= min(floors)]
            if index is None:
                assert len(busy) == 3
                continue
            slot = made.lend(index, "camera", 64)
            made.fill(slot, np.full(64, content, np.uint8))
            for w in (0, 1):
                sent[w].append((slot, content))
        elif action == "take" and sent[who]:
            slot, what = sent[who].pop(0)
            reader.hold(slot)
            held[who].append((slot, what))
        elif action == "skip" and sent[who]:
            slot, _ = sent[who].pop(0)
            reader.hold(slot)
            reader.release(slot)
        elif action == "release" and held[who]:
            slot, _ = held[who].pop(data.draw(st.integers(0, len(held[who]) - 1)))
            reader.release(slot)
        for w in (0, 1):
            for slot, what in held[w] + sent[w]:
                assert readers[w][0].valid(slot)
                assert set(made.memory(slot.index, 64)) == {what}


def test_the_folder_of_a_session_is_for_its_user_alone(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    with pytest.raises(ConfigError, match="mode 755"):
        SessionFolder(open_to_all)
    session = SessionFolder(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    session.close(remove=True)
    assert not (tmp_path / "new").exists()


def test_only_sessions_without_a_living_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    living = SessionFolder(tmp_path / "living")
    name = new_name()
    Segment.create(name, SPEC)
    code = (
        "import sys; from pathlib import Path; from pipeline.session import *\n"
        f"s = SessionFolder(Path({str(tmp_path / 'dead')!r})); lock = FileLock(s.path / 'camera.lock')\n"
        f"lock.write({name!r}); print('up', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdin
    with process:
        assert process.stdout.readline() == "up\n"
        assert remove_leftovers(tmp_path) == []
        with pytest.raises(BlockingIOError):
            FileLock(tmp_path / "dead" / "camera.lock")
        process.kill()
        process.wait()
    assert remove_leftovers(tmp_path) == ["dead"]
    assert not unlink(name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["living", "other"]
    living.close()
    assert remove_leftovers(tmp_path) == ["living"]
    assert remove_leftovers(tmp_path / "never") == []


def test_only_our_own_names_are_removed() -> None:
    assert not remove_segment("")
    assert not remove_segment("/somebody-elses")
