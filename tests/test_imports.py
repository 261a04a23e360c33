"""What imports what: a store opens on a machine with no torch, and the two ends meet in the store alone."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

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


def test_a_fresh_process_loads_no_torch():
    names = modules("knowledge_store")
    assert len(names) > 15
    assert loaded("\n".join(f"import {module}" for module in names)) == set()


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


def modules(package: str) -> dict[str, Path]:
    """The files of a package, by the names of their modules."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def mentioned(tree: ast.AST, *, nested: bool) -> Iterator[str]:
    """The names that a module imports, with those of what it takes from them; those inside functions only if `nested`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from mentioned(node, nested=nested) if nested else ()
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from mentioned(node, nested=nested)


def test_only_commands_use_the_terminal():
    users = {
        str(path.relative_to(ROOT))
        for package in FORBIDDEN
        for name, path in modules(package).items()
        if not name.startswith("knowledge_store.terminal")
        and any(each.startswith("knowledge_store.terminal") for each in mentioned(ast.parse(path.read_text()), nested=True))
    }
    commands = {f"{package}/cli.py" for package in FORBIDDEN}
    assert users <= commands


def loaded_later(sources: dict[str, str]) -> dict[str, str]:
    """The modules of the names that a package loads when they are asked for, as it tells type checkers: "package.name"."""
    return {
        f"{name}.{alias.name}": node.module
        for name, source in sources.items()
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def imports_among(sources: dict[str, str], *, nested: bool = False) -> dict[str, set[str]]:
    """Which of some modules each of them imports when it is imported, or, where `nested`, at any time.

    A package's `__init__` counts only where something of it is asked for that is no module: `from package import module` does
    not need what its `__init__` imports later. A name that a package loads when it is asked for counts as the module it is in.
    """
    found, later = {}, loaded_later(sources)
    for name, source in sources.items():
        names = set(mentioned(ast.parse(source), nested=nested))
        taken = {later.get(each, each) for each in names} & sources.keys()
        packages = {each.rpartition(".")[0] for each in names - sources.keys()}
        parts = {each.rpartition(".")[0] for each in names & sources.keys()}
        found[name] = {each for each in taken if each not in parts or each in packages} - {name}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; none if there are no such."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for each in sorted(graph[name]):
                if around := search(each, [*path, name]):
                    return around
        done.add(name)
        return []

    return next((around for name in graph if (around := search(name, []))), [])


def test_no_imports_in_a_circle():
    """So any module can be imported first."""
    sources = {name: path.read_text() for package in FORBIDDEN for name, path in modules(package).items()}
    graph = imports_among(sources)
    assert sum(map(len, graph.values())) > 100
    assert circle(graph) == []


# What a room of knowledge_store may import: the rooms before it, and no other. An isolated task is given by its name.
LAYERS = (
    *("storage", "isolation", "format", "calibration", "kinds", "catalogue", "reading", "writing", "sql", "choice"),
    *("store", "configuration", "page", "serving", "terminal", "cli"),
)


def room(module: str) -> str:
    """The room of a module: its package, and the folder or file directly in it."""
    return ".".join(module.split(".")[:2])


def rooms_of(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Which rooms each room imports."""
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, modules_imported in graph.items():
        rooms[room(module)] |= {room(other) for other in modules_imported} - {room(module)}
    return rooms


def test_data_flows_one_way():
    """Not even a function imports what its own room is imported by."""
    sources = {name: path.read_text() for package in FORBIDDEN for name, path in modules(package).items()}
    graph = imports_among({name: source for name, source in sources.items() if "." in name}, nested=True)
    assert circle(graph) == []
    rooms = rooms_of(graph)
    assert circle(rooms) == []
    names = [f"knowledge_store.{layer}" for layer in LAYERS]
    assert set(names) <= rooms.keys()
    for place, name in enumerate(names):
        assert not rooms[name] & set(names[place + 1 :]), name
    later = {name: rooms[name] & set(names) for name in rooms.keys() - set(names) if name.startswith("knowledge_store.")}
    assert not any(later.values()), later  # errors, options and the like know of no room


def test_only_the_storage_knows_its_classes():
    """Whatever is asked of a place that holds a store is a call of the protocol: no other room names the class of one."""
    for package in FORBIDDEN:
        for name, path in modules(package).items():
            if room(name) != "knowledge_store.storage":
                assert "LocalStorage" not in path.read_text(), path


def test_that_circles_are_seen():
    sources = {
        "a": "from a.b import x\n",
        "a.b": "def f():\n    import a.c",
        "a.c": "try:\n    from a import d\nexcept ImportError:\n    pass",
        "a.d": "import a.c",
    }
    graph = imports_among(sources)
    assert graph == {"a": {"a.b"}, "a.b": set(), "a.c": {"a.d"}, "a.d": {"a.c"}}
    assert circle(graph) == ["a.c", "a.d"]
    assert circle(imports_among(sources | {"a.d": "from a import f"})) == []
    lazy = "if TYPE_CHECKING:\n    from a.c import g"
    assert circle(imports_among(sources | {"a": lazy, "a.d": "from a import g"})) == ["a.c", "a.d"]
    assert circle(rooms_of(imports_among({"a.b.x": "def f():\n    import a.c.y", "a.c.y": "import a.b.x"}))) == []
    assert circle(rooms_of(imports_among({"a.b.x": "def f():\n    import a.c.y", "a.c.y": "import a.b.x"}, nested=True)))
    assert circle(imports_among(sources | {"a.d": "from a import f", "a.b": "import a.d"})) == ["a", "a.b", "a.d"]


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
