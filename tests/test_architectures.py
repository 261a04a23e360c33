"""Tiny models of many architectures: in the batches that a dump makes each is told what it is told alone, or it is refused.

`python -m benchmarks.architectures` tries all that transformers has; here are those that differ most from each other.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.architectures import VARIANTS, cases, outcome

# By the rule of their batches: attention of all sorts of positions (rotary, learnt, ALiBi), windows, experts, recurrence.
EQUAL = {
    "any": [
        "llama",
        "gpt2",
        "opt",
        "bloom",
        "mpt",
        "gptj",
        "gpt_neo",
        "gpt_oss",
        "gemma2",
        "gemma3_text",
        "mixtral",
        "qwen3_next",
        "rwkv",
        "mamba",
        "recurrent_gemma",
        "falcon_h1",
        "phi3",
    ],
    "sides": ["phi3 with LongRoPE"],
    "alone": ["glm_moe_dsa"],
}
REFUSED = {
    "bert": "bert looks ahead",
    "gemma3_text, bidirectional": "gemma3_text looks ahead",
    "llama with dynamic RoPE": "answers otherwise after another text than before it",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of models so small mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for rule, names in EQUAL.items() for name in names])
def test_a_batch_changes_nothing(tmp_path, name, rule):
    found = outcome(*cases()[name], tmp_path / "tiny")
    assert found["outcome"] == "equal" and found["batches"] == rule, found


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_teacher_is_refused(tmp_path, name):
    found = outcome(*cases()[name], tmp_path / "tiny")
    assert found["outcome"] == "refused" and REFUSED[name] in found["why"], found


def test_every_variant_is_of_an_architecture_that_there_is():
    assert {architecture for architecture, _ in VARIANTS.values()} <= cases().keys()
