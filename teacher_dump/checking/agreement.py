"""`check`: a teacher is asked again about some sequences of a dump, and its answers are held against what was kept.

Token ids are in the store, so the corpus is not needed. What was kept is rounded, what is asked now is not. Held against each
other are the values that the format rounds each by itself (`positions.exact_steps`). Since format version 3 these are how far
each candidate is below the first, the tail's log-odds, and the log-probability of a token that is no candidate; all else
follows, as probabilities sum to one. Before, they are the log-probabilities themselves. The *difference* of a value is
|kept − asked| less half a quantisation step: what rounding cannot explain, in nats. It is 0 for most values where the teacher
is the same, and grows with whatever makes it answer otherwise. Below a step noise shows all the same: it carries a share of
mean |noise| / step of the values over the edge between two steps, as many up as down. What moves values one way, by however
little, is no noise: the mean of how far they moved shows it, and noise as large does not, as it cancels out.

    numeric noise    batching, device, dtype: small everywhere, no single value is far off, and means are near zero
    damage           most sequences agree, some have values or means far off, or are no knowledge that a selection keeps
    another teacher  values are off in most sequences, or their mean over the sample is

Candidates are compared by id, so that two that are nearly as likely may change places; the first and the tail are those that
were kept. That these are the likeliest is compared too: by how many nats another token is ahead of the last of them. Draws are
made at points that the sequence alone decides, so each must lie, in the running sum of the tail's probabilities, where its
token lies; how far beside it, as a share of the tail, is its difference. Noise moves draws by little, a few in float32 and in a
dtype of 16 bits many, the more the larger the vocabulary. Draws that are off where values agree are damage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from knowledge_store import KnowledgeStore, Manifest
from knowledge_store.errors import DamageError, InputError
from knowledge_store.format.sequences import token_hash
from knowledge_store.kinds import Arrays
from knowledge_store.kinds.columns import padded_lists
from knowledge_store.kinds.positions import damage, exact_steps, positions_of
from knowledge_store.terminal.progress import progress_bar
from teacher_dump.dumping.plan import length_batches
from teacher_dump.extraction.sampling import independent_points, precise, systematic_points
from teacher_dump.teachers.local import Teacher, describe_tokenizer, load_teacher

AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER = "agrees", "damage", "another teacher", "another tokenizer"
ROUNDED = {"token_logprob": "token", "candidate_logprobs": "candidates", "tail_logprob": "tail"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call how many there are
MAX_COUNTED = 2.0  # nats of one value, in a mean
SHOWN = 5
QUANTILES = (0.5, 0.9, 0.99, 0.999, 1.0)
SHARE_OFF = 0.5  # of the sequences: beyond it the teacher is another one, unless its weights are the dump's own


@dataclass(frozen=True)
class Limits:
    """What numeric noise can do to rounded values, of each quantity by itself, in nats, and to draws, in shares of the tail.

    Attributes:
        typical: of the median sequence, mean |difference| of its values. single: of any one value.
        bias, spread: |mean difference| over n positions, of one sequence or of many, is up to bias + spread / √n.
        draws: of a sequence, mean over its draws. draw: of any one draw.
        moved: of a sequence, the share of its draws that fall on another token.
    """

    typical: float
    single: float
    bias: float
    spread: float
    draws: float
    draw: float
    moved: float

    def mean(self, positions: int) -> float:
        """How far the mean over so many positions can be off."""
        return self.bias + self.spread / positions**0.5


# Rounding to float32 at every step of a model moves its log-probabilities by some 1e-6 to 1e-4, rounding to bfloat16 or
# float16 by some 0.01 to 0.1, and that of an unlikely token now and then by several tenths. What lies between two of them, as
# a gap or log-odds does, moves by up to the sum.
#
# Measured on 11 teachers of random weights (llama, qwen2, gpt2, gemma2; 2 to 24 layers; 408 to 50,000 tokens), some 1,100
# positions each, three of them with every selection. In the median sequence candidates, the noisiest, are off by up to 0.12
# nats a value in bfloat16 against float32, either way round; by 0.08 in bfloat16 with another attention kernel, as another
# device may have: so the same dtype has no limits of its own; by 0.01 in bfloat16 with another batch alone and in float16;
# by 0 in float32. Means cancel out: of all positions up to 0.008 (limit 0.053), of a sequence's up to half its limit. Two
# more teachers, whose logits reach farther than those of trained ones, are beyond `single` in bfloat16 and told as damaged.
#
# Log-probabilities that move by up to e against each other move the running sum by up to tanh(e / 4) of the tail, and by far
# less as most of it cancels out. Measured on four teachers of 408 to 200,000 tokens, with all selections, in bfloat16 against
# float32: 0.001 in the median sequence, 0.003 in the worst, 0.11 in the worst draw. Of a small vocabulary's draws 15 to 30 %
# fall on another token, of 50,000 tokens' 70 %, of 200,000 tokens' 81 %. In float32, by batch and against float64: below
# 1e-8 in any sequence, 3e-7 in the worst draw, and up to 0.5 % on another token. Draws that have nothing to do with their
# points are off by a tenth of the tail and more where tokens are few, and by little where they are many; then all move.
FLOAT32 = Limits(0.01, 0.03, bias=0.003, spread=0.15, draws=0.001, draw=0.01, moved=0.05)
SHORT = Limits(0.25, 1.5, bias=0.03, spread=0.75, draws=0.02, draw=0.25, moved=0.95)


@dataclass(frozen=True)
class Differences:
    """How far one quantity is off, over all its values.

    Attributes:
        values: how many.
        steps: shares of the values that are the same step, one off, two off, and more.
        quantiles: of the difference (nats; of draws a share of the tail), at QUANTILES.
        typical: mean |difference| of a value in the median sequence, from how many steps they moved (nats).
        mean: |mean difference| over all positions, likewise (nats). noise: what noise can do to that.
    """

    values: int
    steps: tuple[float, float, float, float]
    quantiles: tuple[float, ...]
    typical: float = 0.0
    mean: float = 0.0
    noise: float = 0.0


@dataclass(frozen=True)
class Agreement:
    """How far a teacher agrees with a dump.

    Attributes:
        dump, sequences, positions: what was compared; positions with knowledge.
        verdict: one of AGREES, DAMAGE, OTHER_TEACHER, OTHER_TOKENIZER.
        reasons: what it rests on, one sentence each.
        notes: what else a person should know.
        limits: what counts as numeric noise here.
        differences: of `token`, `candidates`, `tail`, and where there are any `tail at T`, `selection`, `draws`.
        noise: the largest `typical` of any quantity (nats).
        draws_off: mean difference of a draw in the median sequence (share of the tail); None without draws.
        changed_top_1: share of the positions whose likeliest token is another one; None without candidates.
        moved_draws: share of the draws that now fall on another token; None without draws.
        sequences_off: how many have a value beyond `limits.single`, a mean beyond `limits.mean` or a draw beyond `limits.draw`,
            cannot be read, or have other tokens than they had.
    """

    dump: str
    sequences: int
    positions: int
    verdict: str
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    limits: Limits
    differences: dict[str, Differences] = field(default_factory=dict)
    noise: float = 0.0
    draws_off: float | None = None
    changed_top_1: float | None = None
    moved_draws: float | None = None
    sequences_off: int = 0


@dataclass(frozen=True)
class _Kept:
    """One sequence as it was kept: L tokens, N of them with knowledge, at `places`.

    Attributes:
        number: its sequence_id.
        token_ids: int64 (L,). places: int64 (N,).
        rows: the N rows of `positions`, sound in themselves.
    """

    number: int
    token_ids: np.ndarray
    places: np.ndarray
    rows: pa.Table


def check(
    store: str | Path,
    teacher: str | Teacher,
    *,
    dump: str | None = None,
    sample: int = 200,
    seed: int = 0,
    batch_size: int = 16,
    dtype: str = "auto",
    device: str = "auto",
    gguf_file: str | None = None,
) -> Agreement:
    """Ask a teacher again about sequences of a dump, drawn at random, and say how far it agrees with what was kept.

    Args:
        store: the store's folder.
        teacher: a local folder, a hub id, or a loaded teacher.
        dump: which dump; None when there is only one.
        sample: how many sequences; all of a smaller dump.
        seed: which ones.
        batch_size: a forward pass has room for this many sequences of the dump's maximum length.
        dtype, device, gguf_file: see `load_teacher`.

    Raises:
        InputError: something given cannot be used.
        StoreError, DamageError: there is no such store, or a manifest or commit record is altered.
    """
    for name, value in (("sample", sample), ("batch-size", batch_size)):
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    opened = KnowledgeStore.open(store, cache_size=0)
    manifest = opened.manifest(dump)
    if "positions" not in manifest.kinds:
        raise InputError(f"dump {manifest.dump!r} holds no knowledge of kind 'positions', and no other can be checked")
    count = opened.sequence_count(manifest.dump)
    if not count:
        raise InputError(f"dump {manifest.dump!r} of {store} has no committed sequence yet")
    asked = teacher if isinstance(teacher, Teacher) else load_teacher(teacher, gguf_file, dtype, device)
    limits = _limits(manifest, asked)
    same_weights, notes = _same_weights(manifest, asked)
    tokenizer = _other_tokenizer(opened, manifest, asked, notes)
    refusal = _other_model(manifest, asked)
    if refusal:
        verdict = OTHER_TOKENIZER if tokenizer else OTHER_TEACHER
        return Agreement(manifest.dump, 0, 0, verdict, (*tokenizer, refusal), tuple(notes), limits)

    ordinals = np.sort(np.random.default_rng(seed).choice(count, min(sample, count), replace=False))
    kept, unreadable = _read(opened, manifest, ordinals.tolist())
    found = _ask(manifest, asked, kept, batch_size)
    return _judge(manifest, kept, found, unreadable, tokenizer, same_weights, notes, limits, len(ordinals))


# --- what can be told without asking --------------------------------------------------------------------------------------


def _limits(manifest: Manifest, teacher: Teacher) -> Limits:
    dtypes = {manifest.teacher.get("dtype", "float32"), teacher.description["dtype"]}
    return FLOAT32 if dtypes <= {"float32", "float64"} else SHORT


def _weights(description: dict[str, Any]) -> list[str]:
    """Hashes of the files of weights, whatever their names."""
    files = description.get("files", {})
    return sorted(sha256 for name, sha256 in files.items() if name.endswith((".safetensors", ".gguf")))


def _same_weights(manifest: Manifest, teacher: Teacher) -> tuple[bool, list[str]]:
    same = bool(_weights(manifest.teacher)) and _weights(manifest.teacher) == _weights(teacher.description)
    notes = [] if same else ["the teacher's files of weights are not those that the manifest names"]
    kept, now = manifest.teacher.get("dtype"), teacher.description["dtype"]
    if kept != now:
        notes.append(f"the dump was made in {kept}, and the teacher is asked in {now} now")
    config = teacher.model.config.get_text_config()
    if _limits(manifest, teacher) is SHORT and any((getattr(config, name, None) or 0) > 1 for name in EXPERTS):
        notes.append(
            "a mixture of experts sends some tokens to other experts where rounding differs, which moves values by more than"
            f" any limit here: before believing in damage, ask as the dump did (--dtype {kept}, a device of the same kind)"
        )
    return same, notes


def _other_tokenizer(store: KnowledgeStore, manifest: Manifest, teacher: Teacher, notes: list[str]) -> list[str]:
    """Why the teacher's tokenizer is not the dump's, one sentence; none when it is, or only knows more."""
    kept = manifest.tokenizer.get("vocabulary_sha256")
    if kept is None or kept == describe_tokenizer(teacher.tokenizer)["vocabulary_sha256"]:
        return []
    theirs = store.tokens(manifest.dump)["token"].to_pylist()
    mine = {token: name for name, token in teacher.tokenizer.get_vocab().items()}
    others = [token for token, name in enumerate(theirs) if name is not None and mine.get(token) != name]
    if not others:
        notes.append("the teacher's tokenizer knows tokens that the dump's did not; all others are the same")
        return []
    token = others[0]
    return [
        f"{len(others):,} of the dump's {len(theirs):,} tokens are others in the teacher's tokenizer:"
        f" {token} was {theirs[token]!r} and is {mine.get(token)!r}"
    ]


def _other_model(manifest: Manifest, teacher: Teacher) -> str | None:
    """Why the teacher cannot even be asked."""
    if teacher.vocabulary_size != manifest.vocabulary_size:
        return (
            f"the dump's teacher has a vocabulary of {manifest.vocabulary_size:,} tokens,"
            f" and this one has {teacher.vocabulary_size:,}"
        )
    positions = teacher.description["max_positions"]
    if positions is not None and positions < manifest.plan["max_length"]:
        longest = manifest.plan["max_length"]
        return f"the dump has sequences of up to {longest:,} tokens, and this teacher knows {positions:,} positions"
    return None


# --- what was kept ----------------------------------------------------------------------------------------------------------


def _read(store: KnowledgeStore, manifest: Manifest, ordinals: list[int]) -> tuple[list[_Kept], list[str]]:
    """The sequences that can be read, and a sentence for each that cannot."""
    kept, unreadable = [], []
    for ordinal in ordinals:
        try:
            rows, stated = store.stored(ordinal, "positions", manifest.dump)
        except DamageError as error:
            unreadable.append(str(error))
            continue
        number, token_ids = rows["sequence_id"][0].as_py(), rows["token_id"].to_numpy().astype(np.int64)
        longest = manifest.plan["max_length"]
        if len(token_ids) > longest:  # a batch has room for so many, and may take all memory there is otherwise
            unreadable.append(f"sequence {number}: it has {len(token_ids):,} tokens, and the dump's longest have {longest:,}")
            continue
        complaint = next(damage(rows, manifest), None)
        if token_hash(token_ids) != stated:
            complaint = "its token ids do not match the hash that was kept of them"
        if complaint:
            unreadable.append(f"sequence {number}: {complaint}")
            continue
        known = rows["candidate_ids"].is_valid()
        kept.append(_Kept(number, token_ids, np.flatnonzero(known.to_numpy()), rows.filter(known)))
    return kept, unreadable


def _arrays(rows: pa.Table, draws: int) -> Arrays:
    """What was kept of N positions.

    Returns:
        token_id (N,), candidate_ids (N, K) (−1: none) and, float64, token_logprob (N,), candidate_logprobs (N, K) (−inf: none),
        tail_logprob (N,) (NaN in random sampling); where there are any tail_logsumexp (N,), drawn (N, draws): the token of each
        point, −1 where there is no tail. Ids are int64.
    """
    found = {
        "token_id": rows["token_id"].to_numpy().astype(np.int64),
        "candidate_ids": padded_lists(rows["candidate_ids"], -1, np.int64)[0],
        "candidate_logprobs": padded_lists(rows["candidate_logprobs"], -np.inf, np.float64)[0],
    }
    for name in ("token_logprob", "tail_logprob", "tail_logsumexp"):
        if name in rows.column_names:
            found[name] = rows[name].fill_null(np.nan).to_numpy().astype(np.float64)
    if draws:
        (ids, _), (counts, _) = (padded_lists(rows[name], 0, np.int64) for name in ("tail_ids", "tail_counts"))
        found["drawn"] = np.full((len(rows), draws), -1, np.int64)
        found["drawn"][counts.any(axis=1)] = np.repeat(ids.ravel(), counts.ravel()).reshape(-1, draws)
    return found


# --- what is said now -------------------------------------------------------------------------------------------------------


def _ask(manifest: Manifest, teacher: Teacher, kept: list[_Kept], batch_size: int) -> list[Arrays]:
    """For each sequence what `_compare` finds of its N positions."""
    lengths = [len(sequence.token_ids) for sequence in kept]
    found: list[Arrays] = [{} for _ in kept]
    with progress_bar("asking the teacher again", max(sum(lengths), 1), "positions") as advance:
        for indices in length_batches(lengths, batch_size * manifest.plan["max_length"]):
            sequences = [kept[index] for index in indices]
            try:
                answers = _ask_batch(manifest, teacher, sequences)
            except (RuntimeError, MemoryError) as error:
                # Where there is no device, torch has no class for it.
                if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
                    raise
                raise InputError(
                    f"the teacher ran out of memory on {len(sequences)} sequences of up to"
                    f" {max(lengths[index] for index in indices)} tokens: give a smaller --batch-size (now {batch_size})"
                ) from None
            for index, answer in zip(indices, answers, strict=True):
                found[index] = answer
            advance(sum(lengths[index] for index in indices))
    return found


def _ask_batch(manifest: Manifest, teacher: Teacher, sequences: list[_Kept]) -> list[Arrays]:
    lengths = [len(sequence.token_ids) for sequence in sequences]
    token_ids = np.zeros((len(sequences), max(lengths)), np.int64)
    for row, sequence in enumerate(sequences):
        token_ids[row, : lengths[row]] = sequence.token_ids
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    counts = [len(sequence.places) for sequence in sequences]
    rows = np.repeat(np.arange(len(sequences)), counts)
    places = np.concatenate([sequence.places for sequence in sequences])
    rule = positions_of(manifest).selection
    kept = _arrays(pa.concat_tables([sequence.rows for sequence in sequences]), rule.draws)
    if rule.draws:
        points = systematic_points if rule.candidates else independent_points
        drawn_at = [points(each.number, len(each.token_ids), rule.draws)[each.places] for each in sequences]
        kept["points"] = np.sort(np.concatenate(drawn_at), axis=1)
    prediction = teacher.predict(token_ids, mask)
    at, before = (torch.from_numpy(each).to(teacher.device) for each in (rows, places - 1))
    parts = [
        _compare(precise(logits), {name: values[part] for name, values in kept.items()}, manifest)
        for part, logits in prediction.logit_slices(at, before)
    ]
    together = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
    ends = np.cumsum(counts)
    return [
        {name: values[end - size : end] for name, values in together.items()} for end, size in zip(ends, counts, strict=True)
    ]


def _compare(logits: Tensor, kept: Arrays, manifest: Manifest) -> Arrays:
    """Hold kept values against logits, float64 (n, V).

    Args:
        kept: what `_arrays` gives of n positions, and `points` (n, draws) where there are draws.

    Returns:
        for each quantity, "NAME off" (nats, or for draws a share of the tail; NaN where there is no value) and, of rounded
        ones, "NAME moved" (from step to step, up or down, in nats), (n,) or (n, K) each; "changed" (n,), 1 or 0.
    """
    if not logits.isfinite().all():
        raise InputError("the teacher's logits are NaN or infinite: check its weights, or ask it with --dtype float32")
    parameters = positions_of(manifest)
    step, rule, temperature = parameters.quantisation_step, parameters.selection, parameters.temperature

    def on_device(name: str) -> Tensor:
        return torch.from_numpy(kept[name]).to(logits.device)

    found: dict[str, Tensor] = {}
    outside = logprobs = torch.log_softmax(logits, dim=1)
    said = {"token_logprob": logprobs.gather(1, on_device("token_id")[:, None])[:, 0]}
    if rule.candidates:
        ids = on_device("candidate_ids")
        there = ids >= 0
        ids = torch.where(there, ids, ids[:, :1])
        mine = logprobs.gather(1, ids)
        outside = logprobs.scatter(1, ids, -torch.inf)
        said["candidate_logprobs"] = mine.masked_fill(~there, -torch.inf)
        said["tail_logprob"] = torch.logsumexp(outside, dim=1)
        best, last = outside.amax(dim=1), mine.amin(dim=1)
        # Both may be off, in opposite directions.
        found["selection off"] = ((best - last) / 2).clamp(min=0)
        if rule.name == "top-p":
            total = torch.exp(said["candidate_logprobs"]).sum(dim=1)
            full = there.sum(dim=1) >= min(rule.candidates, logits.shape[1])
            too_few = torch.where(full, 0.0, rule.p - total)
            found["selection off"] = found["selection off"].maximum(too_few).maximum(total - torch.exp(last) - rule.p)
        found["changed"] = (logprobs.argmax(dim=1) != ids[:, 0]).double()
    if temperature:
        said["tail_logsumexp"] = torch.logsumexp(outside / temperature, dim=1)
    if rule.draws:
        drawn, points = on_device("drawn"), on_device("points")
        weights = torch.softmax(outside, dim=1)
        end = weights.cumsum(dim=1).gather(1, drawn.clamp(min=0))
        begin = end - weights.gather(1, drawn.clamp(min=0))
        beside = torch.maximum(begin - points, points - end).clamp(min=0)
        found["draws off"] = torch.where(drawn >= 0, beside, torch.nan)

    compared = {}
    now = exact_steps({**kept, **{name: values.cpu().numpy() for name, values in said.items()}}, manifest)
    for column, was in exact_steps(kept, manifest).items():
        name = f"tail at T={temperature:g}" if column == "tail_logsumexp" else ROUNDED[column]
        with np.errstate(invalid="ignore"):  # a tail that is empty, then and now
            apart, moved = np.abs(was - now[column]), np.round(was) - np.round(now[column])
        same = was == now[column]
        compared[f"{name} off"] = np.where(same, 0, np.maximum(apart - 0.5, 0) * step)
        compared[f"{name} moved"] = np.where(same, 0, moved) * step
    return {**compared, **{name: values.cpu().numpy() for name, values in found.items()}}


# --- what follows -----------------------------------------------------------------------------------------------------------


def _values(found: list[Arrays], ending: str) -> np.ndarray:
    """All values there are of the quantities whose name ends like this, one after the other."""
    values = [each.ravel() for arrays in found for name, each in arrays.items() if name.endswith(ending)]
    joined = np.concatenate([np.zeros(0), *values])
    return joined[~np.isnan(joined)]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _means(found: Arrays, name: str) -> np.ndarray:
    """Of one sequence, how far a quantity moved at each position that has it: the mean of its values there, in nats, (n,).

    One that is far off does not speak for all: none counts for more than MAX_COUNTED.
    """
    moved = found[f"{name} moved"]
    moved = moved if moved.ndim == 2 else moved[:, None]
    there = ~np.isnan(moved)
    sums = np.where(there, moved.clip(-MAX_COUNTED, MAX_COUNTED), 0).sum(axis=1)
    return sums[there.any(axis=1)] / there.sum(axis=1)[there.any(axis=1)]


def _differences(found: list[Arrays], step: float, limits: Limits) -> dict[str, Differences]:
    names = [name.removesuffix(" off") for name in (found[0] if found else ()) if name.endswith(" off")]
    differences = {}
    for name in names:
        off, moved = (_values(found, f"{name} {ending}") for ending in ("off", "moved"))
        if not len(off):
            continue
        steps = np.abs(moved) / step
        same, one, two, more = (
            _mean(each) or 0.0 for each in (steps < 0.5, abs(steps - 1) < 0.5, abs(steps - 2) < 0.5, steps > 2.5)
        )
        quantiles = tuple(float(each) for each in np.quantile(off, QUANTILES, method="higher"))
        typical = mean = noise = 0.0
        if len(moved):
            by_sequence = [np.abs(each) for each in (_values([arrays], f"{name} moved") for arrays in found) if len(each)]
            typical = _median(each.mean() for each in by_sequence) or 0.0
            means = np.concatenate([_means(arrays, name) for arrays in found])
            mean, noise = abs(float(means.mean())), limits.mean(len(means))
        differences[name] = Differences(len(off), (same, one, two, more), quantiles, typical, mean, noise)
    return differences


def _farthest(sequence: _Kept, found: Arrays, limits: Limits) -> tuple[float, str]:
    """The largest difference of a sequence, in multiples of what noise can do to it, and a sentence about it."""
    most, words = 0.0, ""
    for name, values in found.items():
        if not name.endswith(" off") or not values.size:
            continue
        flat = np.where(np.isnan(values), 0, values).reshape(len(values), -1).max(axis=1, initial=0)
        at = int(flat.argmax())
        limit, unit = (limits.draw, "of the tail") if name == "draws off" else (limits.single, "nats")
        if flat[at] / limit > most:
            most = float(flat[at]) / limit
            words = f"sequence {sequence.number}, position {sequence.places[at]}: {name} by {flat[at]:.3g} {unit}"
    for name, mean, limit, positions in _biases(found, limits):
        if most <= 1 and mean > limit:  # one value that is off says where
            most = mean / limit
            words = (
                f"sequence {sequence.number}: {name} off one way, by {mean:.3g} nats on average over {positions} positions"
                f" (noise: up to {limit:.2g})"
            )
    return most, words


def _biases(found: Arrays, limits: Limits) -> Iterator[tuple[str, float, float, int]]:
    """Of each rounded quantity of a sequence: name, |mean difference|, what noise can do to that, over how many positions."""
    for name in (each.removesuffix(" moved") for each in found if each.endswith(" moved")):
        means = _means(found, name)
        if len(means):
            yield name, abs(float(means.mean())), limits.mean(len(means)), len(means)


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.median(found)) if found else None


def _value_is_off(found: Arrays, limits: Limits) -> bool:
    """Whether any value of a sequence, or a mean of them, is off by more than noise can do to it, draws left out."""
    names = (name for name in found if name.endswith(" off") and name != "draws off")
    return any((found[name] > limits.single).any() for name in names) or any(
        mean > limit for _, mean, limit, _ in _biases(found, limits)
    )


def _judge(
    manifest: Manifest,
    kept: list[_Kept],
    found: list[Arrays],
    unreadable: list[str],
    tokenizer: list[str],
    same_weights: bool,
    notes: list[str],
    limits: Limits,
    sample: int,
) -> Agreement:
    draws = [each for each in (_values([arrays], "draws off") for arrays in found) if len(each)]
    draws_off, moved = _median(each.mean() for each in draws), _median((each > 0).mean() for each in draws)
    farthest = [_farthest(sequence, each, limits) for sequence, each in zip(kept, found, strict=True)]
    off = sorted((each for each in farthest if each[0] > 1), key=lambda each: -each[0])
    # Damage that shows by itself says nothing of the teacher, and draws nothing that values do not say better.
    values_are_off = [_value_is_off(each, limits) for each in found]
    sound = [each for each, is_off in zip(found, values_are_off, strict=True) if each and not is_off]
    values_off = sum(values_are_off)
    step = positions_of(manifest).quantisation_step
    differences = _differences([each for each in found if each], step, limits)
    noise, noisiest = max(((each.typical, name) for name, each in differences.items()), default=(0.0, "values"))
    biased = [
        f"{name} off one way, by {each.mean:.3g} nats on average over {len(sound)} sequences that show nothing each by itself"
        f" (noise: up to {each.noise:.2g})"
        for name, each in _differences(sound, step, limits).items()
        if each.mean > each.noise
    ]
    seen = [*unreadable, *(words for _, words in off)]
    listed = [*seen[:SHOWN], *([f"and {len(seen) - SHOWN} more sequences"] if len(seen) > SHOWN else [])]
    everywhere = noise > limits.typical or values_off > SHARE_OFF * len(kept) or bool(biased)
    draws_everywhere = (draws_off or 0.0) > limits.draws or (moved or 0.0) > limits.moved
    typically = f"the median sequence is off by {noise:.3g} nats a value ({noisiest}; noise: up to {limits.typical})"
    drawn = "" if moved is None else f"its draws by {draws_off:.2g} of the tail, and {moved:.1%} of them fall on another token"
    if tokenizer:
        verdict, reasons = OTHER_TOKENIZER, tokenizer
    elif everywhere and not same_weights:
        verdict, reasons = (
            OTHER_TEACHER,
            [
                f"{typically}, and {values_off} of {len(kept)} have a value off by more than {limits.single}, or all one way",
                *biased,
                *unreadable[:SHOWN],
            ],
        )
    elif everywhere or draws_everywhere or seen:
        verdict, reasons = DAMAGE, listed or [typically]
        if draws_everywhere:
            reasons = [f"draws are off in most sequences: in the median one {drawn}", *listed]
            if not same_weights:
                notes = [*notes, "draws may also tell of a teacher so near to the dump's that values do not tell the two apart"]
        if everywhere:
            reasons = [
                "the teacher's weights are those that the manifest names, and its answers are others all the same: values were"
                " altered, or this machine computes wrongly",
                *biased,
                *reasons,
            ]
    else:
        verdict, reasons = AGREES, [f"{typically}, no value by {limits.single}, and none are off one way"]
        if drawn:
            reasons.append(f"in the median sequence {drawn}; no draw is off by {limits.draw}")
        if not same_weights and limits is SHORT:
            notes = [*notes, "a teacher that differs by less than a short dtype's noise passes too: --dtype float32 tells more"]
    return Agreement(
        dump=manifest.dump,
        sequences=sample,
        positions=sum(len(sequence.places) for sequence in kept),
        verdict=verdict,
        reasons=tuple(reasons),
        notes=tuple(notes),
        limits=limits,
        differences=differences,
        noise=noise,
        draws_off=draws_off,
        changed_top_1=_mean(_values(found, "changed")),
        moved_draws=_mean(_values(found, "draws off") > 0),
        sequences_off=len(seen),
    )


def describe(agreement: Agreement) -> list[str]:
    """What a person is told: the distribution of differences, rates, and the verdict with what it rests on."""
    lines = [f"{agreement.dump}: {agreement.sequences} sequences asked again, {agreement.positions:,} positions with knowledge"]
    if agreement.differences:
        heads = "".join(f"{name:>9}" for name in ("median", "90 %", "99 %", "99.9 %", "most", "|mean|", "noise"))
        lines.append(f"{'beyond rounding':<16}{'values':>10}{'same step':>11}{'1 off':>8}{'2 off':>8}{'more':>8}{heads}")
    for name, each in agreement.differences.items():
        # Draws and the order of candidates are not rounded.
        steps = [f"{share:.2%}" for share in each.steps] if sum(each.steps) else ["–"] * 4
        means = [f"{value:.2g}" for value in (each.mean, each.noise)] if sum(each.steps) else ["–"] * 2
        quantiles = "".join(f"{value:>9.2g}" for value in each.quantiles) + "".join(f"{mean:>9}" for mean in means)
        lines.append(f"{name:<16}{each.values:>10,}{steps[0]:>11}{steps[1]:>8}{steps[2]:>8}{steps[3]:>8}{quantiles}")
    if agreement.differences:
        lines.append(
            "In nats, less the half step that rounding explains; draws as a share of the tail. |mean|: how far values moved one"
            " way on average; beside it, what noise can do to that."
        )
        lines.append(
            "What is rounded since format version 3: how far candidates are below the first, the tail's log-odds, and the"
            " log-probability of a token that is no candidate; before, every log-probability."
        )
    if agreement.changed_top_1 is not None:
        lines.append(f"likeliest token changed: {agreement.changed_top_1:.3%} of positions")
    if agreement.moved_draws is not None:
        lines.append(f"draws that fall on another token: {agreement.moved_draws:.3%}")
    limits = agreement.limits
    dtype = "float32" if limits is FLOAT32 else "a dtype of 16 bits"
    lines.append(
        f"Noise ({dtype}), of each quantity: the median sequence off by up to {limits.typical} nats a value on average, and"
        f" no value by more than {limits.single}. Noise goes up and down alike, so that the mean of n positions, of a sequence"
        f" or of all, moves by up to {limits.bias} + {limits.spread}/√n. Damage: some sequences beyond that."
        f" Another teacher: more than {SHARE_OFF:.0%} of them, or all together (damage if its weights are the dump's own)."
    )
    if agreement.moved_draws is not None:
        lines.append(
            f"Noise in draws: those of a sequence off by up to {limits.draws} of the tail on average, no draw by more than"
            f" {limits.draw}, and up to {limits.moved:.0%} on another token. Damage: some draws beyond that, or most sequences'"
            " where values agree."
        )
    lines.append(f"Verdict: {agreement.verdict}")
    lines += [f"  {reason}" for reason in agreement.reasons]
    return lines
