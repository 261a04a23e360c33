"""The options that commands share, and those of `knowledge-store`: frozen dataclasses, one field for each option.

A command is made of one of them (see `terminal.commands`); the other two programs build theirs on those that are shared.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from knowledge_store.errors import InputError
from knowledge_store.isolation.child import MEMORY_LIMIT as READING_LIMIT
from knowledge_store.options import option
from knowledge_store.sql.answers import Format
from knowledge_store.sql.limits import MEMORY_LIMIT, TIMEOUT
from knowledge_store.storage import StorePlace, is_bucket_address

EXPORT_FORMATS = ("parquet", "speculators", "distillkit", "dpo")

# --- shared by the three programs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreOptions:
    """Of a command that works on a store."""

    store: StorePlace = option(
        argument=True,
        metavar="STORE",
        help="The store: a folder, s3://BUCKET/PREFIX (also gs:// and az://), grpc+tls://HOST:PORT of one served, or"
        " hf://datasets/OWNER/NAME, which can only be read.",
    )


@dataclass(frozen=True)
class DumpOptions:
    """Of a command that works on a dump which it can choose itself."""

    _: KW_ONLY
    dump: str | None = option(None, names_dump=True, help="Name of the dump. It may be left out when the store has only one.")


@dataclass(frozen=True)
class OneDumpOptions(StoreOptions):
    """Of a command that works on a dump which it has to be told."""

    dump: str = option(argument=True, metavar="DUMP", names_dump=True, help="The dump's name.")


@dataclass(frozen=True)
class GgufOptions:
    """Of a command that loads a model."""

    _: KW_ONLY
    gguf_file: str | None = option(None, help="Name of a GGUF file in the model's folder, to load the model from that.")


@dataclass(frozen=True)
class CalibrationOptions:
    """Of a command that writes a calibration."""

    _: KW_ONLY
    output: Path = option(Path("calibration.json"), help="The calibration's file. An existing calibration is replaced.")


# --- the commands of `knowledge-store` --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InfoConfig(StoreOptions):
    """The options of `knowledge-store info`."""

    as_json: bool = option(False, flag="--json", help="Print one JSON array, an object for each dump.")


@dataclass(frozen=True)
class SqlConfig(StoreOptions):
    """The options of `knowledge-store sql`."""

    query: str | None = option(
        None, argument=True, metavar="QUERY", help="One SELECT statement; `-` reads it from standard input."
    )
    file: Path | None = option(None, help="Read the statement from this file.")
    files: tuple[str, ...] = option(
        (),
        flag="--with",
        metavar="NAME=FILE",
        help="A Parquet file that the statement may read as the relation NAME. It may be repeated.",
    )
    format: Format = option(Format.table, help="How the answer is printed; json is one array of row objects.")
    memory_limit: float = option(MEMORY_LIMIT / 2**30, above=0, help="The most memory for the query and its answer, in GiB.")
    timeout: float = option(TIMEOUT, above=0, help="The query is interrupted after this many seconds.")


@dataclass(frozen=True)
class BrowseConfig(StoreOptions):
    """The options of `knowledge-store browse`."""

    bind: str = option(
        "127.0.0.1:8816", metavar="HOST:PORT", help="Where the page is, on this machine; port 0 takes a free one."
    )
    open: bool = option(True, help="Open the page in a browser.")
    files: tuple[str, ...] = option(
        (),
        flag="--with",
        metavar="NAME=FILE",
        help="What `student-train evaluate --keep-positions` wrote of the student NAME, to show it beside the teacher; or any"
        " Parquet file, for SQL. It may be repeated.",
    )


@dataclass(frozen=True)
class ExportConfig(OneDumpOptions):
    """The options of `knowledge-store export`."""

    output: Path = option(help="The file or folder to write; an existing one is never replaced.")
    format: str = option(
        EXPORT_FORMATS[0],
        choices=EXPORT_FORMATS,
        help="parquet: the rows of a kind as a Parquet file. speculators: hidden states as a folder that the trainer of draft"
        " models of that name reads, a file for each sequence. distillkit: candidates as a folder that DistillKit trains from."
        " dpo: groups of answers as a Parquet file of pairs with the teacher's log-probabilities, for TRL's DPOTrainer.",
    )
    where: str | None = option(None, help="A condition in SQL: only rows that meet it are written.")
    kind: str | None = option(None, help="Which kind of knowledge, when the dump has several.")


@dataclass(frozen=True)
class VerifyConfig(StoreOptions):
    """The options of `knowledge-store verify`."""

    memory_limit: float = option(READING_LIMIT / 2**30, above=0, help="The most memory for reading one shard, in GiB.")


@dataclass(frozen=True)
class ReindexConfig(StoreOptions):
    """The options of `knowledge-store reindex`."""

    bundle: bool = option(
        False,
        help="Also write the commit records that a bucket has now into one object of each dump, by which others open the store"
        " in few requests. A dump that is complete has it already.",
    )

    def __post_init__(self) -> None:
        if self.bundle and not is_bucket_address(str(self.store)):
            raise InputError("--bundle is for stores in buckets: any other is opened as fast without")


@dataclass(frozen=True)
class RemoveConfig(OneDumpOptions):
    """The options of `knowledge-store remove`."""

    yes: bool = option(False, help="Do not ask.")


@dataclass(frozen=True)
class RenameConfig(StoreOptions):
    """The options of `knowledge-store rename`."""

    old: str = option(argument=True, metavar="OLD", names_dump=True, help="The dump's name.")
    new: str = option(argument=True, metavar="NEW", help="Its new name.")


@dataclass(frozen=True)
class CopyConfig:
    """The options of `knowledge-store copy`."""

    source: StorePlace = option(argument=True, metavar="SOURCE", help="The store to copy from.")
    destination: StorePlace = option(argument=True, metavar="DESTINATION", help="The store to copy to; made when missing.")
    dump: str | None = option(None, names_dump=True, help="Copy this dump alone.")
    repair: bool = option(
        False,
        help="Remove what is damaged in DESTINATION and copy it again: so a store in a bucket is repaired. Nobody else may"
        " write there meanwhile.",
    )


@dataclass(frozen=True)
class ServeConfig:
    """The options of `knowledge-store serve`."""

    stores: tuple[StorePlace, ...] = option(
        argument=True, metavar="STORE", help="The stores, each known by the last part of its name."
    )
    token_file: Path = option(
        help="File of the tokens that are let in, one in a line, a name before it if you like; read again on SIGHUP."
    )
    bind: str = option("127.0.0.1:8815", metavar="HOST:PORT", help="Where to listen; port 0 has the system choose one.")
    tls_cert: Path | None = option(None, help="The server's certificate chain, PEM.")
    tls_key: Path | None = option(None, help="The certificate's private key, PEM.")
    insecure: bool = option(False, help="Serve without TLS where other machines can listen: tokens are sent in the clear.")
    streams: int = option(16, min=1, help="So many calls for sequences and files are answered at once.")
    queries: int = option(2, min=1, help="So many queries are answered at once; one more is refused.")
    memory_limit: float = option(MEMORY_LIMIT / 2**30, above=0, help="The most memory for a query and its answer, in GiB.")
    timeout: float = option(600.0, above=0, help="A query is interrupted after this many seconds.")
    metrics: str | None = option(
        None, metavar="HOST:PORT", help="Give figures in Prometheus's format at http://HOST:PORT/metrics, to anybody."
    )
    page: str | None = option(
        None, metavar="HOST:PORT", help="Show the store on a page at this address too, to those who have a token."
    )


@dataclass(frozen=True)
class SequenceConfig(StoreOptions, DumpOptions):
    """The options of `knowledge-store sequence`."""

    sequence_id: int = option(argument=True, metavar="ID", help="The sequence's `sequence_id`, as SQL shows it.")
