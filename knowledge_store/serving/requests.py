"""What a server takes of a request: JSON of a declared shape.

Requests come from anybody who has a token. What has not the declared shape is refused before anything is looked at.
"""

from __future__ import annotations

import json
from typing import Any

from knowledge_store.errors import InputError
from knowledge_store.format.records import check_shape

MAX_REQUEST = 2**22  # bytes of a ticket or an action


def from_bytes(data: bytes, shape: dict[str, Any]) -> dict[str, Any]:
    """A request of a declared shape (see `records.check_shape`).

    Raises:
        InputError: it is none.
    """
    if len(data) > MAX_REQUEST:
        raise InputError(f"a request has at most {MAX_REQUEST:,} bytes, and this has {len(data):,}")
    try:
        request = json.loads(data)
        check_shape(request, shape)
    except (ValueError, RecursionError) as error:
        raise InputError(f"this is no request of a knowledge store: {error}") from None
    return dict(request)
