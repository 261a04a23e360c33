"""Which worker of a dump this process is: as its options say, or else as what started it says in the environment.

torchrun numbers its processes through all its nodes. Slurm numbers the tasks of a step (srun) and the jobs of an array; where
there are both, the tasks of the array's first job come first. Kubernetes numbers the pods of an indexed job, and does not say
how many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from knowledge_store.errors import InputError

BOTH = "give --rank and --world-size"

TORCHRUN = ("RANK", "WORLD_SIZE")
SLURM_TASK = ("SLURM_PROCID", "SLURM_NTASKS")
SLURM_STEP_TASKS = "SLURM_STEP_NUM_TASKS"
# The steps that Slurm makes of a batch script and of the shell that salloc opens: one process, numbered as the first task.
SLURM_NO_STEPS = {"4294967291", "4294967290"}
SLURM_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
KUBERNETES = "JOB_COMPLETION_INDEX"


@dataclass(frozen=True)
class Worker:
    """One worker among all.

    Attributes:
        rank: its number, from 0. world_size: how many there are.
        source: the variables that said so, for a person to read; empty where options did, or nothing.
    """

    rank: int
    world_size: int
    source: str = ""


def this_worker(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Worker:
    """Which worker this process is.

    Args:
        rank, world_size: as options say, which stand above the environment; None where they do not.
        environment: of the process.

    Raises:
        InputError: half of a pair is given, a variable is no such number, or two launchers contradict each other.
    """
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise InputError(f"--rank {rank} is not one of --world-size {world_size}: ranks count from 0")
        return Worker(rank, world_size)
    if rank is not None:
        raise InputError(f"--rank {rank} is given without --world-size: give both, or neither where a launcher says which")
    found = _launched(environment, world_size)
    if world_size is None or (found is not None and found.world_size == world_size):
        return found or Worker(0, 1)
    if found is None:
        raise InputError(
            f"--world-size {world_size} is given without --rank, and no launcher says which worker this is: {BOTH}"
        )
    raise InputError(f"--world-size is {world_size}, and {found.source} say {found.world_size}: {BOTH}, or neither")


def local_rank(environment: Mapping[str, str]) -> int:
    """Which of the processes of its machine this one is, as torchrun and srun number them; 0 where nobody says so."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return 0


def _launched(environment: Mapping[str, str], world_size: int | None) -> Worker | None:
    """As launchers say; `world_size` is how many pods an indexed job has, where that is said."""
    torchrun = _pair(environment, TORCHRUN)
    slurm, pod = _slurm(environment), _number(environment, KUBERNETES)
    if torchrun is not None:
        # A launcher around torchrun numbers torchrun's machines, unless each of those runs a torchrun of its own.
        alone = _number(environment, "LOCAL_WORLD_SIZE") == torchrun.world_size
        outer = [slurm.source] if slurm is not None and slurm.world_size > 1 else [KUBERNETES] if pod else []
        if alone and outer:
            raise InputError(
                f"torchrun has {torchrun.world_size} processes on this machine alone, and by {outer[0]} there are several such:"
                f" let torchrun span all machines, or {BOTH}"
            )
        return torchrun
    if slurm is not None and pod is not None:
        raise InputError(f"{slurm.source} and {KUBERNETES} both say which worker this is: {BOTH}")
    if pod is None:
        return slurm
    if world_size is None:
        raise InputError(
            f"{KUBERNETES} says that this is worker {pod}, and nothing says how many there are: give --world-size, the"
            " `completions` of the job"
        )
    return _worker(pod, world_size, f"{KUBERNETES} and --world-size")


def _slurm(environment: Mapping[str, str]) -> Worker | None:
    task, array = _slurm_task(environment), _slurm_array(environment)
    if task is None or array is None:
        return task or array
    if task.world_size == 1:
        return array
    rank = array.rank * task.world_size + task.rank
    return Worker(rank, array.world_size * task.world_size, f"{array.source} and {task.source}")


def _slurm_task(environment: Mapping[str, str]) -> Worker | None:
    # A batch script is no step, nor is a shell. Slurm numbers it as the first task all the same, of those its steps will have.
    steps = {environment[name] for name in ("SLURM_STEP_ID", "SLURM_STEPID") if name in environment}
    tasks = _number(environment, "SLURM_NTASKS")
    if steps - SLURM_NO_STEPS or "SLURM_JOB_ID" not in environment:
        worker, step_tasks = _pair(environment, SLURM_TASK), _number(environment, SLURM_STEP_TASKS)
        if worker is not None and step_tasks not in (None, worker.world_size):
            raise InputError(f"SLURM_NTASKS says {worker.world_size} tasks, and {SLURM_STEP_TASKS} says {step_tasks}: {BOTH}")
        return worker
    if tasks is not None and tasks > 1:
        raise InputError(
            f"this job has {tasks} tasks (SLURM_NTASKS), and this process is none of them: begin it by srun, or {BOTH}"
        )
    return None


def _slurm_array(environment: Mapping[str, str]) -> Worker | None:
    whole = _pair(environment, SLURM_ARRAY, checked=False)
    if whole is None:
        return None
    first, last, step = (
        _number(environment, f"SLURM_ARRAY_TASK_{name}", default) for name, default in (("MIN", 0), ("MAX", None), ("STEP", 1))
    )
    assert first is not None and step is not None
    rank, rest = divmod(whole.rank - first, max(step, 1))
    if rest or (last is not None and last != first + (whole.world_size - 1) * step):
        raise InputError(f"the numbers of this Slurm array are not evenly spaced, so that no rank follows from them: {BOTH}")
    return _worker(rank, whole.world_size, whole.source)


def _pair(environment: Mapping[str, str], names: tuple[str, str], checked: bool = True) -> Worker | None:
    rank, world_size = (_number(environment, name) for name in names)
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        given, missing = names if world_size is None else reversed(names)
        raise InputError(f"{given} is in the environment without {missing}: {BOTH}, or unset {given}")
    source = " and ".join(names)
    return _worker(rank, world_size, source) if checked else Worker(rank, world_size, source)


def _worker(rank: int, world_size: int, source: str) -> Worker:
    if not 0 <= rank < world_size:
        raise InputError(f"{source} say rank {rank} of {world_size}, which is none of them: {BOTH}")
    return Worker(rank, world_size, source)


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    text = environment.get(name, "")
    if text and not text.isdecimal():
        raise InputError(f"{name} is {text!r} in the environment, which is no number: {BOTH}, or unset {name}")
    return int(text) if text else default
