"""How long a message is under way, and how many get through: this project's bus beside others.

    python benchmarks/transport.py
    python benchmarks/transport.py --workloads frame-30 --systems zmq-ipc,sensorium,iceoryx2 --rounds 5 --seconds 6

One publisher process, one subscriber process, one host. Workloads: ``frame-30`` (1080p RGB, 6.2 MB, at 30 a second),
``frame-fast`` (the same as fast as possible), ``imu-1000`` (samples of 32 bytes at 1 kHz). Latency runs from the
hand-over to the moment when the reader has touched every page. Rows named ``-filled`` start their clock when the
payload already lies in the system's own memory (a driver decoded straight into it); the others start from a private
array and copy. ``sensorium`` runs in the environment that its launcher gives to nodes, in which glibc copies large
blocks past the cache; ``sensorium-cached`` runs without it, ``iceoryx2-uncached`` with it. Rounds are interleaved
over the systems, so that what else the machine does falls on all of them; the figures are medians over the rounds,
the ratios medians of the ratios within a round (of p50, or of the rate where the publisher never waits). Peers that
are not installed are left out:

    pip install iceoryx2 ezmsg dora-rs dora-rs-cli pyarrow
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.transport_systems import CLOCK, FRAME, NEEDS, SYSTEMS, Job
from pipeline.shm import COPY_ENVIRONMENT

WORKLOADS = {"frame-30": 30.0, "frame-fast": 0.0, "imu-1000": 1000.0}
ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["p50_us", "p99_us", "max_us", "rate_hz", "lost", "cpu_pub", "cpu_sub"]


def available(systems: list[str]) -> Iterator[str]:
    """Those of the systems that are installed; a line on stderr for each that is not."""
    for system in systems:
        module = NEEDS.get(system, "zmq")
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if found:
            yield system
        else:
            print(f"{system}: left out, because the module {module} is not installed", file=sys.stderr)


@contextlib.contextmanager
def processes(job: Job) -> Iterator[None]:
    """The publisher, the subscriber and whatever the system needs beside them."""
    folder = Path(job.folder)
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RUST_LOG": "error"}
    if job.uncached:
        env |= COPY_ENVIRONMENT
    node = [sys.executable, "-m", "benchmarks.transport_systems"]
    commands = [[*node, role, job.folder] for role in ("pub", "sub")]
    if job.system == "dora":
        (folder / "flow.yml").write_text(dora_flow(job))
        env["DORA_NODE_SHM_POOL_SIZE"] = str(16 * FRAME)
        commands = [[str(Path(sys.executable).parent / "dora"), "run", str(folder / "flow.yml")]]
    elif job.system == "ezmsg":
        env |= {"EZMSG_GRAPHSERVER_ADDR": f"127.0.0.1:{job.port}", "EZMSG_PUBLISHER_PORT_START": str(job.port + 1)}
        env["EZMSG_LOGLEVEL"] = "WARNING"
        commands.insert(0, [sys.executable, "-m", "ezmsg.core", "serve"])
    with open(folder / "log", "w") as log:
        running = [
            subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder if job.system == "dora" else ROOT)
            for command in commands
        ]
        try:
            yield
        finally:
            for process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                process.terminate()
                try:
                    process.wait(4)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def dora_flow(job: Job) -> str:
    """The two nodes as dora wants them described."""
    script = ROOT / "benchmarks" / "transport_systems.py"
    nodes = [
        {"id": role, "path": sys.executable, "args": f"{script} {role} {job.folder}", **ends}
        for role, ends in [
            ("pub", {"outputs": ["data"]}),
            ("sub", {"inputs": {"data": {"source": "pub/data", "queue_size": job.depth}}}),
        ]
    ]
    return json.dumps({"nodes": nodes})  # JSON is YAML


def measure(system: str, workload: str, seconds: float, port: int) -> dict[str, Any]:
    """One run of one system; a row with its figures, or with ``error``."""
    with tempfile.TemporaryDirectory(prefix="snb") as name:
        job = Job(
            system=system, workload=workload, folder=name, port=port, seconds=seconds, rate_hz=WORKLOADS[workload]
        )
        row: dict[str, Any] = {"workload": workload, "system": system}
        results = [Path(name, f"{role}.json") for role in ("pub", "sub")]
        with processes(job):
            deadline = CLOCK.now_ns() + int((seconds + 30) * 1e9)
            while not all(path.exists() for path in results) and CLOCK.now_ns() < deadline:
                CLOCK.wait_until(CLOCK.now_ns() + 50_000_000)
        if not all(path.exists() for path in results):
            return {**row, "error": Path(name, "log").read_text()[-2000:] or "no result in time"}
        for path in results:
            row |= json.loads(path.read_text())
    return {**row, "lost": row["sent"] - row["received"]}


def table(rows: list[dict[str, Any]]) -> str:
    """The medians over the rounds, a table for each workload."""
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        here = [row for row in rows if row["workload"] == workload]
        lines += ["", f"### {workload}", "", "| system | " + " | ".join(COLUMNS) + " | x zmq-ipc | x iceoryx2 |"]
        lines += ["|---" * (len(COLUMNS) + 3) + "|"]
        for system in dict.fromkeys(row["system"] for row in here):
            mine = [row for row in here if row["system"] == system and "error" not in row]
            if not mine:
                lines.append(f"| {system} | failed: {here[0].get('error', '')[-200:]!r} |")
                continue
            cells = [f"{statistics.median(row[column] for row in mine):g}" for column in COLUMNS]
            cells += [ratio(here, mine, peer, workload) for peer in ("zmq-ipc", "iceoryx2")]
            lines.append(f"| {system} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratio(rows: list[dict[str, Any]], mine: list[dict[str, Any]], peer: str, workload: str) -> str:
    """The median over the rounds of a system's p50 (or rate) by the peer's in the same round."""
    key = "p50_us" if WORKLOADS[workload] else "rate_hz"
    peers = {row["round"]: row[key] for row in rows if row["system"] == peer and "error" not in row}
    ratios = [row[key] / peers[row["round"]] for row in mine if row["round"] in peers]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of one run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="every run as one JSON object a line")
    options = parser.parse_args()
    systems = list(available(options.systems.split(",")))
    rows, port = [], 20_000 + os.getpid() % 2000 * 10
    for workload in options.workloads.split(","):
        for number in range(options.rounds):
            for system in systems:
                if system.endswith(("-filled", "cached")) and not workload.startswith("frame"):
                    continue
                port += 10
                row = {**measure(system, workload, options.seconds, port), "round": number}
                rows.append(row)
                if options.json:
                    print(json.dumps(row), flush=True)
    if not options.json:
        load, python = os.getloadavg()[0], platform.python_version()
        print(f"{platform.machine()}, {os.cpu_count()} cores, load {load:.1f}, Python {python}")
        print(table(rows))


if __name__ == "__main__":
    main()
