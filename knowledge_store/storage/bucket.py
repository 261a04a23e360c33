"""A store in a bucket: Amazon S3 and what speaks its language, Google Cloud Storage, Azure Blob Storage; by `obstore`.

A file is published by one PUT that the service refuses when the name is taken (`If-None-Match: *` on S3 and Azure, a generation
match on GCS): whoever loses reads what stands there. There are no temporary files, no uploads in parts and no renames, and
nothing is ever replaced. Some services take that condition and do not heed it, and each of several writers is told that it
won: `probe` finds that out before anything is written.

Credentials come from the environment alone, where obstore looks for them. No message has any.
"""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from knowledge_store.errors import InputError, MissingFileError, StoreError
from knowledge_store.storage.bucket_address import CREDENTIALS, SCHEMES, BucketAddress
from knowledge_store.storage.protocol import Entry, Write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import ObjectStore

Result = TypeVar("Result")

HIDDEN = ".tmp-"  # objects of a probe
RACERS = 8
PROBES = 3
LEFTOVER_AGE = timedelta(days=1)  # of what a probe that was killed left behind
MAX_PUT = 5 * 2**30  # bytes that one PUT takes, on S3
AT_ONCE = 32  # requests
WRITE = "write"
SLOW = "too slow or broken"
HEADERS = {  # variables that are sent, or signed
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION"),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
}
PROXIES = ("http_proxy", "https_proxy", "all_proxy")  # variables, of either case, in which obstore looks for one
CONFLICTS = 8  # times that S3 says "neither this nor that": a removal came between
SILENCE = 30  # seconds that a connection may say nothing, which is all the time that something is sent to it
SLOWEST = 2**16  # bytes a second that are sent at least
WRITE_ATTEMPTS = 3  # of what nothing is heard of; whoever is told then that the name is taken reads what stands there
READ_ATTEMPTS = 4  # of an answer that breaks off in the middle; obstore tries again what fails before
# Until the service has answered once, a wrong address or key is likelier than a bad moment, and its user is waiting.
FIRST_RETRIES: dict[str, Any] = {"max_retries": 4, "retry_timeout": timedelta(seconds=20)}
RETRIES: dict[str, Any] = {
    "max_retries": 12,
    "retry_timeout": timedelta(seconds=170),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=15), "base": 2},
}

_client_process: int | None = None  # the one whose threads talk to services


def _no_obstore() -> InputError:
    return InputError("stores in buckets need obstore: pip install 'knowledge-store[bucket]'")


class BucketStorage:
    """The objects of a bucket under a prefix (see `Storage`).

    Args:
        address: `s3://bucket/prefix`, `gs://…` or `az://…`, and `?endpoint=URL` behind it where need be.
        store: a store of obstore to use for it, whose prefix is that of the address, such as one with a credential provider of
            your own; None makes one with what the environment says. One that is given is not handed to other processes.

    Raises:
        InputError: it is no such address, or obstore is not installed.
    """

    forkable = False  # the threads that talk to the service are not in a forked process, which waits for them for ever
    at_once = AT_ONCE

    def __init__(self, address: str | BucketAddress, store: ObjectStore | None = None):
        self._address = BucketAddress.parse(address) if isinstance(address, str) else address
        self.address = str(self._address)
        self._service = self._address.service
        self._given = store
        self._made: dict[tuple[bool, int], ObjectStore] = {}  # by whether the service has answered, and its silence
        self._answered = False
        try:
            import obstore
        except ModuleNotFoundError:
            raise _no_obstore() from None
        self._obstore = obstore

    def __reduce__(self) -> tuple[type[BucketStorage], tuple[BucketAddress, ObjectStore | None]]:
        return BucketStorage, (self._address, self._given)

    @property
    def cache_key(self) -> str:
        """Service, account, bucket and prefix."""
        account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "") if self._address.scheme == "az" else ""
        return " ".join([self._address.plain, self._service or "", account]).strip()

    def locate(self, name: str) -> str:
        """The URL of an object."""
        return f"{self._address.plain}/{name}" if name else self._address.plain

    def external_address(self, name: str) -> str:
        """The URL of an object; whoever opens it needs credentials of its own.

        Raises:
            InputError: this storage was given a store of obstore, whose credentials nobody else has.
        """
        if self._given is not None:
            raise InputError(f"no other program has the credentials that {self.address} was opened with")
        return self.locate(name)

    # Requests

    def _store(self, sent: int = 0) -> ObjectStore:
        """The client of this process, for a request with so many bytes.

        Raises:
            InputError: it was forked from one that has one already.
        """
        global _client_process
        if _client_process not in (None, os.getpid()):
            raise InputError(
                f"{self.address} cannot be used in a process that was forked from one that used a bucket, where it would wait"
                " for ever: start worker processes by forkserver or spawn, as with"
                " DataLoader(…, multiprocessing_context='forkserver')"
            )
        _client_process = os.getpid()
        if self._given is not None:
            return self._given
        silence = SILENCE
        while silence * SLOWEST < sent:
            silence *= 2
        kind = (self._answered, silence)
        if kind not in self._made:
            self._made[kind] = self._client(RETRIES if self._answered else FIRST_RETRIES, silence)
        return self._made[kind]

    def _client(self, retries: dict[str, Any], silence: int) -> ObjectStore:
        from obstore import store as stores

        address, service = self._address, self._service
        for name in HEADERS.get(address.scheme, ()):
            if re.search(r"[\x00-\x1f\x7f]", os.environ.get(name, "")):
                raise InputError(f"{name} in the environment has a line end in it, or what no request can hold: set it anew")
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=5),
            "read_timeout": timedelta(seconds=silence),
            "timeout": timedelta(days=1),  # of a whole answer, however large: what counts is that it goes on
        }
        if service is not None and service.startswith("http://"):
            options["allow_http"] = True
        shared: dict[str, Any] = {"prefix": address.prefix or None, "client_options": options, "retry_config": retries}
        if service is not None:
            shared["base_url" if address.scheme == "gs" else "endpoint"] = service
        classes: dict[str, Any] = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
        try:
            client: ObjectStore = classes[address.scheme](address.bucket, **shared)
            return client
        except (self._obstore.exceptions.BaseError, ValueError):  # its words may quote what it was given
            raise StoreError(
                f"cannot use {self.address}: set {CREDENTIALS[address.scheme]} in the environment, and look at what it has of"
                " this service already"
            ) from None

    def _asked(self, doing: str, name: str, request: Callable[[ObjectStore], Result], sent: int = 0) -> Result:
        """What a request with so many bytes gives.

        Raises:
            MissingFileError: there is no such object.
            AlreadyExistsError: the name is taken.
            StoreError: it failed; says "cannot DOING NAME: why".
        """
        exceptions = self._obstore.exceptions
        try:
            result = request(self._store(sent))
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
            self._answered = True
            if doing == WRITE:
                raise
            raise StoreError(f"cannot {doing} {self.locate(name)}: {self._reason(error)}") from None
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error) or "ContainerNotFound" in str(error):
                raise StoreError(f"there is no bucket {self._address.bucket}{self._at()}: make it first") from None
            self._answered = True
            raise MissingFileError(f"{self.locate(name)} is missing") from None
        except (exceptions.BaseError, ValueError, OSError) as error:
            if not self._answered and re.search(r"status code: (5\d\d|429)", str(error)):
                self._answered = True  # the address is right, and the service has too much to do
                return self._asked(doing, name, request, sent)
            raise StoreError(f"cannot {doing} {self.locate(name)}: {self._reason(error)}") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # obstore gives up so where it was given what it cannot send
                raise
            raise StoreError(
                f"cannot {doing} {self.locate(name)}: obstore cannot make a request of what the environment says; look for"
                " spaces and line ends in it"
            ) from None
        self._answered = True
        return result

    def _at(self) -> str:
        """Where requests go, for a sentence."""
        return f" at {self._service}" if self._service else f" on {SCHEMES[self._address.scheme]}"

    def _reason(self, error: Exception) -> str:
        """Why a request failed, in our words: obstore's quote whole requests and answers."""
        text = str(error)
        status = re.search(r"status code: (\d{3})", text)
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        answer = f"HTTP {status[1]}" + (f", {code[1]}" if code else "") if status else ""
        credentials = f"set {CREDENTIALS[self._address.scheme]} in the environment"
        if code and code[1] in ("NoSuchBucket", "ContainerNotFound"):
            return f"there is no bucket {self._address.bucket}{self._at()}: make it first"
        if "169.254.169.254" in text or "metadata.google.internal" in text or "metadata/instance" in text:
            return f"there are no credentials: {credentials}"
        if status and status[1] in ("400", "401", "403"):
            return f"the service{self._at()} refuses it ({answer}): {credentials} that may do this, and the bucket's region"
        if "redirect" in text:
            return f"the bucket is in another region than the one{self._at()} that was asked: set AWS_REGION"
        if status:
            return f"the service{self._at()} answers {answer}"
        if "kind: Connect" in text:
            proxies = [name for name in os.environ if name.lower() in PROXIES and os.environ[name]]
            way = f" Or is it the proxy of {' and '.join(proxies)}?" if proxies else ""
            return f"no connection{self._at()}: is the address right, and the service up?{way}"
        if "kind: Timeout" in text or "timed out" in text:
            return f"the connection{self._at()} is {SLOW}: nothing came for {SILENCE} s or more, time and again"
        if "kind: Body" in text or "body" in text or "kind: Request" in text or "kind: Decode" in text:
            return f"the connection{self._at()} broke off, time and again"
        return f"{type(error).__name__}{self._at()}; its message is left out, since it may hold what is secret"

    # Reading

    def size(self, name: str) -> int:
        """Bytes of an object (MissingFileError, StoreError)."""
        return int(self._head(name)["size"])

    def version(self, name: str) -> str:
        """Its etag (MissingFileError, StoreError)."""
        return _version(self._head(name))

    def _head(self, name: str) -> Any:
        return self._asked("read", name, lambda store: self._obstore.head(store, name))

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of an object, by one GET (MissingFileError, StoreError)."""
        if end is not None and end <= start:
            self._head(name)
            return b""
        options: Any = {} if (start, end) == (0, None) else {"range": {"offset": start} if end is None else (start, end)}
        for attempt in range(READ_ATTEMPTS):
            try:
                return self._asked("read", name, lambda store: self._body(store, name, options))
            except StoreError as error:
                if "HTTP 416" in str(error):  # the object ends before
                    return b""
                if "broke off" not in str(error) or attempt == READ_ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _body(self, store: ObjectStore, name: str, options: Any) -> bytes:
        return bytes(self._obstore.get(store, name, options=options).bytes())

    def _listed(self, prefix: str) -> Any:
        return self._asked("list", prefix, lambda store: self._obstore.list_with_delimiter(store, prefix or None))

    def _objects(self, prefix: str) -> list[Any]:
        # A console that makes a folder, and SeaweedFS where one was, list an empty object of the prefix itself.
        return [item for item in self._listed(prefix)["objects"] if item["path"].strip("/") != prefix]

    def files(self, prefix: str) -> list[Entry]:
        """The objects directly under `prefix/`, by name (StoreError)."""
        entries = [Entry(_last(item["path"]), item["size"], _version(item)) for item in self._objects(prefix)]
        return sorted((entry for entry in entries if not entry.name.startswith(HIDDEN)), key=lambda entry: entry.name)

    def folders(self, prefix: str) -> list[str]:
        """The names directly under `prefix/` that stand for more objects, sorted (StoreError)."""
        return sorted(_last(path) for path in self._listed(prefix)["common_prefixes"])

    # Writing

    def create(self, name: str, write: Write) -> bool:
        """Publish an object by one PUT, unless its name is taken (StoreError)."""
        file = io.BytesIO()
        write(file)
        size = file.tell()
        if size > MAX_PUT:
            raise StoreError(
                f"cannot write {self.locate(name)}: it has {size:,} bytes, and a bucket takes {MAX_PUT:,} at once: give a"
                " smaller --shard-size"
            )
        return self._put(name, file.getbuffer())

    def _put(self, name: str, data: bytes | memoryview) -> bool:
        exceptions = self._obstore.exceptions
        unheard = 0

        def put(store: ObjectStore) -> None:
            self._obstore.put(store, name, data, mode="create", use_multipart=False)

        for _ in range(CONFLICTS):
            try:
                self._asked(WRITE, name, put, sent=len(data))
                return True
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
                if "ConditionalRequestConflict" not in str(error):
                    return False
            except StoreError as error:
                unheard += 1
                if SLOW not in str(error) or unheard == WRITE_ATTEMPTS:
                    raise
        raise StoreError(f"cannot write {self.locate(name)}: others remove and write it all the time")

    def probe(self) -> None:
        """Make sure that the service refuses a PUT to a name that is taken, also when several come at once.

        Raises:
            StoreError: it does not, or cannot be asked.
        """
        for _ in range(PROBES):
            winners, sound = self._raced()
            if winners:  # the answer to the first one may have been lost, and its second try told that the name is taken
                break
        if not sound:
            raise StoreError(
                f"the service of {self.address} does not keep writers from replacing each other's files ({winners} of"
                f" {RACERS + 1} that wrote to one name were told that they were first): it does not heed `If-None-Match: *`."
                " Write to a folder, and copy that to a service which does"
            )
        self._remove_old_probes()

    def _raced(self) -> tuple[int, bool]:
        """How many of some that wrote to one name were told that they were first, and whether that is as it should be."""
        name = f"{HIDDEN}probe-{uuid.uuid4().hex[:12]}"
        texts = [f"racer {number}".encode() for number in range(RACERS)]
        try:
            with ThreadPoolExecutor(RACERS) as pool:
                won = list(pool.map(lambda text: self._put(name, text), texts))
            again = self._put(name, b"late")
            standing = self.read(name)
        finally:
            self.remove(name)
        return sum(won) + again, sum(won) == 1 and not again and standing == texts[won.index(True)]

    def _remove_old_probes(self) -> None:
        """Those whose writers were killed, by the service's clock."""
        objects = self._objects("")
        now = max((item["last_modified"] for item in objects), default=None)
        for item in objects:
            if _last(item["path"]).startswith(HIDDEN) and now - item["last_modified"] > LEFTOVER_AGE:
                self.remove(_last(item["path"]))

    def replace(self, files: Sequence[tuple[str, Write]]) -> None:
        """Refused.

        Raises:
            InputError: always; says how a store in a bucket is repaired.
        """
        raise InputError(
            f"{self.address} is not repaired where it is, since nothing in a bucket is replaced: copy it into a folder"
            f" (`knowledge-store copy '{self.address}' FOLDER` leaves damaged shards out), make these again there with the same"
            f" `teacher-dump run FOLDER …`, and put them back by `knowledge-store copy FOLDER '{self.address}' --repair`"
        )

    def make_lasting(self, prefix: str) -> None:
        """What a bucket has taken lasts."""

    def remove(self, name: str) -> None:
        """Remove an object, or find it gone (StoreError)."""
        try:
            self._asked("remove", name, lambda store: self._obstore.delete(store, name))
        except MissingFileError:
            return

    def remove_folder(self, prefix: str) -> None:
        """Remove all objects under `prefix/`, the manifest before what it speaks of (StoreError)."""
        for name in (f"{prefix}/{entry.name}" for entry in self.files(prefix)):
            self.remove(name)

        def remove_rest(store: ObjectStore) -> None:
            for found in self._obstore.list(store, prefix):
                self._obstore.delete(store, [item["path"] for item in found])

        self._asked("remove", prefix, remove_rest)

    def rename_folder(self, old: str, new: str) -> None:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(f"{self.locate(old)} cannot be renamed: a bucket renames nothing; dump or copy it under the new name")

    def exclusive_lock(self, prefix: str) -> AbstractContextManager[None]:
        """Refused.

        Raises:
            InputError: always.
        """

        @contextmanager
        def refused() -> Iterator[None]:
            raise InputError(f"{self.locate(prefix)} cannot be locked: a bucket has no locks")
            yield

        return refused()

    def leftovers(self, prefix: str) -> list[str]:
        """None: what is not published is nowhere."""
        return []

    def remove_leftovers(self, prefix: str) -> None:
        """There are none."""

    def close(self) -> None:
        """Let go of the connections."""
        self._made.clear()


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _version(meta: Any) -> str:
    return str(meta.get("e_tag") or meta["last_modified"])
