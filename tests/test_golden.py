"""The shipped recordings give the windows that are stored for them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden", ROOT / "recordings" / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_shipped_recording_has_its_digests(golden: ModuleType) -> None:
    shipped = sorted(path.name for path in (ROOT / "recordings").glob("*.mcap"))
    assert shipped == sorted(golden.SESSIONS)
    assert len(golden.golden("demo.mcap").read_text().splitlines()) >= 190


def test_windows_are_as_stored(golden: ModuleType) -> None:
    for recording in golden.SESSIONS:
        found = golden.difference(recording)
        assert found is None, f"{found}\nif this was meant: python recordings/golden.py --accept"


def test_a_difference_is_shown_with_its_window(
    golden: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = golden.golden("demo.mcap").read_text().splitlines()
    lines[17] = lines[17].replace(lines[17].split()[1], "0" * 32)
    (tmp_path / "demo.digests").write_text("\n".join(lines))
    monkeypatch.setattr(golden, "golden", lambda recording: tmp_path / "demo.digests")
    assert "stored   18 0000" in golden.difference("demo.mcap")
