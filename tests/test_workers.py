"""Which worker a process is, by its options or by what started it, and workers that take what others left."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from conftest import story_rows, write_jsonl
from processes import Notes
from stores import contents

from knowledge_store.errors import InputError
from knowledge_store.format.commits import commit_records
from knowledge_store.storage import open_storage
from teacher_dump import DumpConfig, cli, dump
from teacher_dump.dumping import teacher_pass
from teacher_dump.dumping.worker_shards import shards_of_others
from teacher_dump.ranks import Worker, local_rank, this_worker

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2"}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}  # of a script, which is no step of its job
# Of the shell that salloc opens on a node of the job.
SHELL = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEPID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
ARRAY = {
    **BATCH,
    **{f"SLURM_ARRAY_TASK_{name}": value for name, value in (("ID", "14"), ("MIN", "10"), ("MAX", "18"), ("STEP", "2"))},
    "SLURM_ARRAY_TASK_COUNT": "5",
}
POD = {"JOB_COMPLETION_INDEX": "3"}

FOUND = {
    "nothing": ({}, None, (0, 1)),
    "torchrun": (TORCHRUN, None, (3, 8)),
    "torchrun, over machines that srun numbers": ({**SRUN, **TORCHRUN}, None, (3, 8)),
    "torchrun, over machines that Kubernetes numbers": ({**POD, **TORCHRUN}, None, (3, 8)),
    "torchrun on one machine, in a job of one task": ({**BATCH, **TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, None, (3, 8)),
    "srun": (SRUN, None, (2, 4)),
    "srun, by its two variables": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, None, (1, 2)),
    "a batch script": (BATCH, None, (0, 1)),
    "an interactive shell": ({**SHELL, "SLURM_NTASKS": "1"}, None, (0, 1)),
    "srun from an interactive shell": ({**SHELL, **SRUN, "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "4"}, None, (2, 4)),
    "an array": (ARRAY, None, (2, 5)),
    "an array, by three variables": (
        {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}, None, (3, 4),
    ),
    "one job of an array, given again": (
        {**ARRAY, "SLURM_ARRAY_TASK_MIN": "14", "SLURM_ARRAY_TASK_MAX": "14", "SLURM_ARRAY_TASK_COUNT": "1"}, None, (0, 1),
    ),
    "srun in each job of an array": ({**ARRAY, **SRUN}, None, (2 * 4 + 2, 5 * 4)),
    "srun of one task in each job of an array": ({**ARRAY, **SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None, (2, 5)),
    "an indexed job, whose manifest says how many": (POD, 4, (3, 4)),
    "a launcher, and the same count as an option": (TORCHRUN, 8, (3, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_the_environment_says_which_worker_this_is(case):
    environment, world_size, expected = FOUND[case]
    worker = this_worker(None, world_size, environment)
    assert (worker.rank, worker.world_size) == expected
    assert bool(worker.source) == (case not in ("nothing", "a batch script", "an interactive shell"))


def test_options_stand_above_the_environment():
    assert this_worker(1, 2, {**TORCHRUN, **ARRAY, **POD, "WORLD_SIZE": "x"}) == Worker(1, 2)


REFUSED = {
    "half of torchrun's": ({"RANK": "1"}, "RANK is in the environment without WORLD_SIZE"),
    "the other half": ({"WORLD_SIZE": "4"}, "WORLD_SIZE is in the environment without RANK"),
    "half of srun's": ({"SLURM_PROCID": "1"}, "SLURM_PROCID is in the environment without SLURM_NTASKS"),
    "half of an array's": ({"SLURM_ARRAY_TASK_ID": "1"}, "without SLURM_ARRAY_TASK_COUNT"),
    "a batch script whose tasks are others": ({**BATCH, "SLURM_NTASKS": "4"}, "begin it by srun"),
    "an interactive shell whose tasks are others": ({**SHELL, "SLURM_NTASKS": "4"}, "begin it by srun"),
    "a step that was given the count of its job": (
        {**SRUN, "SLURM_STEP_NUM_TASKS": "2"},
        "SLURM_NTASKS says 4 tasks, and SLURM_STEP_NUM_TASKS says 2",
    ),
    "an array with gaps": ({**ARRAY, "SLURM_ARRAY_TASK_MAX": "30"}, "not evenly spaced"),
    "an indexed job of unknown size": (POD, "give --world-size, the `completions` of the job"),
    "no number": ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one' in the environment"),
    "a rank that is none": ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2, which is none of them"),
    "a torchrun in each of several tasks": ({**SRUN, **TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "let torchrun span all machines"),
    "a torchrun in each of several pods": ({**POD, **TORCHRUN, "LOCAL_WORLD_SIZE": "8"}, "let torchrun span all machines"),
    "Slurm in Kubernetes": ({**SRUN, **POD}, "both say which worker this is"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_environment_that_does_not_say_it_is_refused(case):
    environment, message = REFUSED[case]
    with pytest.raises(InputError, match=r"--rank and --world-size|the `completions`") as refusal:
        this_worker(None, None, environment)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("rank", "world_size", "environment", "message"),
    [
        (0, None, {}, "--rank 0 is given without --world-size"),
        (0, None, TORCHRUN, "--rank 0 is given without --world-size"),
        (None, 2, {}, "--world-size 2 is given without --rank"),
        (None, 4, TORCHRUN, "--world-size is 4, and RANK and WORLD_SIZE say 8"),
        (None, 3, POD, "rank 3 of 3"),
        (2, 2, {}, "--rank 2 is not one of --world-size 2"),
    ],
)
def test_half_a_pair_of_options_is_refused(rank, world_size, environment, message):
    with pytest.raises(InputError) as refusal:
        this_worker(rank, world_size, environment)
    assert message in str(refusal.value)


def test_devices_are_shared_by_the_processes_of_a_machine():
    assert [local_rank(environment) for environment in (TORCHRUN, SRUN, {}, BATCH)] == [1, 2, 0, 0]


@pytest.fixture
def config(teacher_folder, tmp_path) -> DumpConfig:
    corpus = write_jsonl(tmp_path / "corpus.jsonl", story_rows(12))
    return DumpConfig(teacher_folder, corpus, tmp_path / "store", "d", max_length=40, batch_size=2, shard_size=2)


def test_a_command_takes_its_rank_from_the_environment(config, monkeypatch, capsys):
    options = {"teacher": config.teacher, "corpus": config.corpus[0], "name": "d", "max-length": 40, "shard-size": 2}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["teacher-dump", "run", str(config.store), *words])
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as refused:
        cli.main()
    assert refused.value.code == 2 and not config.store.exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    printed = capsys.readouterr().err
    assert "Rank 1 of 2, as RANK and WORLD_SIZE say" in printed
    assert "The dump is not complete: 3 shards of other ranks are missing yet" in printed
    assert list(commit_records(open_storage(config.store), "d")) == [1, 3, 5]


def test_a_worker_that_is_done_helps_the_others(config, loaded_teacher, tmp_path):
    whole = dump(replace(config, store=tmp_path / "whole"), teacher=loaded_teacher)
    notes = Notes()
    report = dump(replace(config, help_others=True), 1, 3, teacher=loaded_teacher, reporter=notes)
    assert report.shards == whole.shards and not report.shards_missing
    assert report.shards_of_others == whole.shards - len(range(1, whole.shards, 3))
    assert any("helps with" in note for note in notes.notes)
    assert contents(config.store) == contents(tmp_path / "whole")
    assert dump(replace(config, help_others=True), 0, 3, teacher=loaded_teacher).shards == 0


def test_helpers_take_each_others_shards_in_orders_of_their_own(config, loaded_teacher):
    class Writer:
        def __init__(self, shards: int):
            self.manifest = type("Manifest", (), {"shard_count": shards})
            self.committed_shards = lambda: {3, 4, 5}

    orders = [shards_of_others(Writer(40), rank, 4) for rank in range(4)]
    for rank, order in enumerate(orders):
        assert sorted(order) == [shard for shard in range(40) if shard % 4 != rank and shard not in {3, 4, 5}]
        first_missing = {0, 1, 2, 7} - {[0, 1, 2, 7][rank]}
        assert set(order[-3:]) == first_missing
    assert len({tuple(shard for shard in order if shard % 4 == 3) for order in orders[:3]}) == 3


def test_a_shard_that_another_worker_commits_meanwhile_is_left(config, loaded_teacher, monkeypatch):
    """Another one does all of the dump when this one has asked about its first batch."""
    monkeypatch.setattr(teacher_pass, "LOOK_EVERY", 0.0)
    extract, reports = teacher_pass.extract_batch, []

    def overtaken(*arguments, **named):
        batch = extract(*arguments, **named)
        if not reports:
            reports.append(None)
            reports.append(dump(config, teacher=loaded_teacher))
        return batch

    monkeypatch.setattr(teacher_pass, "extract_batch", overtaken)
    assert dump(replace(config, batch_size=1), teacher=loaded_teacher).shards == 0
    assert reports[1].shards == 6
