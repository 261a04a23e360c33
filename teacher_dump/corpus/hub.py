"""Data sets of the hub as local files: `hf://datasets/OWNER/NAME[@REVISION][/PATH]`.

A revision is resolved to its commit, whose files are downloaded into the hub's cache and read as any others. What a revision
held when it was last looked at is remembered, so that a data set in the cache can be used offline.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from knowledge_store.errors import InputError
from knowledge_store.format.layout import user_cache
from knowledge_store.reporter import Reporter

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 10  # seconds to wait for the hub's first answer
_FORM = "hf://datasets/OWNER/NAME, with @REVISION and /PATH after it if need be"


@dataclass(frozen=True)
class HubAddress:
    """Where a corpus is on the hub. path: a file, a folder, or a pattern with `*`; empty for all of it."""

    repository: str
    revision: str
    path: str

    def __str__(self) -> str:
        return f"hf://datasets/{self.repository}@{self.revision}{'/' if self.path else ''}{self.path}"


@dataclass(frozen=True)
class Listing:
    """What a revision held: its commit, and the names of its files."""

    commit: str
    files: list[str]


def hub_address(path: Path) -> HubAddress | None:
    """The address that a corpus was named by; None for a local path.

    Raises:
        InputError: it begins as an address and is none.
    """
    if path.parts[:1] != ("hf:",):
        return None
    parts = list(path.parts[1:])
    if parts[:1] != ["datasets"] or len(parts) < 3:
        raise InputError(f"{'hf://' + '/'.join(parts)} is not the address of a data set: give {_FORM}")
    owner, (name, _, revision), rest = parts[1], parts[2].partition("@"), parts[3:]
    if revision == "refs" and len(rest) >= 2:  # as in refs/convert/parquet and refs/pr/1
        revision, rest = "/".join([revision, *rest[:2]]), rest[2:]
    return HubAddress(f"{owner}/{name}", unquote(revision) or "main", "/".join(rest))


def hub_file_name(path: Path) -> str | None:
    """What a file in the hub's cache is called there, with its data set and commit; None for any other file."""
    for place, part in enumerate(path.parts[:-3]):
        if part.startswith("datasets--") and path.parts[place + 1] == "snapshots":
            repository = part.removeprefix("datasets--").replace("--", "/", 1)
            return f"{repository}@{path.parts[place + 2]}/{'/'.join(path.parts[place + 3 :])}"
    return None


def hub_files(address: HubAddress, suffixes: tuple[str, ...], reporter: Reporter) -> list[Path]:
    """The files of an address in the hub's cache, downloaded if need be.

    Args:
        address: of the data set.
        suffixes: of the files that can be read.
        reporter: hears what was taken, and of the download.

    Raises:
        InputError: there is no such data set or file, the address names several sorts of files, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise InputError(f"{address} needs huggingface_hub: pip install 'knowledge-store[teacher]'") from None
    listing, problem = _listing(address)
    names = _chosen(address, listing, suffixes)

    def cached(name: str) -> Path | None:
        path = try_to_load_from_cache(address.repository, name, revision=listing.commit, repo_type="dataset")
        return Path(path) if isinstance(path, str) else None

    missing = [name for name in names if cached(name) is None]
    if missing and problem is None:
        _ask(address)  # without a connection each download would be tried for a minute
    if missing and problem is not None:
        raise InputError(f"{address}: {len(missing)} of its {len(names)} files are not in the hub's cache, and {problem}")
    if problem is not None:
        reporter.note(f"{address} is taken as it was last seen, at commit {listing.commit}: {problem}")
    for name in missing:
        try:
            hf_hub_download(address.repository, name, revision=listing.commit, repo_type="dataset")
        except Exception as error:  # the hub's client raises errors of many families
            raise InputError(f"{address}: {name} could not be downloaded ({_first_line(error)})") from None
    return [path for name in names if (path := cached(name)) is not None]


def _listing(address: HubAddress) -> tuple[Listing, str | None]:
    """What a revision holds; if that is remembered because the hub cannot be asked, why it cannot."""
    key = hashlib.sha256(f"{address.repository}@{address.revision}".encode()).hexdigest()[:32]
    memory = user_cache("hub") / f"{key}.json"
    remembered = None
    with contextlib.suppress(OSError, ValueError, TypeError):
        remembered = Listing(**json.loads(memory.read_text()))
    if remembered is not None and _COMMIT.fullmatch(address.revision):
        return remembered, None
    try:
        listing = _ask(address)
    except _Unreachable as error:
        if remembered is None:
            raise
        return remembered, str(error.reason)
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        memory.write_text(json.dumps(asdict(listing)))
    return listing, None


class _Unreachable(InputError):
    """The hub cannot be asked. reason: why, as the end of a sentence."""

    def __init__(self, address: HubAddress, reason: str):
        super().__init__(f"{address} cannot be read: {reason}, and what it holds is not known from an earlier run")
        self.reason = reason


def _ask(address: HubAddress) -> Listing:
    """Ask the hub what a revision holds, once."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(address.repository, revision=address.revision, timeout=_TIMEOUT)
    except OfflineModeIsEnabled:
        raise _Unreachable(address, "HF_HUB_OFFLINE keeps the hub from being asked") from None
    except RevisionNotFoundError:
        raise InputError(f"{address}: the data set has no revision {address.revision}") from None
    except GatedRepoError:
        raise InputError(f"{address}: its owner gives access on request: ask on its page, then `hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(f"{address}: the hub has no data set of that name that can be read from here") from None
    except HfHubHTTPError as error:
        raise _Unreachable(address, f"the hub answers with an error ({_first_line(error)})") from None
    except Exception as error:  # those of the HTTP library, which differs from release to release
        raise _Unreachable(address, f"the hub at {constants.ENDPOINT} cannot be reached ({type(error).__name__})") from None
    return Listing(str(info.sha), sorted(sibling.rfilename for sibling in info.siblings or []))


def _chosen(address: HubAddress, listing: Listing, suffixes: tuple[str, ...]) -> list[str]:
    readable = [name for name in listing.files if name.endswith(suffixes)]
    path = address.path
    if path in readable:
        return [path]
    if "*" in path:
        chosen = [name for name in readable if fnmatchcase(name, path)]
    else:
        chosen = [name for name in readable if not path or name.startswith(f"{path}/")]
    patterns = sorted({_pattern(name) for name in chosen})
    if not chosen:
        known = sorted({_pattern(name) for name in readable})
        files = f"it has {_listed(known)}" if known else f"it has no file that ends in {', '.join(suffixes)}"
        other = "" if known else "; the hub keeps many others as Parquet: try @refs/convert/parquet"
        raise InputError(f"{address} names no file that can be read: {files}{other}")
    if "*" not in path and len(patterns) > 1:  # which would mix splits, or train on a test set
        example = f"hf://datasets/{address.repository}@{address.revision}/{patterns[0]}"
        raise InputError(f"{address} has several sorts of files: name one, as in '{example}', of {_listed(patterns)}")
    return chosen


def _pattern(name: str) -> str:
    """A file's name with its numbers left open: files of one split differ in them alone."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    stem = re.sub(r"(^|[-_])[0-9]+(-of-[0-9]+)?(-[0-9a-f]{16})?$", r"\1*", stem)
    return str(path.with_name(f"{stem}{dot}{suffix}"))


def _listed(patterns: list[str]) -> str:
    return ", ".join(patterns[:6]) + (f" and {len(patterns) - 6} more" if len(patterns) > 6 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
