"""A picture of the trust ratios of all variables over the steps of a run."""

import math

import numpy as np

from keras_lars._files import written_atomically

# Maximum number of labels. The picture leaves out the others.
MAX_LABELS = 200


def draw(labels, table, every_n_steps, path):
    """Draws a PNG: one row per variable, the input side on top.

    Args:
        labels: List of strings, the paths of the variables.
        table: Array of shape (records, 1 + variables): a step, then ratios.
        every_n_steps: Integer, the usual number of steps between records.
        path: `pathlib.Path` to write to.
    """
    import matplotlib.colors
    import matplotlib.figure

    steps, ratios = table[:, 0], table[:, 1:].T
    usable = np.isfinite(ratios) & (ratios > 0)
    middles = (steps[1:] + steps[:-1]) / 2
    half = every_n_steps / 2
    height = 2.0 + 0.16 * min(len(labels), MAX_LABELS)
    width = 6.5 + 0.07 * max(map(len, labels))
    figure = matplotlib.figure.Figure((width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.pcolormesh(
        [steps[0] - half, *middles, steps[-1] + half],
        np.arange(len(labels) + 1),
        np.ma.masked_where(~usable, ratios),
        # LogNorm refuses a table without a usable ratio.
        norm=matplotlib.colors.LogNorm() if usable.any() else None,
    )
    axes.set_facecolor("0.8")
    axes.invert_yaxis()
    axes.set_xlabel("step")
    rows = np.arange(0, len(labels), math.ceil(len(labels) / MAX_LABELS))
    axes.set_yticks(rows + 0.5, [labels[row] for row in rows], fontsize=7)
    # At the top, the colour bar is visible even in a tall picture.
    figure.colorbar(
        image,
        location="top",
        aspect=40,
        pad=0.2 / height,
        label="trust ratio",
    )
    with written_atomically(path) as part:
        figure.savefig(part, dpi=120)
