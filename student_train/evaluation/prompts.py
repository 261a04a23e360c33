"""The forward passes in which a model is asked multiple-choice questions: what it says of each option after its question.

Options of one token need what the model says after the question, and no more. Longer ones are tokens to read as well. Where a
question has two of those or more, it is read once, and each option goes on from what the model keeps of it (the cache of keys
and values). Questions of one length are read together, so that nothing stands between a question and its options that is
neither. Not every model goes on rightly from such a cache: some keep none, or can only add one token to it. So each is tried
first, on the longest and the shortest question, against the plain way, which reads a question anew with each of its options.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from knowledge_store.reporter import Reporter
from student_train.evaluation.questions import TokenisedQuestion
from student_train.losses.head import head_at

TOLERANCE = 1e-4  # nats, of an option's log-likelihood


@dataclass(frozen=True)
class Reading:
    """What the model said in one batch.

    Attributes:
        logits: (P, V) float32.
        firsts: by the index of a question, the row of `logits` that predicts its options' first token. Each question is in
            the `firsts` of one batch.
        options: by the indices of a question and of its option, the rows that predict the option's tokens, in order.
    """

    logits: Tensor
    firsts: dict[int, int]
    options: dict[tuple[int, int], list[int]]

    @cached_property
    def totals(self) -> Tensor:
        """Log Σ exp of the logits, (P,) float32."""
        return torch.logsumexp(self.logits, dim=-1)

    def likelihoods(self, questions: Sequence[TokenisedQuestion]) -> dict[tuple[int, int], float]:
        """The log-likelihood of each option, in nats."""
        found = {}
        for (question, option), rows in self.options.items():
            tokens = list(questions[question].completions[option])
            found[question, option] = (self.logits[rows, tokens] - self.totals[rows]).cpu().double().sum().item()
        return found


def readings(
    model: PreTrainedModel, questions: Sequence[TokenisedQuestion], batch_size: int, reporter: Reporter
) -> Iterator[Reading]:
    """All that is to be known of all options, batch after batch, the longest questions first.

    Args:
        model: in evaluation mode; what is asked of it runs in the caller's mode of gradients.
        questions: at least one.
        batch_size: options of more than one token in a forward pass, questions without any counting as one. All options of a
            question stay together where the question is read once.
        reporter: hears when a model cannot read questions once that would be.
    """
    longer = [sum(len(tokens) > 1 for tokens in question.completions) for question in questions]
    order = sorted(range(len(questions)), key=lambda index: -len(questions[index].context))
    once = [index for index in order if longer[index] > 1]
    if once and not _goes_on(model, questions, sorted({once[0], once[-1]})):
        reporter.note("This model cannot go on from a question that it has read: it reads each anew with every option.")
        once = []
    for _, alike in groupby(once, key=lambda index: len(questions[index].context)):
        batch: list[int] = []
        for index in alike:
            if batch and sum(longer[each] for each in (*batch, index)) > batch_size:
                yield _read_once(model, questions, batch)
                batch = []
            batch.append(index)
        yield _read_once(model, questions, batch)
    apart = set(order) - set(once)
    prompts = sorted(_prompts(questions, apart), key=lambda prompt: -len(prompt.tokens))
    for start in range(0, len(prompts), batch_size):
        yield _read_anew(model, prompts[start : start + batch_size])


def _goes_on(model: PreTrainedModel, questions: Sequence[TokenisedQuestion], tried: Sequence[int]) -> bool:
    """Whether the model says the same of options, to TOLERANCE, both ways."""
    plain = _read_anew(model, _prompts(questions, tried)).likelihoods(questions)
    for index in tried:
        try:
            found = _read_once(model, questions, [index]).likelihoods(questions)
        except Exception:  # it keeps no cache, or one that cannot be given to several options, or takes no part of a text
            return False
        if not all(abs(found[option] - plain[option]) <= TOLERANCE for option in found):
            return False
    return True


def _read_once(model: PreTrainedModel, questions: Sequence[TokenisedQuestion], chosen: Sequence[int]) -> Reading:
    """Questions whose contexts are of one length, and then all their options."""
    device = next(model.parameters()).device
    contexts = torch.tensor([questions[index].context for index in chosen], device=device)
    ends = torch.full((len(chosen),), contexts.shape[1] - 1, device=device)
    with head_at(model, torch.arange(len(chosen), device=device), ends, contexts.shape[1]):
        outputs = model(input_ids=contexts, attention_mask=torch.ones_like(contexts), use_cache=True)
    options: dict[tuple[int, int], list[int]] = {}
    parts: list[tuple[int, ...]] = []
    owners: list[int] = []
    size = len(chosen)
    for place, index in enumerate(chosen):
        for option, tokens in enumerate(questions[index].completions):
            options[index, option] = [place, *range(size, size + len(tokens) - 1)]
            size += len(tokens) - 1
            if len(tokens) > 1:
                parts.append(tokens[:-1])
                owners.append(place)
    cache = outputs.past_key_values
    cache.batch_select_indices(torch.tensor(owners, device=device))
    read, mask = _padded(parts, device)
    rows, columns = mask.nonzero(as_tuple=True)
    attended = torch.cat([mask.new_ones(len(parts), contexts.shape[1]), mask], dim=1)
    with head_at(model, rows, columns, read.shape[1]):
        continued = model(input_ids=read, attention_mask=attended, past_key_values=cache, use_cache=True)
    logits = torch.cat([outputs.logits[0].float(), continued.logits[0].float()])
    return Reading(logits, {index: place for place, index in enumerate(chosen)}, options)


@dataclass(frozen=True)
class _Prompt:
    """A row of a forward pass: the tokens up to `start`, which ends a question's context, and an option's but its last.

    A question's first row serves its options of one token too: they need the context alone.
    """

    question: int
    options: dict[int, int]  # how many tokens each has
    tokens: tuple[int, ...]
    start: int
    is_first: bool


def _prompts(questions: Sequence[TokenisedQuestion], chosen: Iterable[int]) -> list[_Prompt]:
    prompts = []
    for index in chosen:
        context, completions = questions[index].context, questions[index].completions
        single = {option: 1 for option, tokens in enumerate(completions) if len(tokens) == 1}
        longer = [option for option, tokens in enumerate(completions) if len(tokens) > 1]
        for row, option in enumerate(longer):
            served = {option: len(completions[option]), **({} if row else single)}
            prompts.append(_Prompt(index, served, (*context, *completions[option][:-1]), len(context), is_first=not row))
        if not longer:
            prompts.append(_Prompt(index, single, context, len(context), is_first=True))
    return prompts


def _read_anew(model: PreTrainedModel, batch: Sequence[_Prompt]) -> Reading:
    """Prompts of any length."""
    device = next(model.parameters()).device
    tokens, mask = _padded([prompt.tokens for prompt in batch], device)
    rows: list[int] = []
    columns: list[int] = []
    firsts: dict[int, int] = {}
    options: dict[tuple[int, int], list[int]] = {}
    for row, prompt in enumerate(batch):
        place = len(rows)
        columns += range(prompt.start - 1, len(prompt.tokens))
        rows += [row] * (len(prompt.tokens) - prompt.start + 1)
        if prompt.is_first:
            firsts[prompt.question] = place
        for option, size in prompt.options.items():
            options[prompt.question, option] = list(range(place, place + size))
    with head_at(model, torch.tensor(rows, device=device), torch.tensor(columns, device=device), tokens.shape[1]):
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits[0]
    return Reading(logits.float(), firsts, options)


def _padded(rows: Sequence[tuple[int, ...]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (N, L), padded on the right."""
    length = max(map(len, rows))
    tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return tokens.to(device), mask.to(device)
