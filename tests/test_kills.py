"""A dump that is killed at any call loses nothing that was acknowledged (`make torture` tries every call)."""

from __future__ import annotations

import math

from conftest import skip_for
from torture import kills


def test_killed_at_calls_of_chance(tmp_path):
    skip_for(kills.unavailable(tmp_path))
    counts = kills.run(seed=1, minutes=math.inf, folder=tmp_path, trials=6)
    assert counts["kills"] > 0
    assert counts["twins"] > 0
    assert counts["repairs_killed"] > 0
    assert counts["survived"] == counts["faults"] == 6
    assert counts["silent"] == 0
