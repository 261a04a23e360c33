"""The tar files of Megatron-LM's saver of logits, with a file of the tokens that were predicted.

`cpC_dpD__I.tar` is of data-parallel rank D, up to iteration I, in order of iterations. Its first member, `_meta.json`, says how
it was saved; the others, `N.pt.zst`, are of an iteration each: a Zstandard frame of a dictionary of lists, of a tensor for each
microbatch: `values` (S, B, k) log-probabilities, `indices_low` uint16 and `bit_17` bool, the lower 16 bits and the one above
them. Row s predicts token s + 1 of its sample. Candidates beyond top-p have the log-probability −1000.

The tokens are those of the samples in the order of training: each global microbatch has B samples of rank 0, then B of rank 1.
A sample has S + 1 tokens, or S where the last prediction is not wanted.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from teacher_dump.fingerprints import file_sha256
from teacher_dump.importers.configuration import PREDICTS, ImportConfig
from teacher_dump.importers.layout import BadLayout, Layout, LayoutRow, split
from teacher_dump.importers.rows import table_rows, wanted, whole_numbers

NAME = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
MEMBER = re.compile(r"(\d+)\.pt\.zst")
META = "_meta.json"
TOKENS = "input_ids"


class Megatron(Layout):
    """The layout `megatron`."""

    predicts: ClassVar[str] = PREDICTS[1]
    slack: ClassVar[float] = 1e-2  # float16 or bfloat16
    narrow_ids: ClassVar[bool] = True

    def __init__(self, config: ImportConfig):
        super().__init__(config)
        ranks = []
        for path in config.files:
            found = NAME.fullmatch(path.name)
            if found is None:
                raise InputError(f"{path} is not named as Megatron-LM names them, cp0_dp0__100.tar: give it that name")
            if found[1] != "0":
                raise InputError(
                    f"{path} is of context-parallel rank {found[1]}: files of several such ranks cannot be imported"
                )
            ranks.append(int(found[2]))
        self._ranks = max(ranks) + 1
        if set(ranks) != set(range(self._ranks)):
            missing = min(set(range(self._ranks)) - set(ranks))
            raise InputError(
                f"there is no file of data-parallel rank {missing}, cp0_dp{missing}__….tar: name those of all ranks"
            )
        self._rank = dict(zip(config.files, ranks, strict=True))
        self._tokens: list[np.ndarray] | None = None

    @property
    def _samples(self) -> list[np.ndarray]:
        """The token ids of each sample."""
        path = self.config.token_file
        if self._tokens is None and path is not None:
            rows = table_rows(path, 1, 0, wanted([TOKENS]))
            try:
                self._tokens = [whole_numbers(row.columns[TOKENS], TOKENS) for row in rows]
            except BadLayout as error:
                raise InputError(f"{path} is no file of tokens: {error}") from None
        return self._tokens or []

    def _first_of(self, path: Path) -> int:
        """How many global microbatches the files of the same rank before this one have."""
        earlier = [other for other in self.config.files if self._rank[other] == self._rank[path] and _last(other) < _last(path)]
        return sum(len(tensors["values"]) for other in earlier for tensors in _iterations(other))

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`; a row is a sample."""
        number, microbatch = 0, self._first_of(path)
        for tensors in _iterations(path):
            for values, low, high in zip(tensors["values"], tensors["indices_low"], tensors["bit_17"], strict=True):
                if values.ndim != 3 or values.shape != low.shape or values.shape != high.shape:
                    raise BadLayout("its tensors are not of one shape (sequence, batch, k)")
                batch = values.shape[1]
                for place in range(batch):
                    number += 1
                    if number >= first:
                        sample = (microbatch * self._ranks + self._rank[path]) * batch + place
                        yield self._row(number, sample, values[:, place], low[:, place], high[:, place])
                microbatch += 1

    def _row(self, number: int, sample: int, values: np.ndarray, low: np.ndarray, high: np.ndarray) -> LayoutRow:
        if sample >= len(self._samples):
            raise BadLayout(
                f"its sample {number} is number {sample + 1:,}, and --token-file has {len(self._samples):,} samples"
            )
        tokens = self._samples[sample]
        if len(tokens) not in (len(values), len(values) + 1):
            raise BadLayout(
                f"its sample {number} has {len(values):,} predictions, and in --token-file {len(tokens):,} tokens, not"
                f" {len(values) + 1:,}"
            )
        ids = low.astype(np.int64) | high.astype(np.int64) << 16
        return LayoutRow(number, 0, split(tokens, ids, values, self.shift))

    def record(self) -> dict[str, Any]:
        """See `Layout`."""
        path = self.config.token_file
        return {} if path is None else {"token_file_sha256": file_sha256(path)}


def _last(path: Path) -> int:
    """The last iteration of a file."""
    found = NAME.fullmatch(path.name)
    return int(found[3]) if found else 0


def _iterations(path: Path) -> Iterator[dict[str, list[np.ndarray]]]:
    """What each iteration of a file has, as arrays."""
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.name == META:
                    content = archive.extractfile(member)
                    json.loads(b"" if content is None else content.read())
                elif MEMBER.fullmatch(member.name) and (content := archive.extractfile(member)) is not None:
                    yield _tensors(content.read(), member.name)
    except (tarfile.TarError, OSError, json.JSONDecodeError) as error:
        raise BadLayout(f"it is no tar file of saved logits ({error})") from None


def _tensors(data: bytes, name: str) -> dict[str, list[np.ndarray]]:
    import torch  # takes seconds

    try:
        content = pa.CompressedInputStream(pa.BufferReader(data), "zstd").read()
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return {
            "values": [tensor.float().numpy() for tensor in tensors["values"]],
            "indices_low": [tensor.to(torch.int32).numpy() for tensor in tensors["indices_low"]],
            "bit_17": [tensor.numpy() for tensor in tensors["bit_17"]],
        }
    except Exception as error:  # a broken pickle fails in many ways
        raise BadLayout(f"its member {name} cannot be read ({type(error).__name__})") from None
