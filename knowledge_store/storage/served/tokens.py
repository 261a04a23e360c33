"""The tokens that a server knows, in a file that is read again when that is asked for.

A line is a token, or a name and a token; the name is what logs call whoever has it. Empty lines and lines that begin with `#`
are left out. A client reads such a file too, and takes the first token in it.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from knowledge_store.errors import InputError

ENVIRONMENT = "KNOWLEDGE_STORE_TOKEN"
MIN_CHARACTERS = 16
MAX_FILE_BYTES = 2**20


@dataclass(frozen=True)
class Token:
    """A secret, and what logs call whoever has it."""

    name: str
    secret: str = field(repr=False)


def read_tokens(path: str | Path) -> list[Token]:
    """The tokens of a file, of which there is at least one.

    Raises:
        InputError: it cannot be read, has none, or one that is too short to be a secret.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError as error:
        raise InputError(f"the tokens cannot be read from {path}: {error.strerror}") from None
    return _tokens(text, str(path))


def environment_token(text: str) -> str:
    """The token of a client, from what its environment variable holds (raises as `read_tokens`)."""
    return _tokens(text, ENVIRONMENT)[0].secret


def _tokens(text: str, path: str) -> list[Token]:
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise InputError(f"line {number} of {path} is no token: write a token in it, or a name and a token")
        secret = words[-1]
        if not (secret.isascii() and secret.isprintable()):  # it could not be sent
            raise InputError(f"line {number} of {path} is no token: one has ASCII letters, digits and signs")
        if len(secret) < MIN_CHARACTERS:
            raise InputError(
                f"the token in line {number} of {path} has {len(secret)} characters, and can be guessed: make one of at least"
                f" {MIN_CHARACTERS}, with `openssl rand -hex 32`"
            )
        digest = hashlib.sha256(secret.encode()).hexdigest()[:8]
        tokens.append(Token(words[0] if len(words) == 2 else f"token-{digest}", secret))
    if not tokens:
        raise InputError(f"{path} has no token: make one with `openssl rand -hex 32 > {path}`")
    return tokens


class TokenFile:
    """The tokens of a server.

    Args:
        path: their file.

    Raises (on construction):
        InputError: as of `read_tokens`.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self.read_again()

    def read_again(self) -> None:
        """Take what stands in the file now; where it cannot be used (InputError), the tokens stay as they were."""
        tokens = read_tokens(self._path)
        self._digests = [(hashlib.sha256(token.secret.encode()).digest(), token.name) for token in tokens]

    def holder(self, secret: str) -> str | None:
        """The name of the token that a secret is, or None. It takes as long whether it is one of them, like one, or neither."""
        given = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, name in self._digests:
            if hmac.compare_digest(digest, given):
                found = name
        return found
