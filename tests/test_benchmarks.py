"""Benchmarks and studies: each one can be imported and says what it measures. What they measure is no test's business."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "benchmarks").rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
]


def test_studies_lie_beside_their_results():
    assert {path.stem.partition("-")[0] for path in (ROOT / "benchmarks/studies").glob("*.json")} == {
        path.stem for path in (ROOT / "benchmarks/studies").glob("*.py")
    }


@pytest.mark.parametrize("module", MODULES)
def test_each_shows_its_help(module, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
