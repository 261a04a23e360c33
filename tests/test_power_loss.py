"""What was acknowledged outlives a power cut (`make torture` cuts at every flush)."""

from __future__ import annotations

import math

from conftest import skip_for
from torture import power_loss


def test_power_cuts_at_flushes_of_chance(tmp_path):
    skip_for(power_loss.unavailable(tmp_path))
    counts = power_loss.run(seed=1, minutes=math.inf, folder=tmp_path, cuts=2)
    assert counts["killed_before"] > 0
    assert counts["repairs_cut"] > 0
    assert counts["survived"] == counts["faults"] > 5
    assert counts["silent"] == 0
