"""What imports what: a store opens on a machine with no torch, and the two ends meet in the store alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import knowledge_store

HEAVY = ("torch", "transformers")


def loaded(code: str) -> set[str]:
    """Which of the heavy packages a fresh process has loaded after running `code`."""
    code = f"{code}\nimport sys\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    return set(answer.stdout.split())


MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "knowledge_store").rglob("*.py")
)


def test_a_fresh_process_loads_no_torch():
    assert len(MODULES) > 15
    assert loaded("\n".join(f"import {module}" for module in MODULES)) == set()


def test_that_check_can_fail():
    assert loaded("import torch") == {"torch"}


def imported(source: str, package: str) -> set[str]:
    """The top-level packages that a source imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(package if node.level else node.module or "")
    return {name.split(".")[0] for name in names}


FORBIDDEN = {
    "knowledge_store": {"teacher_dump", "student_train", *HEAVY},
    "teacher_dump": {"student_train"},
    "student_train": {"teacher_dump"},
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_in_one_direction(package):
    sources = sorted((ROOT / package).rglob("*.py"))
    assert sources
    for path in sources:
        assert not imported(path.read_text(), package) & FORBIDDEN[package], path


def test_that_the_static_check_sees_every_import():
    source = "def f():\n    from torch.nn import functional\n    import transformers.models as m\nfrom . import x"
    assert imported(source, "here") == {"torch", "transformers", "here"}


def test_all_is_what_it_says():
    assert sorted(knowledge_store.__all__, key=str.lower) == sorted(set(knowledge_store.__all__), key=str.lower)
    for name in knowledge_store.__all__:
        assert hasattr(knowledge_store, name)
    public = {
        name
        for name, value in vars(knowledge_store).items()
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("knowledge_store")
    }
    assert public <= set(knowledge_store.__all__)
    scope: dict = {}
    exec("from knowledge_store import *", scope)
    assert set(knowledge_store.__all__) <= set(scope)
