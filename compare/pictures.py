"""Small pictures for the report: inline SVG that takes its ink from the page, so that it is readable in light and dark."""

import io
import re
from collections.abc import Sequence

from bothways.compare.stats import Estimate

INK = "#010203"
"""Replaced by the page's own colour."""
COLOURS = ("#3b7dd8", "#e07b39", "#2a9d6f", "#b0579f", "#8a8f2a", "#888888", "#c0392b")
Series = dict[str, list[tuple[float, Estimate]]]


def _drawn(draw) -> str:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    look = dict.fromkeys(names, INK) | {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11}
    look |= {"axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "svg.hashsalt": "bothways"}
    with matplotlib.rc_context(look):
        figure, axes = plt.subplots(figsize=(5.6, 3.9), layout="constrained")
        draw(axes)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([^;\"]*?)(px|pt) [^;\"]*", r"font: \1\2 system-ui, sans-serif", svg)
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)


def curves(series: Series, x: str, y: str, *, log_x: bool = False, at: Sequence[float] = (), **known: float) -> str:
    """Lines with their intervals over a number; `known` are dashed lines at a value that theory or a baseline gives."""

    def draw(axes) -> None:
        for colour, (name, points) in zip(COLOURS * 2, series.items(), strict=False):
            points = sorted(points, key=lambda p: p[0])
            xs, es = [p[0] for p in points], [p[1] for p in points]
            spread = [[max(0, e.value - e.low) for e in es], [max(0, e.high - e.value) for e in es]]
            style = "--" if all(e.low == e.high for e in es) else "-"
            axes.errorbar(
                xs, [e.value for e in es], spread, label=name, color=colour, marker="o", ms=4, capsize=3, ls=style
            )
        for name, value in known.items():
            axes.axhline(value, ls="--", lw=1, color=INK, alpha=0.6, label=name.replace("_", " "))
        if log_x:
            axes.set_xscale("log", base=2)
        if at:
            axes.set_xticks(list(at), [f"{v:g}" for v in at])
            axes.minorticks_off()
        axes.set(xlabel=x, ylabel=y)
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    return _drawn(draw)


def bars(groups: dict[str, dict[str, Estimate]], y: str, **known: float) -> str:
    """Shares with their intervals side by side: group -> name -> estimate."""

    def draw(axes) -> None:
        names = list(dict.fromkeys(n for g in groups.values() for n in g))
        for j, name in enumerate(names):
            xs = [i + (j - (len(names) - 1) / 2) * 0.8 / len(names) for i, g in enumerate(groups.values()) if name in g]
            es = [g[name] for g in groups.values() if name in g]
            spread = [[max(0, e.value - e.low) for e in es], [max(0, e.high - e.value) for e in es]]
            axes.errorbar(xs, [e.value for e in es], spread, fmt="o", ms=5, capsize=4, color=(COLOURS * 2)[j], label=name)
        for name, value in known.items():
            axes.axhline(value, ls="--", lw=1, color=INK, alpha=0.6, label=name.replace("_", " "))
        axes.set_xticks(range(len(groups)), [g.replace(" ", "\n") for g in groups])
        axes.set_ylim(-0.05, 1.05)
        axes.set(ylabel=y)
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)

    return _drawn(draw)
