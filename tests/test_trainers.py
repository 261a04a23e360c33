"""The store in the trainers that people have: one loss curve, resumes, evaluations, rows of their own, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from torture.heartbeat import PATIENCE
from transformers import AutoModelForCausalLM, TrainingArguments

from knowledge_store import KnowledgeStore
from student_train import DistillationTrainer

pytestmark = pytest.mark.usefixtures("one_thread")

SEED = 7
STEPS = 16  # over more than an epoch, whose last step is short
SHARED = {
    "seed": SEED,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}
# A float32 sum in another order; Adam makes more of it with every step.
TOLERANCE = 1e-4


def load(student: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(student)


def arguments(folder: Path, **changes) -> TrainingArguments:
    return TrainingArguments(str(folder), **{**SHARED, "per_device_train_batch_size": 4, **changes})


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


THREE_TRAINERS = f"""
import json, sys
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from knowledge_store import KnowledgeStore
from student_train import DistillationMixin, DistillationTrainer, TrainConfig, train
from student_train.training.run import leave_processes

class SFTDistillation(DistillationMixin, SFTTrainer):
    pass

store_folder, student = sys.argv[1:]
store = KnowledgeStore.open(store_folder)
shared = {SHARED!r} | {{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}}
curves = {{}}

def note(name, trainer):
    curves[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

trainer = DistillationTrainer(
    AutoModelForCausalLM.from_pretrained(student), args=TrainingArguments("plain", **shared), store=store, dump="train"
)
trainer.train()
note("plain", trainer)
trainer = SFTDistillation(
    student, args=SFTConfig("trl", bf16=False, gradient_checkpointing=False, **shared), store=store, dump="train"
)
trainer.train()
note("trl", trainer)
train(TrainConfig(
    store=store_folder, student=student, output="run", dump="train", seed={SEED}, steps={STEPS}, batch_size=1,
    gradient_accumulation=2, learning_rate=1e-3, warmup={1 / STEPS}, eval_fraction=0.0, precision="fp32",
))
curves["run"] = [entry["loss"] for entry in json.loads(Path("run/history.json").read_text())["entries"] if "loss" in entry]
if trainer.is_world_process_zero():
    Path("curves.json").write_text(json.dumps(curves))
leave_processes()
"""


def test_three_trainers_have_one_loss_curve(store_folder, student, tmp_path):
    """Two processes with accumulation, of plain transformers, TRL and the command: the curve of one process without."""
    store = KnowledgeStore.open(store_folder)
    assert store.sequence_count("train") % 4  # the last step of an epoch is short
    alone = DistillationTrainer(load(student), args=arguments(tmp_path / "alone"), store=store, dump="train")
    alone.train()
    (tmp_path / "trainers.py").write_text(THREE_TRAINERS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "trainers.py"]
    done = subprocess.run(
        [*launch, store_folder, student],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    curves = json.loads((tmp_path / "curves.json").read_text())
    expected = losses(alone)
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.1
    for name in ("plain", "trl", "run"):
        assert curves[name] == pytest.approx(expected, abs=TOLERANCE), name
