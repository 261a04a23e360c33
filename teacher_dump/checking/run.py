"""`check`: a teacher is asked again about some sequences of a dump, and its answers are held against what was kept.

Token ids are in the store, so the corpus is not needed. CHECKERS has the kinds of knowledge that can be checked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import InputError
from knowledge_store.reporter import SILENT, Reporter
from teacher_dump.checking.token_source import find_tokens
from teacher_dump.configuration import CheckConfig
from teacher_dump.extraction import EXTRACTORS
from teacher_dump.teachers.loading import check_loading
from teacher_dump.teachers.opening import check_files, open_teacher

if TYPE_CHECKING:
    from teacher_dump.checking.agreement import Agreement
    from teacher_dump.teachers.protocol import Teacher

# Given a store and a dump's manifest, ordinals int64 (S,) of the sequences to ask about, ascending, and the teacher.
Checker = Callable[[KnowledgeStore, Manifest, np.ndarray, "Teacher", CheckConfig, Reporter], "Agreement"]


def _check_positions(*arguments: Any) -> Agreement:
    # Torch takes seconds to import, and mistakes must not wait for it.
    from teacher_dump.checking.positions.checker import check_positions

    return check_positions(*arguments)


def _check_distances(*arguments: Any) -> Agreement:
    from teacher_dump.checking.distances.checker import check_distances

    return check_distances(*arguments)


CHECKERS: dict[str, Checker] = {
    "positions": _check_positions,
    "saliency": partial(_check_distances, "saliency"),
    "vectors": partial(_check_distances, "vectors"),
    "hidden": partial(_check_distances, "hidden"),
}


def check(config: CheckConfig, teacher: Teacher | None = None, *, reporter: Reporter = SILENT) -> dict[str, Agreement]:
    """Ask a teacher again about sequences of a dump, drawn at random, and say how far it agrees with what was kept.

    Args:
        config: which dump and teacher, and how many sequences.
        teacher: already loaded as `config` says; loaded here when None.
        reporter: hears of progress, and of kinds of knowledge that cannot be checked.

    Returns:
        The agreement with each kind of knowledge that can be checked, by its name.

    Raises:
        InputError: something given cannot be used, or the dump holds no kind that can be checked.
        StoreError, DamageError: there is no such store, or a manifest or commit record is altered.
    """
    store = KnowledgeStore.open(config.store, cache_size=0, reporter=reporter)
    manifest = store.manifest(config.dump)
    kinds = [kind for kind in manifest.kinds if kind in CHECKERS]
    if not kinds:
        raise InputError(
            f"dump {manifest.dump!r} holds {', '.join(manifest.kinds)}, which cannot be checked: give a dump that holds"
            f" {' or '.join(CHECKERS)}"
        )
    count = store.sequence_count(manifest.dump)
    if not count:
        raise InputError(f"dump {manifest.dump!r} of {store.address} has no committed sequence yet")
    if find_tokens(store, manifest) is None:
        raise InputError(
            f"dump {manifest.dump!r} does not hold its tokens, and no other dump of {store.address} has all of them: dump the"
            " same corpus with --kind positions too"
        )
    if teacher is None:
        check_files(config)
    for kind in manifest.kinds:
        if kind not in kinds:
            reporter.note(f"The kind {kind} of the dump {manifest.dump} is not checked: there is no checker for it.")

    loading = config.loading
    if loading.engine == "transformers":  # the others load no weights as smaller ones
        loading = replace(loading, quantize=config.quantize or manifest.teacher.get("quantize"))
    check_loading(loading)
    teacher = teacher or open_teacher(config, loading, manifest.plan["max_length"], reporter=reporter)
    teacher.recognise(manifest.teacher)
    for kind in [kind for kind in kinds if EXTRACTORS[kind].needs - teacher.abilities]:
        reporter.note(f"The kind {kind} of the dump {manifest.dump} is not checked: this teacher cannot give it.")
        kinds.remove(kind)
    if not kinds:
        raise InputError(f"the teacher gives nothing that dump {manifest.dump!r} holds: check it with the teacher loaded here")
    ordinals = np.sort(np.random.default_rng(config.seed).choice(count, min(config.sample, count), replace=False))
    return {kind: CHECKERS[kind](store, manifest, ordinals, teacher, config, reporter) for kind in kinds}
