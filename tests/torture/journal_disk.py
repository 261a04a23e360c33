"""A disk in memory, mounted with FUSE, that keeps a journal of every change: what a power cut leaves follows from it.

Nothing is safe on it but what was flushed: of a file its contents at its last `fsync`, of a folder its names at its own. What a
cut leaves of the rest is chance, each file's contents and each name by itself, as on a disk that writes in any order it likes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = 1
MARK = "mark-"  # looking for /mark-7 puts ["mark", 7] into the journal

Change = list[Any]  # [what, inode, …]
Journal = list[Change]


class Disk:
    """Files and folders by inode: contents as a bytearray, names as a dict from name to inode."""

    def __init__(self) -> None:
        self.inodes: dict[int, bytearray | dict[str, int]] = {ROOT: {}}

    def folder(self, inode: int) -> dict[str, int]:
        """The names in a folder."""
        names = self.inodes[inode]
        assert isinstance(names, dict)
        return names

    def file(self, inode: int) -> bytearray:
        """The contents of a file."""
        contents = self.inodes[inode]
        assert isinstance(contents, bytearray)
        return contents

    def apply(self, change: Change) -> None:
        """Make one change of a journal."""
        what, inode, *rest = change
        if what == "file" or what == "folder":
            name, made = rest
            self.inodes[made] = bytearray() if what == "file" else {}
            self.folder(inode)[name] = made
        elif what == "link":
            self.folder(inode)[rest[0]] = rest[1]
        elif what == "unlink":
            del self.folder(inode)[rest[0]]
        elif what == "write":
            offset, data = rest[0], bytes.fromhex(rest[1])
            contents = self.file(inode)
            contents.extend(bytes(max(0, offset - len(contents))))
            contents[offset : offset + len(data)] = data
        elif what == "truncate":
            contents = self.file(inode)
            del contents[rest[0] :]
            contents.extend(bytes(rest[0] - len(contents)))


def after_power_cut(journal: Journal, chance: random.Random | None, everything: bool = False) -> Disk:
    """What a cut at the end of `journal` leaves.

    Args:
        chance: decides what else survives than what was flushed; None for nothing else.
        everything: all that was done survives, flushed or not.
    """
    now, safe = Disk(), Disk()
    pending: dict[int, dict[str, list[int | None]]] = {}  # what each name has stood for since its folder was flushed
    for change in journal:
        now.apply(change)
        what, inode, *rest = change
        if what in ("file", "folder", "link", "unlink"):
            pending.setdefault(inode, {}).setdefault(rest[0], []).append(now.folder(inode).get(rest[0]))
        if what in ("file", "folder"):
            safe.inodes[rest[1]] = bytearray() if what == "file" else {}
        if what == "sync":
            safe.inodes[inode] = now.inodes[inode].copy()
            pending.pop(inode, None)
    if everything:
        return now
    if chance is not None:
        for inode, names in pending.items():
            for name, stood_for in names.items():
                found = chance.choice([safe.folder(inode).get(name), *stood_for])
                if found is None:
                    safe.folder(inode).pop(name, None)
                else:
                    safe.folder(inode)[name] = found
        for inode, contents in now.inodes.items():
            if isinstance(contents, bytearray) and contents != safe.inodes[inode]:
                part = contents[: chance.randint(0, len(contents))]
                safe.inodes[inode] = chance.choice(
                    [safe.file(inode), contents, part, part + bytes(len(contents) - len(part)), bytearray(len(contents))]
                )
    return safe


def lay_out(disk: Disk, folder: Path) -> None:
    """Write what is on a disk into a new folder; names of one file are links to one file."""
    made: dict[int, Path] = {}

    def lay(inode: int, path: Path) -> None:
        contents = disk.inodes[inode]
        if inode in made:
            os.link(made[inode], path)
        elif isinstance(contents, dict):
            path.mkdir()
            for name, each in contents.items():
                lay(each, path / name)
        else:
            path.write_bytes(contents)
            made[inode] = path

    lay(ROOT, folder)


@contextlib.contextmanager
def mounted(folder: Path, **faults: int) -> Iterator[tuple[Path, Path]]:
    """A new, empty disk.

    Args:
        folder: an empty folder for it.
        faults: `capacity`: bytes of files that fit on it; `shorten`: which write takes but half of what it is given;
            `kill`: at which change its process is killed (all from 1).

    Yields:
        where it is mounted, and the file that will hold its journal once it no longer is.
    """
    place, journal = folder / "disk", folder / "journal.json"
    place.mkdir()
    command = [sys.executable, "-c", "from torture.journal_disk import serve; serve()", str(place), str(journal)]
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([*command, json.dumps(faults)], env={**os.environ, "PYTHONPATH": path})
    try:
        while not place.is_mount():
            assert process.poll() is None, "the disk could not be mounted"
            time.sleep(0.005)
        yield place, journal
    finally:
        for _ in range(100):
            if process.poll() is not None:
                break
            subprocess.run(["fusermount3", "-u", str(place)], capture_output=True, check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        process.wait(1)
        place.rmdir()


def unavailable(folder: Path) -> str | None:
    """Why there can be no such disk here; None when there can."""
    try:
        import mfusepy  # noqa: F401
    except ImportError:
        return "needs FUSE and its Python package (apt-get install fuse3, pip install mfusepy)"
    except OSError as error:
        return f"needs FUSE (apt-get install fuse3): {error}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "needs FUSE: /dev/fuse cannot be opened"
    try:
        with mounted(folder) as (place, _):
            (place / "file").write_bytes(b"7")
            works = [(each.name, each.read_bytes()) for each in place.iterdir()] == [("file", b"7")]
            return None if works else "FUSE does not work"
    except (AssertionError, OSError) as error:
        return f"FUSE does not work: {error}"
    finally:
        (folder / "journal.json").unlink(missing_ok=True)


def serve() -> None:
    """The disk's own process: arguments are its place, its journal's file, and its faults."""
    from mfusepy import FUSE, Operations, fuse_get_context

    place, journal_file, faults = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])

    class Served(Operations):
        """What the kernel asks for, as changes of a Disk."""

        use_ns = True

        def __init__(self) -> None:
            self.disk, self.journal = Disk(), Journal()
            self.changed: dict[int, int] = {}
            self.writes = 0

        def change(self, what: str, inode: int, *rest: Any) -> int:
            if len(self.journal) + 1 == faults.get("kill"):
                os.kill(fuse_get_context()[2], signal.SIGKILL)
                faults.clear()
                raise OSError(errno.EIO, "")
            change = [what, inode, *rest]
            self.disk.apply(change)
            self.journal.append(change)
            self.changed[inode] = time.time_ns()
            return 0

        def find(self, path: str) -> int:
            inode = ROOT
            for name in path.strip("/").split("/"):
                names = self.disk.inodes[inode]
                if name and (not isinstance(names, dict) or name not in names):
                    raise OSError(errno.ENOENT if isinstance(names, dict) else errno.ENOTDIR, "")
                if name:
                    assert isinstance(names, dict)
                    inode = names[name]
            return inode

        def parent(self, path: str) -> tuple[int, str]:
            folder, _, name = path.rpartition("/")
            return self.find(folder), name

        def make(self, what: str, path: str) -> int:
            inode = len(self.disk.inodes) + 1
            folder, name = self.parent(path)
            self.change(what, folder, name, inode)
            return inode

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            if path.startswith(f"/{MARK}"):
                self.journal.append(["mark", int(path.removeprefix(f"/{MARK}"))])
            inode = self.find(path) if fh is None else fh
            contents = self.disk.inodes[inode]
            folders = [each for each in self.disk.inodes.values() if isinstance(each, dict)]
            links = sum(list(each.values()).count(inode) for each in folders)
            changed = self.changed.get(inode, 0)
            folder = isinstance(contents, dict)
            return {
                "st_ino": inode,
                "st_mode": stat.S_IFDIR | 0o755 if folder else stat.S_IFREG | 0o644,
                "st_nlink": 2 if folder else links,
                "st_size": len(contents),
                "st_uid": os.getuid(),
                "st_gid": os.getgid(),
                "st_mtime": changed,
                "st_ctime": changed,
                "st_atime": changed,
            }

        def readdir(self, path: str, fh: int) -> list[tuple[str, None, int]]:
            # A name alone would be listed with inode number 0, which stands for a removed file: nobody would see it.
            return [(name, None, 0) for name in (".", "..", *self.disk.folder(self.find(path)))]

        def mkdir(self, path: str, mode: int) -> int:
            self.make("folder", path)
            return 0

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return self.make("file", path)

        def open(self, path: str, flags: int) -> int:
            return self.find(path)

        def opendir(self, path: str) -> int:
            return self.find(path)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return bytes(self.disk.file(fh)[offset : offset + size])

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            self.writes += 1
            if self.writes == faults.get("shorten"):
                data = data[: max(1, len(data) // 2)]
            room = faults.get("capacity", 2**60) - sum(
                len(each) for each in self.disk.inodes.values() if isinstance(each, bytearray)
            )
            data = data[: max(0, room)]
            if not data:
                raise OSError(errno.ENOSPC, "")
            self.change("write", fh, offset, data.hex())
            return len(data)

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            return self.change("truncate", self.find(path) if fh is None else fh, length)

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            return self.change("sync", fh)

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            return self.change("sync", self.find(path))

        def link(self, target: str, source: str) -> int:
            folder, name = self.parent(target)
            return self.change("link", folder, name, self.find(source))

        def unlink(self, path: str) -> int:
            return self.change("unlink", *self.parent(path))

        def rmdir(self, path: str) -> int:
            return self.change("unlink", *self.parent(path))

        def rename(self, old: str, new: str) -> int:
            inode, (folder, name) = self.find(old), self.parent(new)
            self.change("link", folder, name, inode)
            return self.change("unlink", *self.parent(old))

        def utimens(self, path: str, times: Any = None) -> int:
            return 0

        def destroy(self, path: str) -> None:
            journal_file.write_text(json.dumps(self.journal))

    FUSE(Served(), place, foreground=True, nothreads=True, use_ino=True, hard_remove=True)
