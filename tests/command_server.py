"""Commands in processes of their own, without what it takes each to start: a server that has imported a command forks it."""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def forked_command(
    package: str, *arguments: object, before: str = "", cwd: Path | None = None, encoding: str = "utf-8"
) -> subprocess.CompletedProcess[str]:
    """Run one of the three commands as `conftest.run_command` does.

    Args:
        package, arguments: of the command.
        before: statements of Python that come before the command is imported; there is a server for each.
        cwd: the working folder; else that of the server.
        encoding: of standard output.
    """
    server = _server(package, before)
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "out", Path(folder) / "err"]
        request = {
            "arguments": [package.replace("_", "-"), *map(str, arguments)],
            "environment": {**os.environ, "PYTHONPATH": str(ROOT)},
            "folder": str(cwd or ROOT),
            "outputs": list(map(str, paths)),
            "encoding": encoding,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(request["arguments"], code, paths[0].read_text(encoding), paths[1].read_text())


@functools.cache
def _server(package: str, before: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default"}
    command = [sys.executable, __file__, package, before]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.communicate()


def _serve(package: str, before: str) -> None:
    sys.path[0] = str(ROOT)  # and not the folder of the tests
    exec(before, {})
    command = importlib.import_module(f"{package}.cli").main
    for used_by_most in ("knowledge_store.store", "typer._adapters"):
        with suppress(ImportError):  # not every version of typer has it
            importlib.import_module(used_by_most)
    requests = os.fdopen(os.dup(0))  # the standard input of commands is empty
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for line in requests:
        pid = os.fork()
        if pid == 0:
            request = json.loads(line)
            requests.close()
            for descriptor, path in enumerate(request["outputs"], start=1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            sys.argv = request["arguments"]
            sys.stdout.reconfigure(encoding=request["encoding"])  # as PYTHONIOENCODING has it
            command()
            sys.exit()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
