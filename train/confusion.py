"""A picture of which labels are taken for which."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

MOST = 60
"""Labels in a picture; of more nobody could read the names."""
NUMBERED = 20
"""Labels up to which each cell has its number."""


def picture(home: Path, labels: Sequence[str], counts: Sequence[Sequence[int]]) -> None:
    """confusion.png: right labels in rows, given ones in columns, shaded by the share of the row; none of more labels than
    MOST."""
    if len(labels) > MOST:
        return
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    n, table = len(labels), np.asarray(counts)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.35 * n
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), labels, rotation=90)
    axes.set_yticks(range(n), labels)
    axes.set(xlabel="given", ylabel="right", title=home.name)
    for row, column in np.ndindex(n, n) if n <= NUMBERED else ():
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(table[row, column]), ha="center", va="center", color=shade, fontsize=8)
    with (home / "confusion.png").open("wb") as out:
        figure.savefig(out, dpi=120, format="png")
    plt.close(figure)
