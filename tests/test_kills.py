"""A dump that is killed at any call loses nothing that was acknowledged (`make torture` tries every call)."""

from __future__ import annotations

import math

from conftest import skip_for
from torture import kills


def test_killed_at_calls_of_chance(memory_folder):
    skip_for(kills.unavailable(memory_folder))
    counts = kills.run(seed=1, minutes=math.inf, folder=memory_folder, trials=6)
    assert counts["kills"] > 0
    assert counts["twins"] > 0
    assert counts["repairs_killed"] > 0
    assert counts["survived"] == counts["faults"] == 6
    assert counts["silent"] == 0
