"""The teacher's targets at a calibration's temperature, while a student learns. `student_train.calibration` fits one."""

from __future__ import annotations

import math

import torch

from knowledge_store.calibration.file import Calibration
from student_train.losses.targets import Targets


def recalibrated(targets: Targets, calibration: Calibration) -> Targets:
    """Targets with the teacher's distribution at the calibration's temperature T in place of the one at 1.

    * method `temperature`: softmax of [candidates / T, `tail_logsumexp`], which is exactly softmax(z / T) of the teacher's
      own logits z, apart from the rounding of what is stored: log p = z − log Z, and Z drops out.
    * method `bucket-temperature`: softmax of [candidates / T, tail / T]; a token in the tail keeps its share of it.

    Draws from the tail work at temperature 1 only and are dropped: the tail is a bucket.

    Args:
        targets: of N positions, at temperature 1, with `tail_logsumexp` at T for the method `temperature`.
        calibration: of a method with a temperature.

    Raises:
        ValueError: there is no `tail_logsumexp`, or the method has no temperature.
    """
    if calibration.method == "first":
        raise ValueError("a calibration of method first is for the loss first, as its c")
    temperature, is_whole = calibration.temperature, calibration.method == "temperature"
    if is_whole and targets.tail_logsumexp is None:
        raise ValueError("these targets keep no tail at another temperature")
    tail = targets.tail_logsumexp if is_whole and targets.tail_logsumexp is not None else targets.tail_logprob / temperature
    scaled = torch.cat([targets.candidate_logprobs / temperature, tail.unsqueeze(-1)], dim=-1)
    logprobs = torch.log_softmax(scaled, dim=-1)
    candidates, tail_logprob = logprobs[:, :-1], logprobs[:, -1]
    is_token = (targets.candidate_ids == targets.token_ids.unsqueeze(-1)) & (targets.candidate_logprobs > -math.inf)
    if is_whole:
        total = torch.logsumexp(scaled, dim=-1)
        outside = torch.minimum(targets.token_logprob / temperature - total, tail_logprob)
    else:
        share = (targets.token_logprob - targets.tail_logprob).clamp(max=0)  # rounding may put it a hair above
        outside = share + tail_logprob
    inside = torch.where(is_token, candidates, -math.inf).amax(dim=-1) if candidates.shape[-1] else outside
    return targets._replace(
        token_logprob=torch.where(is_token.any(dim=-1), inside, outside),
        candidate_logprobs=candidates,
        tail_logprob=tail_logprob,
        draw_ids=None,
        draw_weights=None,
        tail_logsumexp=None,
        tail_mean_logprob=None,
    )
