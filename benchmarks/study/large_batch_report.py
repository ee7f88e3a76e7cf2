"""The tables and the figure of the large-batch study."""

import numpy as np

from benchmarks.speed import report
from benchmarks.study.large_batch_run import NETWORK_TITLES
from benchmarks.study.large_batch_run import RECIPES


def print_report(cells):
    for network, title in NETWORK_TITLES.items():
        print(f"\n{title}: top-1, mean (lowest to highest) at the rate; * is")
        print("the highest or lowest rate that was tried\n")
        print(table(cells, network))


def table(cells, network):
    """Returns Markdown: mean, lowest and highest top-1, and the rate."""
    by_place = {(c["batch"], c["recipe"]): c for c in cells_in(cells, network)}
    rows = []
    for batch in sorted({batch for batch, _ in by_place}):
        found = [by_place.get((batch, recipe)) for recipe in RECIPES]
        updates = next(c["updates"] for c in found if c is not None)
        rows.append([batch, updates, *map(cell_text, found)])
    titles = [recipe.title for recipe in RECIPES.values()]
    return report.table(["batch", "updates", *titles], rows)


def cell_text(cell):
    if cell is None:
        return "not run"
    low, high = min(cell["top1"]), max(cell["top1"])
    edge = "*" if cell["rate_at_the_edge"] else ""
    return f"{cell['mean_top1']} ({low} to {high}) at {cell['rate']:g}{edge}"


def cells_in(cells, network):
    return [cell for cell in cells if cell["network"] == network]


def draw(cells, path):
    """Draws accuracy over batch, with the lowest and highest, as a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, len(NETWORK_TITLES), sharey=True)
    for axes, (network, title) in zip(
        panels, NETWORK_TITLES.items(), strict=True
    ):
        for index, (recipe, about) in enumerate(RECIPES.items()):
            line = [
                c for c in cells_in(cells, network) if c["recipe"] == recipe
            ]
            line.sort(key=lambda c: c["batch"])
            lowest, mean, highest = np.transpose(
                [(min(c["top1"]), c["mean_top1"], max(c["top1"])) for c in line]
                or np.empty((0, 3))
            )
            axes.errorbar(
                [c["batch"] for c in line],
                mean,
                [mean - lowest, highest - mean],
                marker="o",
                capsize=3,
                color=f"C{index}",
                label=about.title,
            )
        axes.set_title(title)
        axes.set_xscale("log", base=2)
        ticks = sorted({c["batch"] for c in cells})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("global batch")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 on the test images, %")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
    )
    report.save_figure(figure, path)
