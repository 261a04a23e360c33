"""What numeric noise can do to a teacher's answers: what is beyond it is damage, or another teacher."""

from __future__ import annotations

from dataclasses import dataclass

from knowledge_store.format.manifest import Manifest
from teacher_dump.teachers.protocol import Teacher

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
# more teachers, whose logits reach farther than those of trained ones, are beyond `single` in bfloat16 and called damaged.
#
# Log-probabilities that move by up to e against each other move the running sum by up to tanh(e / 4) of the tail, and by far
# less as most of it cancels out. Measured on four teachers of 408 to 200,000 tokens, with all selections, in bfloat16 against
# float32: 0.001 in the median sequence, 0.003 in the worst, 0.11 in the worst draw. Of a small vocabulary's draws 15 to 30 %
# fall on another token, of 50,000 tokens' 70 %, of 200,000 tokens' 81 %. In float32, by batch and against float64: below
# 1e-8 in any sequence, 3e-7 in the worst draw, and up to 0.5 % on another token. Draws that have nothing to do with their
# points are off by a tenth of the tail and more where tokens are few, and by little where they are many; then all move.
FLOAT32 = Limits(0.01, 0.03, bias=0.003, spread=0.15, draws=0.001, draw=0.01, moved=0.05)
SHORT = Limits(0.25, 1.5, bias=0.03, spread=0.75, draws=0.02, draw=0.25, moved=0.95)


def limits_of(manifest: Manifest, teacher: Teacher) -> Limits:
    """The limits for a dump and the teacher that is asked again: those of the coarser of the two dtypes. What runs on a server
    may have any."""
    dtypes = {manifest.teacher.get("dtype"), teacher.description.get("dtype")}
    return FLOAT32 if dtypes <= {"float32", "float64"} else SHORT
