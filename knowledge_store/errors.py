"""Everything that can go wrong for a user, as one small tree.

KnowledgeStoreError          base of all: a command prints it as one line and exits with 2
├── InputError               what the user gave cannot be used (a file, an option, a model)
├── StoreError               the folder is not a store that can be used (foreign, newer, missing)
│   ├── NewerVersionError    a file is of a format version that this code does not know
│   └── MismatchError        the dump was made differently; says which things differ
├── QueryError               SQL that is refused or does not run
│   └── QueryLimitError      SQL that needs more memory or time than it may
├── LimitError               work on what somebody else made needs more memory or time than it may
└── DamageError              bytes on disk are not the bytes that were published; names the file
    └── MissingFileError     a file is not there
"""

MAX_CHARACTERS = 2000


class KnowledgeStoreError(Exception):
    """Base class. The message is one sentence that names the thing and says what to try next, of MAX_CHARACTERS at most: what
    it quotes may come from anybody, and be of any length."""

    def __init__(self, message: str = ""):
        super().__init__(message if len(message) <= MAX_CHARACTERS else f"{message[:MAX_CHARACTERS]}…")


class InputError(KnowledgeStoreError):
    """Something the user gave cannot be used."""


class StoreError(KnowledgeStoreError):
    """The folder is not a store that this version can use."""


class NewerVersionError(StoreError):
    """A file of the store is of a newer format version: that is no damage, and nothing here may repair it."""


class MismatchError(StoreError):
    """A dump exists already and was made from something else."""


class QueryError(KnowledgeStoreError):
    """A query that is refused, or that DuckDB cannot run."""


class QueryLimitError(QueryError):
    """A query that needs more memory or time than it may."""


class LimitError(KnowledgeStoreError):
    """Work on what somebody else made needs more memory or time than it may."""


class DamageError(KnowledgeStoreError):
    """A file of the store is missing, truncated or altered."""


class MissingFileError(DamageError):
    """A file of the store is not there."""
