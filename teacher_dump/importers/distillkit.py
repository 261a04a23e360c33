"""The packed Parquet files of DistillKit, and the configuration that lies beside them.

A row has `input_ids` and, for each token but maybe the last, a list of bytes of ids and one of log-probabilities, likeliest
first:

    bytepacked_indices   k ids of ⌈log₂ d⌉ bits each, most significant bit first, then zeros up to a whole byte
    compressed_logprobs  exact_k numbers of exact_dtype; the coefficients of `polynomial_terms`, of term_dtype; then for each of
                         `residual_bins` a scale of scale_dtype, and num_elements whole numbers of element_bits, packed as ids

Numbers are little-endian. What is not exact is Σ coefficient · term(t), for t = 0, 1, … (or from 0 to 1, with `normalize_t`),
plus the residuals: scale · (n − 2^(bits − 1)), of one bit scale · (2n − 1). With `delta_encoding` all are differences, to be
added up.

The older form has `packed_indices` (as many ids in each 64-bit number as fit, the first in its lowest bits), `exact_values`,
and `coeffs` of a polynomial in t = 1, 2, …, or in 1/t (`invert_polynomial`), with √t as its last term where `with_sqrt_term`
says so. Files may also have plain `token_ids` and `top_values`.

Row j predicts token j + 1. A row may be packed of several texts: `attention_mask` then has another number for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml

from knowledge_store.errors import InputError
from teacher_dump.importers.configuration import PREDICTS, ImportConfig
from teacher_dump.importers.layout import IGNORED, BadLayout, Layout, LayoutRow, split
from teacher_dump.importers.rows import FileRow, real_numbers, table_rows, wanted, whole_numbers

BESIDE = ("compression_config.yaml", "compression_config.yml", "compression_config.json")
PACKED = ("input_ids", "compressed_logprobs", "bytepacked_indices")
OLDER = ("input_ids", "packed_indices", "exact_values", "coeffs")
RAW = ("input_ids", "token_ids", "top_values")
OPTIONAL = ("attention_mask", "labels")
WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}  # bytes
MAX_CANDIDATES = 2**16
MAX_BITS = 57  # of an id: with the bits before it, it stands in eight bytes


@dataclass(frozen=True)
class Bin:
    """Residuals that share a scale."""

    scale_dtype: str
    bits: int
    count: int


@dataclass(frozen=True)
class Compression:
    """A configuration of either form.

    Attributes:
        d, k, exact_k: size of the vocabulary, candidates, and those of them that are kept as numbers.
        exact_dtype, term_dtype: of WIDTHS.
        terms: of the polynomial: a power, "sqrt" or "exp".
        bins: of residuals. delta: whether all are differences. first, last: of t. older: the form.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    term_dtype: str
    terms: tuple[int | str, ...]
    bins: tuple[Bin, ...]
    delta: bool
    first: float
    last: float
    older: bool

    @property
    def index_bits(self) -> int:
        """Bits of an id."""
        return math.ceil(math.log2(self.d)) if self.d > 1 else 0

    def polynomial(self) -> np.ndarray:
        """The terms at each candidate that is not exact, float64 (k − exact_k, terms)."""
        t = np.linspace(self.first, self.last, self.k - self.exact_k)
        functions = {"sqrt": np.sqrt, "exp": np.exp}
        return np.stack([functions[term](t) if isinstance(term, str) else t ** float(term) for term in self.terms], axis=1)

    @classmethod
    def read(cls, path: Path) -> Compression:
        """From a file of it, or the file of a run that has it as the teacher's.

        Raises:
            InputError: it is none.
        """
        try:
            record = yaml.safe_load(path.read_bytes())
            teacher = record.get("teacher", record)
            older = teacher.get("legacy_logit_compression") or (teacher if "vocab_size" in teacher and "k" in teacher else None)
            settings = older or teacher.get("logprob_compressor") or teacher
            compression = cls._older(settings) if older else cls._newer(settings)
            compression.check()
        except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
            detail = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{path} is no configuration of DistillKit's compression: {detail}") from None
        return compression

    @classmethod
    def _newer(cls, settings: dict[str, Any]) -> Compression:
        k, exact = int(settings["k"]), int(settings["exact_k"])
        bins = tuple(
            Bin(entry["scale_dtype"], int(entry["element_bits"]), int(entry["num_elements"]))
            for entry in settings.get("residual_bins") or ()
        )
        return cls(
            int(settings["d"]),
            k,
            exact,
            settings.get("exact_dtype", "float32"),
            settings.get("term_dtype", "float32"),
            tuple(settings.get("polynomial_terms") or ()),
            bins,
            bool(settings.get("delta_encoding", True)),
            0.0,
            1.0 if settings.get("normalize_t") else float(k - exact - 1),
            older=False,
        )

    @classmethod
    def _older(cls, settings: dict[str, Any]) -> Compression:
        k, exact = int(settings["k"]), int(settings["exact_k"])
        sign = -1 if settings.get("invert_polynomial", True) else 1
        terms: list[int | str] = [sign * power for power in range(int(settings["polynomial_degree"]) + 1)]
        return cls(
            int(settings["vocab_size"]),
            k,
            exact,
            "float16",
            settings.get("term_dtype", "float32"),
            tuple([*terms, "sqrt"] if settings.get("with_sqrt_term") else terms),
            (),
            False,
            1.0,
            float(k - exact),
            older=True,
        )

    def check(self) -> None:
        """ValueError: nothing can be unpacked by it."""
        names = [self.exact_dtype, self.term_dtype, *(one.scale_dtype for one in self.bins)]
        if not set(names) <= WIDTHS.keys():
            raise ValueError(f"a dtype is none of {', '.join(WIDTHS)}")
        if not 0 <= self.exact_k <= self.k <= MAX_CANDIDATES or self.k < 1 or self.d < 1 or self.index_bits > MAX_BITS:
            raise ValueError("d, k and exact_k do not fit together")
        if any(one.count < 1 or not 1 <= one.bits <= 32 for one in self.bins):
            raise ValueError("a bin has no elements, or of more than 32 bits each")
        if sum(one.count for one in self.bins) > self.k - self.exact_k:
            raise ValueError("its bins have more elements than there are candidates")
        if not all(isinstance(term, int) or term in ("sqrt", "exp") for term in self.terms):
            raise ValueError("a term is no power, sqrt or exp")


class DistillKit(Layout):
    """The layout `distillkit`."""

    predicts: ClassVar[str] = PREDICTS[1]
    slack: ClassVar[float] = 0.05  # polynomials, and numbers of 16 bits
    narrow_ids: ClassVar[bool] = True

    def __init__(self, config: ImportConfig):
        super().__init__(config)
        self._found: dict[Path, Compression] = {}

    @property
    def vocabulary_size(self) -> int | None:
        """As the configuration of the first file has it, where there is one."""
        compression = self._compression(self.config.files[0])
        return None if compression is None else compression.d

    def compression(self, path: Path) -> Compression:
        """The configuration of a file's compression (InputError: there is none)."""
        compression = self._compression(path)
        if compression is None:
            raise InputError(f"there is no {BESIDE[0]} beside {path}: name it with --compression")
        return compression

    def _compression(self, path: Path) -> Compression | None:
        beside = [path.parent / name for name in BESIDE]
        file = self.config.compression or next((place for place in beside if place.is_file()), None)
        if file is None:
            return None
        if file not in self._found:
            self._found[file] = Compression.read(file)
        return self._found[file]

    def rows(self, path: Path, first: int, offset: int) -> Iterator[LayoutRow]:
        """See `Layout`."""
        form: list[tuple[str, ...]] = []

        def columns(names: Any) -> list[str]:
            form[:] = [shape for shape in (PACKED, OLDER, RAW) if set(shape) <= set(names)] or [PACKED]
            return wanted(form[0], OPTIONAL)(names)

        for row in table_rows(path, first, offset, columns):
            ids, logprobs = self._unpacked(row, form[0], path)
            mask, labels = row.columns.get("attention_mask"), row.columns.get("labels")
            yield LayoutRow(
                row.number,
                row.offset,
                split(
                    whole_numbers(row.columns["input_ids"], "input_ids"),
                    ids,
                    logprobs,
                    self.shift,
                    mask=None if mask is None else whole_numbers(mask, "attention_mask"),
                    is_target=None if labels is None else whole_numbers(labels, "labels") != IGNORED,
                ),
            )

    def _unpacked(self, row: FileRow, form: tuple[str, ...], path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities of a row's predictions, (R, k) each."""
        if form == RAW:
            return whole_numbers(row.columns[RAW[1]], RAW[1], 2), real_numbers(row.columns[RAW[2]], RAW[2], 2)
        compression = self.compression(path)
        if compression.older != (form == OLDER):
            raise BadLayout(f"its columns are {', '.join(form)}, and the configuration of its compression is of the other form")
        if form == OLDER:
            packed, exact, coefficients = (row.columns[name] for name in OLDER[1:])
            return older_rows(whole_numbers(packed, OLDER[1], 2), real_numbers(exact, OLDER[2], 2), coefficients, compression)
        octets = [whole_numbers(row.columns[name], name, 2).astype(np.uint8) for name in PACKED[1:]]
        logprobs = unpack_logprobs(octets[0], compression)
        if compression.index_bits * compression.k > 8 * octets[1].shape[1] and len(octets[1]):
            raise BadLayout(f"{octets[1].shape[1]} bytes do not hold {compression.k} ids of {compression.index_bits} bits")
        return unpack_bits(octets[1], compression.index_bits, compression.k), logprobs

    def record(self) -> dict[str, Any]:
        """See `Layout`."""
        compressions = [asdict(self._found[file]) for file in sorted(self._found)]
        return {"compression": compressions} if compressions else {}


def unpack_bits(octets: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` whole numbers of so many bits from each row of bytes (R, B), most significant bit first: int64 (R, count)."""
    if not bits or not len(octets):
        return np.zeros((len(octets), count), np.int64)
    begin = np.arange(count) * bits
    byte, skipped = begin >> 3, begin & 7
    taken = (bits + 7 + 7) // 8  # bytes, as many as it may touch
    wide = np.pad(octets, ((0, 0), (0, taken)))
    word = np.zeros((len(octets), count), np.uint64)
    for place in range(taken):
        word = word << np.uint64(8) | wide[:, byte + place]
    shift = (8 * taken - bits - skipped).astype(np.uint64)
    return (word >> shift & np.uint64((1 << bits) - 1)).astype(np.int64)


def _floats(octets: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of a dtype from rows of bytes, float64 (R, N)."""
    octets = np.ascontiguousarray(octets)
    if dtype == "bfloat16":
        return (octets.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return octets.view(f"<f{WIDTHS[dtype]}").astype(np.float64)


def unpack_logprobs(octets: np.ndarray, compression: Compression) -> np.ndarray:
    """The log-probabilities that rows of bytes (R, B) stand for, (R, k): float64 where all were kept so, else float32.

    Raises:
        BadLayout: there are too many bytes, or too few.
    """
    sizes = [compression.exact_k * WIDTHS[compression.exact_dtype], len(compression.terms) * WIDTHS[compression.term_dtype]]
    for one in compression.bins:
        sizes += [WIDTHS[one.scale_dtype], -(-one.count * one.bits // 8)]
    if not len(octets):
        return np.zeros((0, compression.k))
    if octets.shape[1] != sum(sizes):
        raise BadLayout(
            f"a prediction has {octets.shape[1]} bytes of log-probabilities, and its configuration says {sum(sizes)}"
        )
    exact, coefficients, *bins = np.split(octets, np.cumsum(sizes)[:-1], axis=1)
    rest = np.zeros((len(octets), compression.k - compression.exact_k))
    if compression.terms and rest.size:
        rest += _floats(coefficients, compression.term_dtype) @ compression.polynomial().T
    start = 0
    for one, scale, packed in zip(compression.bins, bins[::2], bins[1::2], strict=True):
        numbers = unpack_bits(packed, one.bits, one.count).astype(np.float64)
        numbers = 2 * numbers - 1 if one.bits == 1 else numbers - 2.0 ** (one.bits - 1)
        rest[:, start : start + one.count] += numbers * _floats(scale, one.scale_dtype)
        start += one.count
    logprobs = np.concatenate([_floats(exact, compression.exact_dtype), rest], axis=1)
    logprobs = np.cumsum(logprobs, axis=1) if compression.delta else logprobs
    return logprobs if compression.exact_dtype == "float64" and not rest.size else logprobs.astype(np.float32)


def older_rows(
    packed: np.ndarray, exact: np.ndarray, coefficients: Any, compression: Compression
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of predictions in the older form, (R, k) each."""
    bits, count = compression.index_bits, compression.k
    each = 64 // max(bits, 1)
    if packed.shape[1] != -(-count // each) or exact.shape[1] != compression.exact_k:
        raise BadLayout("a prediction has not as many ids or exact values as its configuration says")
    words = packed.astype(np.int64).view(np.uint64)
    shifts = (np.arange(each) * bits).astype(np.uint64)
    ids = (words[:, :, None] >> shifts & np.uint64((1 << bits) - 1)).reshape(len(packed), -1)[:, :count].astype(np.int64)
    rest = np.zeros((len(packed), 0))
    if count > compression.exact_k:
        numbers = real_numbers(coefficients, OLDER[3], 2)
        if numbers.shape[1] != len(compression.terms):
            raise BadLayout("a prediction has not as many coefficients as its configuration says")
        rest = numbers @ compression.polynomial().T
    return ids, np.concatenate([exact.astype(np.float64), rest], axis=1).astype(np.float32)
