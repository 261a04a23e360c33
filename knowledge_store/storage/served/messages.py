"""What a client asks for, and how a server says no: JSON in tickets and actions, and in what goes with a Flight error."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from knowledge_store import errors
from knowledge_store.errors import KnowledgeStoreError

if TYPE_CHECKING:
    from pyarrow import flight

VERSION = 1  # of what client and server say to each other
STORE_HEADER = "knowledge-store"  # which of several stores, in the headers of a call
AUTHORIZATION, BEARER = "authorization", "Bearer "

OPEN, FILES, FOLDERS, SIZE, READ, ROW_GROUPS = (
    f"knowledge-store.{name}" for name in ("open", "files", "folders", "size", "read", "row-groups")
)
MAX_READ = 4 * 2**20  # bytes of a file, at once
MAX_SEQUENCES = 2**16  # asked for at once
HANG_UP = b"hang up"  # of a stream of sequences: it is to be begun again when more are wanted
BUSY = "busy"
QUIET = ("GRPC_VERBOSITY", "NONE")  # what gRPC would write to standard error itself, beside the error that it gives


class BusyError(KnowledgeStoreError):
    """As many calls as a server answers at once are being answered: it may be asked again."""


def to_bytes(request: dict[str, Any]) -> bytes:
    """A request as it is sent."""
    return json.dumps(request, separators=(",", ":")).encode()


def flight_error(error: Exception) -> flight.FlightError:
    """An error as Flight carries it; any that nobody thought of is named, and no more said."""
    from pyarrow import flight

    if isinstance(error, flight.FlightError):
        return error
    if isinstance(error, BusyError):
        name, message = BUSY, str(error)
    elif isinstance(error, KnowledgeStoreError):
        name, message = type(error).__name__, str(error)
    else:
        name, message = KnowledgeStoreError.__name__, f"the server could not answer this: {type(error).__name__}"
    kind = flight.FlightUnavailableError if name == BUSY else flight.FlightServerError
    return kind(message, json.dumps({"error": name, "message": message}).encode())


def library_error(error: Exception) -> KnowledgeStoreError | None:
    """The error that a server sent; None where the call failed in another way."""
    try:
        said = json.loads(getattr(error, "extra_info", None) or b"")
        name, message = said["error"], said["message"]
    except (ValueError, KeyError, TypeError):
        return None
    if name == BUSY:
        return BusyError(str(message))
    kind = getattr(errors, str(name), None)
    if isinstance(kind, type) and issubclass(kind, KnowledgeStoreError):
        return kind(str(message))
    return KnowledgeStoreError(str(message))
