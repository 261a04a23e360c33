"""What a dump's selection of candidates and draws allows a run, and which tokens its sequences hold. Here alone does training
know of the kind `positions`, but for `calibration`, which re-calibrates what that kind keeps. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import POSITIONS, knows_tokens, positions_of
from student_train.losses.table import Loss
from student_train.training.configuration import TrainConfig

SCAN_SECONDS = 3600.0  # for a few columns of the whole dump
SCAN_MEMORY = 4 * 2**30  # bytes, for a few numbers of each of its sequences


def check_selection(manifest: Manifest, config: TrainConfig, loss: Loss) -> None:
    """Refuse a dump that keeps no draws where they are asked for, or does not know how likely each token is where that is read.

    Raises:
        InputError: says what to choose instead.
    """
    dump, rule = manifest.dump, positions_of(manifest).selection
    if config.tail == "draws" and not rule.draw_weight:
        raise InputError(f"--tail draws: the dump {dump} keeps no draws from the tail ({rule}); use --tail bucket")
    if "token_logprob" in loss.columns and not knows_tokens(manifest):
        raise InputError(
            f"the loss {config.loss} needs the teacher's log-probability of each token, and the dump {dump} does not know it of"
            " tokens that are no candidate: choose another --loss, or a dump that the teacher itself was asked for"
        )


def check_selections(manifests: Sequence[Manifest], config: TrainConfig, loss: Loss) -> list[str]:
    """What a loss does about draws that some of several dumps lack, in a sentence; nothing where all have some, or none has."""
    if not loss.draws or config.tail == "bucket" or config.temperature != 1 or config.calibration is not None:
        return []
    without = [manifest.dump for manifest in manifests if not positions_of(manifest).selection.draw_weight]
    if len(without) in (0, len(manifests)):
        return []
    none = " and ".join(without)
    return [f"Draws are taken only where all dumps keep some: the tail is a bucket, since there are none in {none}."]


def check_tokens_known(manifest: Manifest, option: str) -> None:
    """Refuse a dump that does not say how likely its teacher found each target.

    Raises:
        InputError: naming the option that names the dump.
    """
    if not knows_tokens(manifest):
        raise InputError(
            f"{option}: the dump {manifest.dump} does not know the teacher's log-probability of each token (it is an import, or"
            " has no positions): name a dump that the teacher itself was asked for"
        )


def answer_logprobs(store: KnowledgeStore, dump: str) -> pa.Table:
    """Of each sequence of a dump that has targets: `sequence_id`; `logprob`, which is the teacher's log-probability summed over
    the targets (double, nats); and `targets`, how many these are.

    Raises:
        InputError: of some targets the log-probability is not known.
    """
    table = store.sql(
        "SELECT sequence_id, sum(CAST(token_logprob AS DOUBLE)) AS logprob, count(*) AS targets,"
        " count(token_logprob) AS known FROM positions WHERE dump = $dump AND is_target GROUP BY sequence_id",
        {"dump": dump},
        timeout=SCAN_SECONDS,
        memory_limit=SCAN_MEMORY,
    )
    known, targets = (table[name].to_numpy() for name in ("known", "targets"))
    if unknown := int((known < targets).sum()):
        raise InputError(
            f"the dump {dump} does not know the teacher's log-probability of all targets in {unknown:,} of its {len(table):,}"
            " sequences: dump the corpus again"
        )
    return table.select(["sequence_id", "logprob", "targets"])


def used_tokens(store: KnowledgeStore, dump: str, token_ids: set[int]) -> set[int]:
    """Those of some tokens that a dump's sequences hold; all of them where the dump has no rows of positions to say so."""
    if not token_ids or POSITIONS.name not in store.manifest(dump).kinds:
        return token_ids
    chosen = ", ".join(map(str, sorted(token_ids)))
    # Candidates and draws are not asked: a draw may be any token, so that a long dump has drawn nearly all of them, and would
    # refuse every renamed one; what a student learns there is how likely the teacher finds an id that the text never holds.
    query = f"SELECT DISTINCT token_id FROM positions WHERE dump = $dump AND token_id IN ({chosen})"
    return set(store.sql(query, {"dump": dump}, timeout=SCAN_SECONDS)["token_id"].to_pylist())
