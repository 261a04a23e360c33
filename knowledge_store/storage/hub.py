"""A store in a data set of the Hugging Face Hub: `hf://datasets/OWNER/NAME@REVISION/PATH`, to be read alone.

Everything is of one commit: a branch or a tag is looked up once, and the commit's files, which never change, are listed once.
The address and the token are where huggingface_hub looks for them (`HF_ENDPOINT`, `HF_TOKEN`, `hf auth login`). No message has
the token.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NoReturn, TypeVar

from knowledge_store.errors import InputError, KnowledgeStoreError, MissingFileError, StoreError
from knowledge_store.storage.protocol import Entry

Result = TypeVar("Result")

SCHEME = "hf://"
TIMEOUT = 30.0  # seconds of silence
AT_ONCE = 16  # requests
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/?#]+))?((?:/[^/?#]+)*)/?")
_WRITING = ("create", "replace", "remove", "remove_folder", "rename_folder", "exclusive_lock", "probe", "make_lasting")


class HubStorage:
    """The files of one commit of a data set, under a path (see `Storage`). Nothing can be written.

    Args:
        address: as above; without a revision the branch `main`. A slash in a revision's name is written %2F.

    Raises:
        InputError: it is no such address, or huggingface_hub is not installed.
    """

    forkable = False  # connections are not for two processes
    at_once = AT_ONCE

    def __init__(self, address: str):
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise InputError(f"{address} is no address of a store: give hf://datasets/OWNER/NAME@REVISION/PATH")
        self._repository, self._revision = match[1], (match[2] or "main").replace("%2F", "/")
        self._prefix = match[3].strip("/")
        self.address = address
        try:
            import huggingface_hub
        except ModuleNotFoundError:
            raise InputError("stores on the hub need huggingface_hub: pip install huggingface_hub") from None
        self._hub = huggingface_hub

    def __reduce__(self) -> tuple[type[HubStorage], tuple[str]]:
        return HubStorage, (self._of(self._commit),)  # of the same commit, whatever becomes of the branch

    def __getattr__(self, name: str) -> Any:
        if name not in _WRITING:
            raise AttributeError(name)
        return self._refuse

    def _refuse(self, *arguments: object) -> NoReturn:
        raise InputError(
            f"{self.address} can only be read: write to a folder, and put it there by `hf upload {self._repository} FOLDER"
            " --repo-type dataset`"
        )

    def _of(self, revision: str) -> str:
        path = f"/{self._prefix}" if self._prefix else ""
        return f"{SCHEME}datasets/{self._repository}@{revision.replace('/', '%2F')}{path}"

    @property
    def cache_key(self) -> str:
        """The address, with the commit."""
        return self._of(self._commit)

    def locate(self, name: str) -> str:
        """The address of a file."""
        return f"{self._of(self._revision)}/{name}" if name else self._of(self._revision)

    external_address = locate  # DuckDB knows such addresses

    def _asked(self, name: str, request: Callable[[], Result]) -> Result:
        """What a request gives (MissingFileError, StoreError: it failed)."""
        errors = self._hub.errors
        try:
            return request()
        except KnowledgeStoreError:
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise StoreError(
                f"there is no data set {self._repository} with a revision {self._revision!r} on the hub, or HF_TOKEN is not of"
                " somebody who may read it"
            ) from None
        except errors.EntryNotFoundError:
            raise MissingFileError(f"{self.locate(name)} is missing") from None
        except Exception as error:  # huggingface_hub's are of several clients; their words may quote a signed address
            status = getattr(getattr(error, "response", None), "status_code", None)
            reason = f"HTTP {status}" if status else type(error).__name__
            raise StoreError(f"cannot read {self.locate(name)}: the hub does not answer as it should ({reason})") from None

    @cached_property
    def _commit(self) -> str:
        api = self._hub.HfApi()
        info = self._asked("", lambda: api.dataset_info(self._repository, revision=self._revision, timeout=TIMEOUT))
        return str(info.sha)

    @cached_property
    def _files(self) -> dict[str, Entry]:
        """All files of the commit under the path, by name, from one listing."""
        start = len(self._prefix) + 1 if self._prefix else 0

        def listed() -> dict[str, Entry]:
            items = self._hub.HfApi().list_repo_tree(
                self._repository, self._prefix or None, repo_type="dataset", revision=self._commit, recursive=True
            )
            files = [item for item in items if isinstance(item, self._hub.hf_api.RepoFile)]
            return {file.path[start:]: Entry(file.path[start:], file.size, file.blob_id) for file in files}

        try:
            return self._asked("", listed)
        except MissingFileError:
            return {}

    def _file(self, name: str) -> Entry:
        if name not in self._files:
            raise MissingFileError(f"{self.locate(name)} is missing")
        return self._files[name]

    def size(self, name: str) -> int:
        """Bytes of a file (MissingFileError, StoreError)."""
        return self._file(name).size

    def version(self, name: str) -> str:
        """Its hash in git (MissingFileError, StoreError)."""
        return self._file(name).version

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file, by one GET (MissingFileError, StoreError)."""
        size = self.size(name)
        end = size if end is None else min(end, size)
        if start >= end:
            return b""
        path = f"{self._prefix}/{name}" if self._prefix else name
        url = self._hub.hf_hub_url(self._repository, path, repo_type="dataset", revision=self._commit)
        headers = {**self._hub.utils.build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}

        def got() -> bytes:
            response = self._hub.utils.http_backoff("GET", url, headers=headers, timeout=TIMEOUT)
            self._hub.utils.hf_raise_for_status(response)
            return bytes(response.content[start:end] if response.status_code == 200 else response.content)

        data = self._asked(name, got)
        if len(data) != end - start:
            raise StoreError(f"cannot read {self.locate(name)}: the hub sent {len(data):,} bytes of {end - start:,}")
        return data

    def files(self, prefix: str) -> list[Entry]:
        """The files directly under `prefix/`, by name (StoreError)."""
        found = [(name.rpartition("/"), entry) for name, entry in sorted(self._files.items())]
        return [Entry(last, entry.size, entry.version) for (folder, _, last), entry in found if folder == prefix]

    def folders(self, prefix: str) -> list[str]:
        """The names directly under `prefix/` that stand for more files, sorted (StoreError)."""
        start = f"{prefix}/" if prefix else ""
        rests = (name.removeprefix(start) for name in self._files if name.startswith(start))
        return sorted({rest.split("/")[0] for rest in rests if "/" in rest})

    def remove_leftovers(self, prefix: str) -> None:
        """There are none."""

    def leftovers(self, prefix: str) -> list[str]:
        """None."""
        return []

    def close(self) -> None:
        """The connections are huggingface_hub's."""
