"""The README's loop of one's own, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLE = next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "DistillationDataset" in block)


def test_it_runs_and_learns(store_folder, teacher_folder, tmp_path, monkeypatch):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").symlink_to(store_folder)
    (tmp_path / "student").symlink_to(teacher_folder)
    names: dict = {}
    exec(EXAMPLE, names)
    assert torch.isfinite(names["loss"])
    assert names["student"].get_input_embeddings().weight.grad is None  # the last step was taken
