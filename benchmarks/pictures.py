"""Pictures of figures, as SVG files that are the same whenever they are drawn from the same figures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Draw a file, which is written when the block ends.

    Args:
        path: of the file; what it is called decides the names within it.
        rows: of panels.
        columns: of panels.
        options: for `matplotlib.pyplot.subplots`.

    Yields:
        the panel, or an array of them, as `subplots` gives them.
    """
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style = {"svg.hashsalt": path.stem, "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure, panels = plt.subplots(rows, columns, **{"layout": "constrained", **options})
        yield panels
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
