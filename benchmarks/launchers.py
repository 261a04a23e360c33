"""The recipes of WORKERS.md, run as they stand there with the real torchrun, Ray and datatrove, on this machine.

    pip install ray datatrove
    python -m benchmarks.launchers [--folder FOLDER]

Each one makes the dump of a small corpus with two workers, whose tables have to be those that one worker makes, byte for byte.
Of Ray's two tasks one is killed by SIGKILL after its first commit, and Ray begins it again. After datatrove a commit record is
removed: the same logging folder skips it, and a new one makes it again. Models and files are replaced by small ones.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measurement import keep

PAGE = Path(__file__).parent.parent / "teacher_dump" / "WORKERS.md"
REASON = "benchmarks/launchers.py runs it"
SUBSTITUTIONS = (("meta-llama/Llama-3.1-8B", "teacher"), ("data/part-1.jsonl", "train.jsonl"), ("4096", "1"))
PATIENCE = 400.0  # seconds
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "120",  # for a machine that has much else to do
    "RAY_agent_register_timeout_ms": "120000",
}

_RECIPE = re.compile(rf"^## ([^\n]+)\n(?:(?!^## ).)*?<!-- not run: {REASON} -->\n```\w+\n(.*?)^```$", re.M | re.S)


def recipes() -> dict[str, str]:
    """The recipes of the page by the headings above them."""
    return {match[1]: match[2] for match in _RECIPE.finditer(PAGE.read_text())}


def tables(store: Path, dump: str) -> dict[str, bytes]:
    """All tables of a dump."""
    return {str(path.relative_to(store / dump)): path.read_bytes() for path in sorted((store / dump).rglob("*.parquet"))}


class Recipe:
    """One recipe, as it is run in a folder."""

    def __init__(self, name: str, folder: Path):
        self.dump = name.lower()
        self.folder = folder
        self.commits = folder / "knowledge" / self.dump / "commits"
        text = recipes()[name]
        for words, replacement in SUBSTITUTIONS:
            text = text.replace(words, replacement)
        self.text = text

    def start(self, text: str | None = None) -> subprocess.Popen[bytes]:
        """Begin it, or another text in its place."""
        text = text or self.text
        if text.startswith("torchrun"):
            text = text.replace("torchrun", f"{sys.executable} -m torch.distributed.run", 1)
            command = ["sh", "-c", text]
        else:
            script = self.folder / f"recipe-{self.dump}.py"
            script.write_text(text)
            command = [sys.executable, str(script)]
        return subprocess.Popen(command, cwd=self.folder, env={**os.environ, **SETTINGS})

    def run(self, text: str | None = None) -> None:
        """Run it to its end (RuntimeError: it fails)."""
        process = self.start(text)
        if process.wait(PATIENCE):
            raise RuntimeError(f"the recipe of {self.dump} failed with exit code {process.returncode}")

    @property
    def committed(self) -> set[int]:
        """The shards that have a commit record."""
        return {int(path.stem) for path in self.commits.glob("[0-9]*.json")}


def ray_tasks(process: psutil.Process) -> set[psutil.Process]:
    """Ray's processes that run the task of the recipe now."""
    found = set()
    for child in process.children(recursive=True):
        try:
            if "ray::work" in " ".join(child.cmdline()):
                found.add(child)
        except psutil.Error:
            continue
    return found


def run_ray(folder: Path) -> dict[str, Any]:
    """Run the recipe, and kill one of its tasks once both have committed a shard."""
    recipe = Recipe("Ray", folder)
    process = recipe.start()
    began, seen = time.monotonic(), set[int]()
    figures: dict[str, Any] = {}
    while process.poll() is None and time.monotonic() - began < PATIENCE:
        tasks = ray_tasks(psutil.Process(process.pid))
        seen |= {task.pid for task in tasks}
        ranks = {shard % 2 for shard in recipe.committed}
        if not figures and len(tasks) == 2 and ranks == {0, 1}:
            victim = max(tasks, key=lambda task: task.pid)
            figures["committed_when_killed"] = len(recipe.committed)
            os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.02)
    if process.wait(PATIENCE) or not figures:
        raise RuntimeError("Ray's recipe failed, or was done before one of its tasks could be killed")
    return {**figures, "killed": 1, "processes_of_two_tasks": len(seen)}


def run_datatrove(folder: Path) -> dict[str, Any]:
    """Run the recipe, remove a commit record, and run it again, with the same logging folder and with a new one."""
    recipe = Recipe("datatrove", folder)
    recipe.run()
    (recipe.commits / "00001.json").unlink()
    recipe.run()
    skipped = 1 not in recipe.committed
    recipe.run(recipe.text.replace("datatrove-1", "datatrove-2"))
    return {"same_logging_folder_skips_what_is_missing": skipped, "new_logging_folder_makes_it": 1 in recipe.committed}


def run_torchrun(folder: Path) -> dict[str, Any]:
    """Run the recipe."""
    Recipe("torchrun", folder).run()
    return {}


RUNS = {"torchrun": run_torchrun, "Ray": run_ray, "datatrove": run_datatrove}
PACKAGES = {"torchrun": "torch", "Ray": "ray", "datatrove": "datatrove"}
ALONE = """
from teacher_dump import DumpConfig, dump
dump(DumpConfig("teacher", "train.jsonl", "alone", "alone", shard_size=1))
"""


def measure(folder: Path) -> dict[str, Any]:
    """Run all recipes in a folder, but those that were run there before."""
    if not (folder / "alone").exists():
        subprocess.run([sys.executable, "-m", "benchmarks.tiny_model", str(folder), "--steps", "20"], check=True)
        subprocess.run([sys.executable, "-c", ALONE], cwd=folder, check=True)
    expected = tables(folder / "alone", "alone")
    kept = folder / "figures.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for name, run in RUNS.items():
        if name in figures and figures[name]["recipe"] == recipes()[name].splitlines():
            continue
        shutil.rmtree(folder / "knowledge" / name.lower(), ignore_errors=True)
        found = run(folder)
        made = tables(folder / "knowledge", name.lower())
        figures[name] = {
            "version": version(PACKAGES[name]),
            "tables": len(made),
            "equal_to_one_worker": made == expected,
            **found,
            "recipe": recipes()[name].splitlines(),
        }
        kept.write_text(json.dumps(figures))
    return figures


def main() -> None:
    """Run the recipes and keep what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="to work in; what was run there is not run again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="launchers-") as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        keep("launchers", measure(folder.resolve()))


if __name__ == "__main__":
    main()
