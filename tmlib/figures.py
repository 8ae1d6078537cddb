"""Figures in one style: the same input gives the same bytes, so that reports can be committed.

Apart from `report`, so that a change of the report's words does not run the training notebooks again.
"""
import io
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from .config import atomic

LARGE = 200_000                                  # bytes of a picture file


def shown(value) -> str:
    """A value for people: three significant digits."""
    if not isinstance(value, float):
        return "–" if value is None else f"{value:,}" if type(value) is int else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


@contextmanager
def figure(path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3), **subplots):
    """`with figure(path) as (fig, axes):` draws in the house style, saves path (.png or .svg), the same bytes each time, and shows it."""
    from matplotlib import cycler, rc_context
    from matplotlib.figure import Figure
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")    # Okabe and Ito: safe for the colour-blind
    look = {"font.size": 9, "font.family": "DejaVu Sans", "axes.titlesize": 9, "axes.titlelocation": "left", "axes.grid": True,
            "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#e6e6e6", "axes.axisbelow": True,
            "legend.frameon": False, "savefig.dpi": 160, "svg.hashsalt": "talkingmachines", "axes.prop_cycle": cycler(color=colours)}
    clean = {"Date": None, "Creator": None} if Path(path).suffix == ".svg" else {"Software": None}
    with rc_context(look):
        fig = Figure(figsize=size, layout="constrained")
        yield fig, fig.subplots(rows, columns, **subplots)
        with atomic(path) as temporary:
            fig.savefig(temporary, metadata=clean)
        show(path, int(100 * size[0]))


def show(path, width: int) -> None:
    """In a notebook the picture below the cell, `width` pixels wide; elsewhere nothing."""
    ipython = sys.modules.get("IPython")
    if ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None:
        from IPython.display import SVG, Image, display
        display(SVG(str(path)) if Path(path).suffix == ".svg" else Image(light(path), width=width))


def light(path) -> bytes:
    """The file of a picture, or where it is large the same as JPEG: executed notebooks are committed, and have all pictures once more."""
    from PIL import Image
    data = Path(path).read_bytes()
    if len(data) < LARGE:
        return data
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").save(small := io.BytesIO(), "JPEG", quality=90, subsampling=0)
    return small.getvalue()


def contact_sheet(clips: list[np.ndarray], labels: list[str], path, columns: int = 8, fps: int = 16, titles: list[str] | None = None) -> None:
    """Clips uint8 (T, H, W, 3), one a row, at `columns` moments spread over the shortest; titles: of the columns, by default the seconds."""
    moments = np.linspace(0, min(map(len, clips)) - 1, columns).round().astype(int)
    titles = titles or [f"{moment / fps:.1f} s" for moment in moments]
    with figure(path, len(clips), columns, (columns * 0.95, len(clips) * 1.0 + 0.25), squeeze=False) as (fig, axes):
        for row, clip, label in zip(axes, clips, labels):
            for ax, moment, title in zip(row, moments, titles):
                ax.imshow(clip[moment], interpolation="lanczos")
                ax.set(xticks=[], yticks=[], title=title if ax in axes[0] else "")
                ax.spines[:].set_visible(False)
            row[0].set_ylabel(label)


def moving(rows: list[list[np.ndarray]], path, fps: int = 16, scale: int = 2) -> None:
    """A grid of clips uint8 (T, H, W, 3), `scale` times enlarged, as one animated picture (.webp): `rows` of equally many."""
    from PIL import Image
    length = min(len(clip) for row in rows for clip in row)
    grid = np.concatenate([np.concatenate([clip[:length] for clip in row], axis=2) for row in rows], axis=1)       # (T, rows H, columns W, 3)
    size = scale * grid.shape[2], scale * grid.shape[1]
    first, *others = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in grid)
    with atomic(path) as temporary:
        first.save(temporary, "WEBP", save_all=True, append_images=others, duration=round(1000 / fps), loop=0, quality=70, method=4)
    show(path, size[0])


def lip_trace(truth: np.ndarray, made: np.ndarray, labels: list[str], path, fps: int = 16) -> None:
    """Mouth opening over time, truth against generated: both (n, T), one panel a clip."""
    with figure(path, len(labels), 1, (7, 1.25 * len(labels) + 0.4), sharex=True, sharey=True, squeeze=False) as (fig, axes):
        for ax, true, got, label in zip(axes[:, 0], truth, made, labels):
            seconds = np.arange(len(true)) / fps
            ax.fill_between(seconds, true, color="#b9c2cc", linewidth=0, label="truth")
            ax.plot(seconds[:len(got)], got, linewidth=1.4, color="#d55e00", label="generated")
            ax.set(title=label, ylabel="opening")
        axes[0, 0].set_ylim(bottom=0)                          # shared: set once all is drawn, or it would end where the first panel does
        axes[0, 0].legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
        axes[-1, 0].set(xlabel="seconds", xlim=(0, truth.shape[1] / fps))


def curves(history: list[dict], keys: list[str], path, columns: int | None = None) -> None:
    """Training numbers over steps, one panel a key, logarithmic, so many side by side (all); history: what `train.train` returns."""
    columns = columns or len(keys)
    rows = -(-len(keys) // columns)
    with figure(path, rows, columns, (3.2 * columns + 0.6, 2.2 * rows), squeeze=False) as (fig, axes):
        for ax, key in zip(axes.flat, keys):
            points = [(h["step"], h[key]) for h in history if key in h]
            ax.plot(*zip(*points), linewidth=1.2)
            ax.set(title=key.replace("_", " "), xlabel="step", yscale="log")


def intervals(panels: dict[str, list[dict]], key: str, path) -> None:
    """row[key] of rows with a name, one below the other, and its 95 % interval: in a panel for each title that has rows."""
    panels = {title: rows for title, rows in panels.items() if rows}
    n = [len(rows) for rows in panels.values()]
    with figure(path, len(n), 1, (6.5, 0.32 * sum(n) + 0.5 * len(n) + 0.4), sharex=True, squeeze=False, height_ratios=n) as (fig, axes):
        for ax, (title, rows) in zip(axes[:, 0], panels.items()):
            for y, row in enumerate(rows):
                dot(ax, y, row, key)
            ax.set(title=title, yticks=range(len(rows)), yticklabels=[row["name"] for row in rows], ylim=(len(rows) - 0.5, -0.5))
        axes[-1, 0].set_xlabel(key.replace("_", " "))


def dot(ax, y: float, row: dict, key: str, colour: str = "C0") -> None:
    """row[key] at height y, with its interval if it has one."""
    value, lo, hi = (row.get(f"{key}{end}") for end in ("", "_lo", "_hi"))
    ax.errorbar(value, y, xerr=None if lo is None else [[value - lo], [hi - value]], fmt="o", markersize=4, color=colour)
