"""Options declared once: the limits of a configuration's fields, and what is said of a value outside them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from knowledge_store.errors import InputError
from knowledge_store.options import check_options, option


@dataclass(frozen=True)
class Settings:
    share: float = option(0.5, min=0, below=1, help="A share.")
    scale: float | None = option(None, above=0, max=1000, help="A scale.")
    batch_size: int = option(8, min=1, flag="--batch", help="A size.")
    tail: str = option("auto", choices=("auto", "draws", "bucket"), help="A choice.")
    exact: bool = option(True, min=2, help="A switch, which has no size.")
    internal: int = -1


@pytest.mark.parametrize("changes", [{}, {"share": 0}, {"scale": 1000}, {"batch_size": 1}, {"tail": "bucket"}, {"internal": 7}])
def test_values_within_the_limits(changes):
    check_options(replace(Settings(), **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": 1.0}, "--share is 1.0; it must be at least 0 and below 1"),
        ({"share": -0.1}, "--share is -0.1; it must be at least 0 and below 1"),
        ({"share": float("nan")}, "--share is nan; it must be at least 0 and below 1"),
        ({"scale": 0.0}, "--scale is 0.0; it must be above 0 and at most 1,000"),
        ({"scale": float("inf")}, "--scale is inf; it must be above 0 and at most 1,000"),
        ({"batch_size": 0}, "--batch is 0; it must be at least 1"),
        ({"tail": "head"}, "--tail is 'head'; it must be auto, draws or bucket"),
    ],
)
def test_values_outside_the_limits_are_refused_by_name(changes, message):
    with pytest.raises(InputError) as caught:
        check_options(replace(Settings(), **changes))
    assert str(caught.value) == message
