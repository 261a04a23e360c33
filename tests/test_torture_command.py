"""`make torture` ends when it is told to, and leaves nothing at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import ROOT


def environments(mark: str) -> list[dict[str, str]]:
    """The environments of all processes that have a mark in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = path.read_text(errors="replace").split("\0")
        except OSError:  # it has ended, or is somebody else's
            continue
        if f"MARK={mark}" in words:
            found.append(dict(word.split("=", 1) for word in words if "=" in word))
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_an_interrupted_torture_leaves_no_process_and_no_file(tmp_path):
    mark = uuid.uuid4().hex
    environment = {**os.environ, "MARK": mark, "PYTHONPATH": str(ROOT), "BENCHMARK_RESULTS": str(tmp_path)}
    command = [sys.executable, ROOT / "benchmarks/torture.py", "workers", "--minutes", "5"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True) as torture:
        until = time.monotonic() + 120
        while len(seen := environments(mark)) < 6:  # itself, the loop, and what that starts
            assert torture.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        folders = [Path(each["TMPDIR"]).parent.parent for each in seen if each.get("TMPDIR", "").endswith("/workers/tmp")]
        assert folders and all(folder.exists() for folder in folders)
        torture.send_signal(signal.SIGINT)
        said, _ = torture.communicate(timeout=30)
    assert torture.returncode == 130
    assert "STOPPED by SIGINT" in said
    assert not environments(mark)
    assert not any(folder.exists() for folder in folders)
    assert not list(tmp_path.iterdir())
