"""What `vectors` and `hidden` keep of a batch's hidden states."""

from __future__ import annotations

import numpy as np
import torch

from knowledge_store.errors import InputError
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.hidden import HiddenParameters
from knowledge_store.kinds.vectors import VectorsParameters
from teacher_dump.corpus.tokenisation import TokenSequence
from teacher_dump.extraction.distributions import place_of
from teacher_dump.extraction.extractor import ExtractionBatch


def extract_vectors(batch: ExtractionBatch) -> list[Arrays]:
    """The pooled hidden states of each sequence, float32 (1, H), or None where there is nothing to pool; see `kinds.vectors`.

    Raises:
        InputError: a state is NaN or infinite; names the sequence.
    """
    states = batch.prediction.layer_states(batch.parameters.layer)
    extracted: list[Arrays] = []
    for row, sequence in enumerate(batch.sequences):
        places = _pooled(sequence, batch.parameters)
        if not len(places):
            extracted.append({"vector": [None]})
            continue
        chosen = states[row, torch.from_numpy(places).to(states.device)].float()
        vector = chosen.mean(dim=0).cpu().numpy()
        _check_finite(vector, sequence)
        extracted.append({"vector": vector[None]})
    return extracted


def _pooled(sequence: TokenSequence, parameters: VectorsParameters) -> np.ndarray:
    """The positions whose states a sequence's vector is made of, int64 (n,)."""
    places = np.flatnonzero(sequence.is_target) if parameters.over == "targets" else np.arange(1, len(sequence.token_ids))
    return places[-1:] if parameters.pooling == "last" else places


def extract_hidden(batch: ExtractionBatch) -> list[Arrays]:
    """The hidden states of the chosen layers, side by side, at the positions that are kept: for each position of each sequence
    an array float32 (L · H,), or None; see `kinds.hidden`.

    Raises:
        InputError: a state is NaN or infinite; names the sequence.
    """
    parameters: HiddenParameters = batch.parameters
    layers = [batch.prediction.layer_states(layer) for layer in parameters.layers]
    extracted: list[Arrays] = []
    for row, sequence in enumerate(batch.sequences):
        places = parameters.chosen(sequence.document.number, sequence.window, sequence.is_target)
        chosen = [states[row, torch.from_numpy(places).to(states.device)].float().cpu() for states in layers]
        rows = torch.cat(chosen, dim=1).numpy()
        _check_finite(rows, sequence)
        hidden: list[np.ndarray | None] = [None] * len(sequence.token_ids)
        for place, state in zip(places.tolist(), rows, strict=True):
            hidden[place] = state
        extracted.append({"hidden": hidden})
    return extracted


def _check_finite(states: np.ndarray, sequence: TokenSequence) -> None:
    """Make sure that hidden states are numbers. InputError: one is NaN or infinite."""
    if not np.isfinite(states).all():
        raise InputError(
            f"the teacher's hidden states are NaN or infinite in {place_of(sequence)}: nothing of its shard was written. Check"
            " the teacher's weights; if its dtype is a short one, dump under another --name with --dtype float32"
        )
