"""What a teacher does, found by asking it: whether it looks ahead, which tokens it never gives, which sequences may be batched.

Nothing is decided by a model's name. A probe compares two answers that ought to be the same, at each position by the root mean
square of the difference of the logits, as a share of their standard deviation over the vocabulary. Rounding to float32 moves
them by some 10⁻⁶ of it, rounding to 16 bits by some 10⁻².
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from knowledge_store.errors import InputError
from teacher_dump.teachers.protocol import Batching, Teacher

if TYPE_CHECKING:
    from teacher_dump.teachers.local import LocalTeacher

SHORT = 32  # tokens: of the texts that are asked when a teacher is loaded
MIN_LENGTH = 8  # tokens: of the shortest sequence that is batched with longer ones
COMPARED = 64  # positions of a sequence
MEASURED = 512  # tokens of a text whose memory is measured: attention that takes the square is what grows beyond it
# Beyond it two answers differ by more than rounding: as a share of the logits' standard deviation.
TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.05, "float16": 0.02}
# The same where both answers come from one batch, all of whose rows are computed alike.
TOLERANCE_OF_ROWS = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.02, "float16": 0.005}
# At how many of a sequence's positions, of all. In 16 bits rounding sends tokens to other experts, and moves those far.
SHARE = {"float64": 0.0, "float32": 0.0, "bfloat16": 0.5, "float16": 0.5}


def _tokens(count: int, vocabulary: int, seed: int) -> np.ndarray:
    """Token ids int64 (count,) all over a vocabulary, the same for the same seed."""
    return np.random.default_rng(seed).integers(0, vocabulary, count)


def _logits(teacher: Teacher, rows: list[np.ndarray], places: list[np.ndarray]) -> list[torch.Tensor]:
    """The logits of each row's places, float32 (n, V) on the CPU, all rows in one batch padded on the right."""
    lengths = np.array([len(row) for row in rows])
    padded = np.zeros((len(rows), lengths.max()), np.int64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    prediction = teacher.predict(padded, np.arange(padded.shape[1]) < lengths[:, None])
    numbers = torch.from_numpy(np.repeat(np.arange(len(rows)), [len(part) for part in places])).to(teacher.device)
    positions = torch.from_numpy(np.concatenate(places)).to(teacher.device)
    logits = torch.cat([part.cpu() for _, part in prediction.logit_slices(numbers, positions)])
    return list(logits.split([len(part) for part in places]))


def difference(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """How far two answers (n, V) are from each other: float32 (n,), as a share of the logits' standard deviation.

    Columns that are infinite in either count as equal; NaN anywhere counts as no difference, since a teacher that gives it is
    refused when it is asked, with the sequence's name.
    """
    known = logits.isfinite() & others.isfinite()
    count = known.sum(dim=1).clamp(min=2)
    values, apart = logits.masked_fill(~known, 0), (logits - others).masked_fill(~known, 0)
    apart = apart - (apart.sum(dim=1) / count)[:, None] * known  # a shift of all logits changes no probability
    deviation = values - (values.sum(dim=1) / count)[:, None] * known
    scale = deviation.square().sum(dim=1).sqrt().clamp(min=1e-12)
    return apart.square().sum(dim=1).sqrt() / scale


def check_looks_back(teacher: Teacher) -> None:
    """Make sure that what comes later in a text changes no prediction.

    Two texts with the same beginning and other ends are asked in one batch, three times over: only a position that moves every
    time counts, as rounding may send a token to another expert once.

    Raises:
        InputError: it does.
    """
    length, vocabulary = _probe_length(teacher), teacher.vocabulary_size
    begin = length // 2
    rows = []
    for trial in range(3):
        one, other = (_tokens(length, vocabulary, seed) for seed in (2 * trial, 2 * trial + 1))
        other[:begin] = one[:begin]
        rows += [one, other]
    logits = _logits(teacher, rows, [np.arange(begin)] * len(rows))
    moved = torch.stack([difference(*logits[2 * trial : 2 * trial + 2]) for trial in range(3)]).amin(dim=0)
    if (moved > _of_dtype(TOLERANCE_OF_ROWS, teacher)).any():
        raise InputError(
            f"{teacher.description['name']} looks ahead (tokens that come later change what it predicts, as in a model that"
            " fills gaps): choose a causal language model as the teacher, which predicts each token from those before it alone"
        )


def check_gradients(teacher: LocalTeacher) -> None:
    """Make sure that a teacher answers alike when it is given the embeddings of tokens in the tokens' place, and that gradients
    reach them. Some models look at the tokens in deeper layers too.

    Raises:
        InputError: it does not, or cannot be asked so.
    """
    tokens = _tokens(2 * _probe_length(teacher), teacher.vocabulary_size, 0).reshape(2, -1)
    mask = np.ones(tokens.shape, bool)
    rows, positions = (torch.from_numpy(indices.ravel()).to(teacher.device) for indices in np.indices(tokens.shape))
    reason = "their gradients are 0, NaN or infinite"
    try:
        prediction = teacher.predict(tokens, mask, gradients=True)
        answers = [
            torch.cat([part.cpu() for _, part in each.logit_slices(rows, positions)])
            for each in (teacher.predict(tokens, mask), prediction)
        ]
        moved = (difference(*answers) > _of_dtype(TOLERANCE_OF_ROWS, teacher)).float().mean()
        _, gradients = prediction.input_gradients(rows, positions, lambda part, logits: logits.sign())
        if gradients.isfinite().all() and gradients.any() and moved <= _of_dtype(SHARE, teacher):
            return
        if moved > _of_dtype(SHARE, teacher):
            reason = "they are not all that it looks at"
    except (
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        KeyError,
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
    raise InputError(
        f"{teacher.description['name']} cannot be asked about the embeddings of its tokens, of which gradients are taken"
        f" ({reason}): use another teacher, or leave the kind of knowledge out that is made of gradients"
    )


def gradient_bytes(teacher: LocalTeacher, longest: int) -> int:
    """Bytes that are kept of a position between the forward and the backward pass, in a sequence of up to `longest` tokens."""
    length = min(longest, MEASURED, teacher.description["max_positions"] or longest)
    weights = {parameter.untyped_storage().data_ptr() for parameter in teacher.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = _tokens(length, teacher.vocabulary_size, 0)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = teacher.predict(tokens, np.ones(tokens.shape, bool), gradients=True)
    assert prediction.traced is not None
    outputs = prediction.traced[1]
    return (sum(kept.values()) + 2 * outputs.untyped_storage().nbytes()) // length + 1


def impossible_tokens(teacher: LocalTeacher) -> np.ndarray:
    """Tokens whose logits are −inf wherever a short text asks for them: rows that pad the head. int64 (n,), ascending."""
    logits = _logits(
        teacher, [_tokens(_probe_length(teacher), teacher.vocabulary_size, 0)], [np.arange(_probe_length(teacher))]
    )
    return torch.nonzero(logits[0].isneginf().all(dim=0))[:, 0].numpy()


def find_batching(teacher: LocalTeacher, longest: int, room: int) -> Batching:
    """Which sequences may share a batch.

    Sequences of `longest` tokens, of 3/4, 1/2, 3/8, 1/4 and so on of that are asked alone and in one batch. Where a shorter one
    answers otherwise beside a longer one, the length that its configuration names as the one it was first trained on is tried
    as the border between two sorts of batches; else sequences are asked one by one, provided that a sequence's answer does
    not depend on what was asked before it.

    Args:
        teacher: to ask.
        longest: tokens of the longest sequence.
        room: positions of the largest batch, padding included.

    Raises:
        InputError: its answers depend on what it was asked before.
    """
    shared = min(longest, room // 2)  # tokens of the longest sequence that has company
    shares = (shared * part // 4 >> halvings for halvings in range(32) for part in (4, 3))
    lengths = [length for length in shares if length >= MIN_LENGTH]
    if len(lengths) < 2 or _same_together(teacher, lengths, room):
        return Batching()
    border = _border(teacher)
    if border is not None and MIN_LENGTH <= border < shared:
        sides = [[border, *(length for length in lengths if length < border)], [shared, border + 1]]
        if all(_same_together(teacher, side, room) for side in sides):
            return Batching("sides", border)
    _check_history(teacher, longest)
    return Batching("alone")


def _same_together(teacher: LocalTeacher, lengths: list[int], room: int) -> bool:
    """Whether sequences of these lengths, longest first, answer in a batch as they do alone."""
    rows = [_tokens(length, teacher.vocabulary_size, length) for length in lengths]
    places = [_places(length) for length in lengths]
    shorter = list(range(1, len(lengths)))
    size = max(room // lengths[0] - 1, 1)
    for begin in range(0, len(shorter), size):
        indices = [0, *shorter[begin : begin + size]]
        together = _logits(teacher, [rows[index] for index in indices], [places[index] for index in indices])
        for index, logits in zip(indices, together, strict=True):
            if _differs(teacher, _logits(teacher, [rows[index]], [places[index]])[0], logits):
                return False
    return True


def _check_history(teacher: LocalTeacher, longest: int) -> None:
    """Make sure that sequences asked one by one answer alike, whatever was asked before.

    Raises:
        InputError: they do not.
    """
    rows = [_tokens(length, teacher.vocabulary_size, length) for length in (MIN_LENGTH, 3 * longest // 4, longest - 1, longest)]
    first: dict[int, torch.Tensor] = {}
    for index in (0, 1, 0, 2, 0, 3, 1, 3, 2):
        logits = _logits(teacher, [rows[index]], [_places(len(rows[index]))])[0]
        if _differs(teacher, first.setdefault(index, logits), logits):
            rope = _rope(teacher).get("rope_type")
            named = f" (its rope_type is {rope!r})" if rope else ""
            raise InputError(
                f"{teacher.description['name']} answers otherwise after another text than before it, where texts have up to"
                f" {longest} tokens{named}: give a smaller --max-length"
            )


def _differs(teacher: LocalTeacher, logits: torch.Tensor, others: torch.Tensor) -> bool:
    moved = (difference(logits, others) > _of_dtype(TOLERANCE, teacher)).float().mean()
    return bool(moved > _of_dtype(SHARE, teacher))


def _places(length: int) -> np.ndarray:
    """At most COMPARED positions of a sequence, in its latter half, where what is before them counts most."""
    return np.unique(np.linspace(length // 2, length - 1, COMPARED).astype(np.int64))


def _of_dtype(values: dict[str, float], teacher: Teacher) -> float:
    return values.get(teacher.description["dtype"], values["bfloat16"])


def _probe_length(teacher: Teacher) -> int:
    return min(SHORT, teacher.description["max_positions"] or SHORT)


def _rope(teacher: LocalTeacher) -> dict[str, Any]:
    parameters = getattr(teacher.model.config.get_text_config(), "rope_parameters", None)
    return parameters if isinstance(parameters, dict) else {}


def _border(teacher: LocalTeacher) -> int | None:
    """The length that the configuration says a model was first trained on, before it learnt longer ones."""
    config = teacher.model.config.get_text_config()
    named = _rope(teacher).get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
    return named if isinstance(named, int) else None
