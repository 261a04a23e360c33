"""What a dump's selection of candidates and draws allows a run. Here alone does training know of the kind `positions`, but for
`calibration`, which re-calibrates what that kind keeps. Imports no torch.
"""

from __future__ import annotations

from knowledge_store import Manifest
from knowledge_store.errors import InputError
from knowledge_store.kinds.positions import POSITIONS, positions_of
from student_train.losses.table import LOSSES, Loss
from student_train.training.configuration import TrainConfig


def check_selection(manifest: Manifest, config: TrainConfig, loss: Loss) -> None:
    """Refuse a dump whose selection keeps no draws or no candidates where a loss needs them.

    Raises:
        InputError: says which are missing, and what to choose instead.
    """
    name, dump, rule = config.loss, manifest.dump, positions_of(manifest).selection
    if config.tail == "draws" and not rule.draws:
        raise InputError(f"--tail draws: the dump {dump} keeps no draws from the tail ({rule}); use --tail bucket")
    if rule.candidates or "candidate_ids" not in loss.columns:
        return
    reason = f"the dump {dump} has no candidates, only draws ({rule})"
    if not loss.draws:
        usable = [usable for usable, entry in LOSSES.items() if entry.draws or not entry.columns]
        raise InputError(f"{reason}: the loss {name} cannot use it; choose {' or '.join(usable)}")
    if config.tail == "bucket":
        raise InputError(f"{reason}: --tail bucket has nothing to learn from it; use --tail draws")
    if config.temperature != 1:
        raise InputError(f"{reason}: draws work at --temperature 1 only")


def keeps_candidates(manifest: Manifest) -> bool:
    """Whether a dump says which tokens the teacher finds likeliest."""
    return POSITIONS.name in manifest.kinds and bool(positions_of(manifest).selection.candidates)
