"""The README's loop of one's own, as it stands there."""

from __future__ import annotations

import torch

EXAMPLE = """
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from knowledge_store import KnowledgeStore
from student_train import DistillationDataset, forward_kl, select_targets

student = AutoModelForCausalLM.from_pretrained("student/")
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
dataset = DistillationDataset(KnowledgeStore.open("store/"), "train", batch_size=8, seed=0)
for batch in DataLoader(dataset, batch_size=None):
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = forward_kl(*select_targets(logits, batch)).mean()
    loss.backward()
    optimizer.step(), optimizer.zero_grad()
"""


def test_it_runs_and_learns(store_folder, teacher_folder, tmp_path, monkeypatch):
    assert len([line for line in EXAMPLE.splitlines() if line]) <= 15
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").symlink_to(store_folder)
    (tmp_path / "student").symlink_to(teacher_folder)
    names: dict = {}
    exec(EXAMPLE, names)
    assert torch.isfinite(names["loss"])
    assert names["student"].get_input_embeddings().weight.grad is None  # the last step was taken
