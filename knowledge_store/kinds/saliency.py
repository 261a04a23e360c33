"""The kind `saliency`: which tokens of the context decided the targets of a sequence, as the teacher sees it.

The context are the tokens before a sequence's last target that are no targets themselves; in a conversation of several turns
that is everything but the assistant's words. Each has the *share* that it holds of the sequence's saliency: how far the
targets' log-odds, summed over all targets, move with its embedding. Shares are at least 0 and sum to one over a sequence. Where
no token of the context moves anything, all are 0.

    share_i = s_i / Σ_j s_j      gradient-norm     s_i = ‖∂/∂e_i Σ_targets (z_y − LSE_{v≠y} z_v)‖₂
                                 input-x-gradient  s_i = |e_i · ∂/∂e_i Σ_targets (z_y − LSE_{v≠y} z_v)|

e_i is the token's input embedding, z the logits that predict a target, and y the token that stands there (`of` gold) or the
teacher's likeliest one (`of` teacher).

On disk a share is a number of steps, of which the sequence's largest has MAX_STEPS, and the share of one step, which is one
number a sequence: shares rank as they did down to 1/4096 of the largest, however long the context is.

In a batch of B sequences of at most T positions these are

    saliency   (B, T)  float32  the shares; 0 at targets, after the last of them, and in padding

Where a dump has no `positions`, the table says itself which tokens these are, in `token_id` and `is_target`, and a batch has
`token_id` (B, T) int64 and `is_answer` (B, T) bool, the targets: the names of the text's own arrays are those of `positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from knowledge_store.errors import InputError
from knowledge_store.format.manifest import Manifest
from knowledge_store.format.records import check_shape
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds.columns import Arrays
from knowledge_store.kinds.field import PLAIN, SPLIT, Field
from knowledge_store.kinds.kind import Codec, Kind, Totals, parameters_of

METHODS = ("gradient-norm", "input-x-gradient")
SUBJECTS = ("gold", "teacher")

MAX_STEPS = 4095  # 12 bits
MAX_EXCESS = 1e-6  # by which the shares of a sequence may miss one together
TOP = 5  # tokens whose shares are added up in a statistic
ROW_BYTES = 2048  # as a position takes, so that a sequence stands in the same row group of both

SHARE = Field("share", pa.float32(), nullable=True)
TOKENS = (
    Field("token_id", pa.uint32(), encoding=PLAIN, identifying=True),
    Field("is_target", pa.bool_(), identifying=True),
)
# Steps stand as float32, counted from ZERO: split byte by byte they take little more than their entropy, in a dictionary more.
STORED = (Field("steps", pa.float32(), nullable=True, encoding=SPLIT), Field("step_share", pa.float32()))
ZERO = 2**23

VIEW = """\
SELECT sequence_id, "position", CAST((CAST(steps AS DOUBLE) - {zero}) * CAST(step_share AS DOUBLE) AS FLOAT) AS share{more}
FROM {rows}"""
RANKED = """
        SELECT {dump} AS dump, sequence_id, rank, "position", token_id,
               texts.list[CAST(token_id AS BIGINT) + 1] AS token_text, share
        FROM (SELECT sequence_id, "position", token_id, share,
                     CAST(row_number() OVER (PARTITION BY sequence_id ORDER BY share DESC, "position") AS INTEGER) AS rank
              FROM COLUMNS
              WHERE share IS NOT NULL) AS ranked, {texts} AS texts"""
BESIDE = '(SELECT token_id, shares.* FROM {rows of positions} JOIN {rows} AS shares USING (sequence_id, "position"))'


@dataclass(frozen=True)
class SaliencyParameters:
    """What decides what a share is.

    Attributes:
        method: one of METHODS.
        of: one of SUBJECTS: whether the targets are the tokens that stand there, or the teacher's likeliest ones.
    """

    method: str = METHODS[0]
    of: str = SUBJECTS[0]

    def to_record(self) -> dict[str, Any]:
        """The parameters as the manifest has them."""
        return {"method": self.method, "of": self.of}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> SaliencyParameters:
        """The parameters of a manifest.

        Raises:
            ValueError: they cannot be used.
        """
        check_shape(record, {"method": str, "of": str}, "saliency")
        for name, known in (("method", METHODS), ("of", SUBJECTS)):
            if record[name] not in known:
                raise ValueError(f"its {name}, {record[name]!r}, is not one of {', '.join(known)}")
        return cls(record["method"], record["of"])


def saliency_of(manifest: Manifest) -> SaliencyParameters:
    """The parameters of a dump's saliency.

    Raises:
        InputError: it holds none.
    """
    return parameters_of(manifest, "saliency", SaliencyParameters)


def has_tokens(manifest: Manifest) -> bool:
    """Whether the tokens stand beside the shares: only where no `positions` of the dump have them."""
    return "positions" not in manifest.kinds


def _more(manifest: Manifest) -> tuple[Field, ...]:
    return TOKENS if has_tokens(manifest) else ()


def fields(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's table."""
    return (SHARE, *_more(manifest))


def stored(manifest: Manifest) -> tuple[Field, ...]:
    """The columns of a dump's files."""
    return (*STORED, *_more(manifest))


def takes(manifest: Manifest) -> tuple[str, ...]:
    """The names of the arrays that `pack` takes."""
    return tuple(field.name for field in fields(manifest))


def in_steps(saliency: np.ndarray) -> np.ndarray:
    """The saliency of one sequence's context in steps, float64 (N,), not yet rounded: its largest has MAX_STEPS."""
    largest = saliency.max(initial=0)
    return saliency.astype(np.float64) / largest * MAX_STEPS if largest > 0 else np.zeros(len(saliency))


def pack(keys: pa.Table, arrays: Arrays, manifest: Manifest) -> pa.Table:
    """The stored table of N positions, of whole sequences.

    Args:
        keys: sequence_id and position, N rows.
        arrays: share (N,), a `numpy.ma` array of floats at least 0 and of any sum, masked where a position is no context; and
            token_id (N,) and is_target (N,) where the dump has no `positions`.
        manifest: of the dump.

    Raises:
        InputError: a value is below zero, NaN or infinite.
    """
    saliency = np.ma.asarray(arrays["share"])
    absent, values = np.ma.getmaskarray(saliency), saliency.filled(0).astype(np.float64)
    if not np.isfinite(values).all():
        raise InputError("a saliency is NaN or infinite: nothing is written")
    if (values < 0).any():
        raise InputError(f"a saliency is below zero, {values.min():.3g}: the extractor is wrong; nothing is written")
    steps, step_share = np.zeros(len(values)), np.zeros(len(values), np.float32)
    ids = keys["sequence_id"].to_numpy()
    ends = [*np.flatnonzero(np.diff(ids)) + 1, len(ids)]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        steps[start:end] = np.round(in_steps(values[start:end]))
        total = steps[start:end].sum()
        step_share[start:end] = 1 / total if total else 0
    columns = [*keys.columns, pa.array((steps + ZERO).astype(np.float32), mask=absent), pa.array(step_share)]
    columns += [pa.array(arrays[field.name], field.type) for field in _more(manifest)]
    return pa.table(columns, schema=SALIENCY.stored_schema(manifest))


def unpack(table: pa.Table, manifest: Manifest) -> pa.Table:
    """The table that a stored one stands for. ValueError: it stands for none."""
    steps = table["steps"].fill_null(ZERO).to_numpy().astype(np.float64) - ZERO
    if not ((steps >= 0) & (steps <= MAX_STEPS) & (steps == np.round(steps))).all():
        raise ValueError(f"the steps of a share are no whole number up to {MAX_STEPS}")
    if table["step_share"].null_count:
        raise ValueError("step_share is null")
    shares = (steps * table["step_share"].to_numpy().astype(np.float64)).astype(np.float32)
    share = pa.array(shares, mask=table["steps"].is_null().to_numpy())
    columns = [*table.columns[:2], share, *(table[field.name] for field in _more(manifest))]
    return pa.table(columns, schema=SALIENCY.schema(manifest))


def view(manifest: Manifest) -> str:
    """`unpack` as SQL."""
    return VIEW.replace("{zero}", str(ZERO)).replace("{more}", "".join(f", {field.name}" for field in _more(manifest)))


def decode(table: pa.Table, manifest: Manifest) -> Arrays:
    """Positions as arrays of N rows.

    Returns:
        saliency float32 (N,), 0 where a position is no context; where the table has tokens token_id int64 (N,) and is_answer
        bool (N,).

    Raises:
        ValueError: a token or its being a target is missing, or numbers are not finite.
    """
    shares = table["share"].fill_null(0).to_numpy()
    if not np.isfinite(shares).all():
        raise ValueError("a share is not a finite number")
    if "token_id" not in table.column_names:
        return {"saliency": shares}
    for field in TOKENS:
        if table[field.name].null_count:
            raise ValueError(f"{field.name} is null")
    return {
        "saliency": shares,
        "token_id": table["token_id"].to_numpy().astype(np.int64),
        "is_answer": table["is_target"].to_numpy(),
    }


def arrays_of(manifest: Manifest) -> dict[str, float]:
    """The arrays that `decode` gives, and what stands where there is no position."""
    return {"saliency": 0.0, **({"token_id": 0, "is_answer": False} if has_tokens(manifest) else {})}


def checks(table: pa.Table, sequences: pa.Table, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the saliency of some sequences, in words."""
    shares, known = table["share"].fill_null(0).to_numpy().astype(np.float64), table["share"].is_valid().to_numpy()
    tokens, is_target = (table[field.name].to_numpy() for field in TOKENS) if has_tokens(manifest) else (None, None)
    if not np.isfinite(shares).all() or (shares < 0).any():
        yield "a share is below zero, or not a finite number"
        return
    if tokens is not None and (tokens >= manifest.vocabulary_size).any():
        yield f"a token id is not below the vocabulary size, {manifest.vocabulary_size}"
    rows = zip(*(sequences[name].to_pylist() for name in ("sequence_id", "length", "targets", "token_hash")), strict=True)
    start = 0
    for sequence, length, targets, expected in rows:
        part, start = slice(start, start + length), start + length
        absent = np.flatnonzero(~known[part])
        if len(absent) < targets:
            yield f"sequence {sequence} has {targets} targets, and shares at all but {len(absent)} of its positions"
        elif known[part][absent[targets - 1] if targets else 0 :].any():
            yield f"sequence {sequence} has a share behind its last target"
        if (total := shares[part].sum()) and abs(total - 1) > MAX_EXCESS:
            yield f"the shares of sequence {sequence} do not sum to one, but to {total:.6g}"
        if tokens is None or is_target is None:
            continue
        if token_hash(tokens[part]) != expected:
            yield f"the token ids of sequence {sequence} do not match its token_hash"
        context = ~is_target[part] & (np.arange(length) < np.flatnonzero(is_target[part]).max(initial=0))
        if is_target[part].sum() != targets or (known[part] != context).any():
            yield f"sequence {sequence} does not have {targets} targets, and shares at all the context before the last"


def measure(table: pa.Table, manifest: Manifest) -> dict[str, float]:
    """How many positions are context, how many sequences there are, and what the TOP most salient tokens of each hold together
    on average."""
    shares, ids = table["share"].fill_null(0).to_numpy().astype(np.float64), table["sequence_id"].to_numpy()
    parts = np.split(shares, np.flatnonzero(np.diff(ids)) + 1)
    tops = [np.sort(part)[-TOP:].sum() for part in parts]
    return {
        "context": len(shares) - table["share"].null_count,
        "sequences": len(parts),
        "mean_top_5_share": float(np.mean(tops)),
    }


def lines(manifest: Manifest, totals: Totals) -> list[tuple[str, str]]:
    """What `info` tells of a dump's saliency."""
    kept = saliency_of(manifest)
    targets = "the targets" if kept.of == "gold" else "the teacher's own likeliest tokens"
    listed = [("saliency", f"{kept.method} of {targets}, at {totals.count('context'):,} positions")]
    if (share := totals.statistics.get("mean_top_5_share")) is not None:
        listed.append(("most salient tokens", f"{TOP} of a sequence hold {share:.1%} of its saliency on average"))
    return listed


def facts(manifest: Manifest, totals: Totals) -> dict[str, str | float | int | None]:
    """What the relation `dumps` has of it: how it was computed."""
    return dict(saliency_of(manifest).to_record())


def rationales(manifest: Manifest) -> str:
    """SQL of the relation `rationales`: the tokens of each context, most salient first."""
    return RANKED.replace("COLUMNS", "{rows}" if has_tokens(manifest) else BESIDE)


def show(knowledge: Arrays, text: Callable[[int], str]) -> tuple[list[str], list[list[str]]]:
    """The context of a sequence as a person reads it: the share of each token, and its rank."""
    shares = knowledge["saliency"]
    tokens = knowledge["input_ids" if "input_ids" in knowledge else "token_id"]
    ranks = np.empty(len(shares), np.int64)
    ranks[np.argsort(-shares, kind="stable")] = np.arange(1, len(shares) + 1)
    rows = [
        [str(position), text(tokens[position]), *((f"{share:.1%}", str(ranks[position])) if share else ("", ""))]
        for position, share in enumerate(shares)
    ]
    return ["position", "token", "saliency", "rank"], rows


SALIENCY = Kind(
    name="saliency",
    per="position",
    fields=fields,
    parameters=SaliencyParameters,
    codec=Codec(
        takes=takes,
        stored=stored,
        pack=pack,
        unpack=unpack,
        view=view,
        sources={"share": ("steps", "step_share")},
        decode=decode,
        arrays=arrays_of,
    ),
    row_bytes=lambda manifest: ROW_BYTES,
    statistics={"context": None, "sequences": None, "mean_top_5_share": "sequences"},
    measure=measure,
    checks=checks,
    relations={"rationales": rationales},
    lines=lines,
    facts=facts,
    show=show,
)
