"""Draws the two figures of docs/architecture.md, as SVG.

python docs/hooks/diagrams.py
"""

import html
import pathlib

IMAGES = pathlib.Path(__file__).parents[1] / "images"
# All lengths are in pixels.
WIDTH = 480
MARGIN = 16
BOX_HEIGHT = 62
GAP = 26
STYLE = (
    "text{font:15px sans-serif;fill:#222}.small{font-size:13px;fill:#555}"
    ".name{font-weight:bold}.rank{fill:#e8eaf6}.all{fill:#ffe0b2}"
    "rect{fill:#e8eaf6;stroke:#3f51b5;stroke-width:1.2}rect.all{fill:#ffe0b2}"
    "rect.page{fill:#fff;stroke:none}"
    "path{stroke:#3f51b5;stroke-width:1.6;fill:none;marker-end:url(#tip)}"
)
ARROW_HEAD = (
    '<marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
    'markerHeight="7" orient="auto"><path d="M0 0L10 5L0 10z" '
    'style="fill:#3f51b5;stroke:none;marker-end:none"/></marker>'
)

# A room imports from the rows below it.
ROOMS = (
    (("benchmarks/", "speed and accuracy"), ("examples/", "scripts to copy")),
    (
        ("train.py", "the job, as a command"),
        ("evaluate.py", "its encoder"),
        ("plan.py", "its time and memory"),
    ),
    (("planning/", "what a job will do"),),
    (("training/", "what a job is made of"),),
    (("configs/", "recipes"),),
    (("models/", "networks"),),
    (
        ("data/", "input pipeline"),
        ("keras/", "Horovod for Keras 3"),
    ),
    (("keras_lars/", "the optimizer; it needs Keras alone"),),
)
# What happens, in which file, and whether all ranks meet there.
STEP = (
    ("Read and shuffle this rank's shard", "data/sources.py", False),
    ("Decode, crop and flip", "data/decoding.py", False),
    ("Batch and prefetch", "data/pipeline.py", False),
    (
        "Forward and backward pass of each micro-batch",
        "keras/_train_step.py",
        False,
    ),
    ("Allreduce: the mean gradient of all ranks", "keras/_reduction.py", True),
    (
        "Unscale, skip if not finite, clip",
        "keras/_distributed_apply.py, Keras",
        False,
    ),
    ("Trust ratio and update of each variable", "keras_lars/lars.py", False),
    ("Check the weights, note SIGTERM, save", "training/callbacks.py", True),
)


def svg(height, parts):
    """Returns the text of an SVG file."""
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}">',
            f"<style>{STYLE}</style><defs>{ARROW_HEAD}</defs>",
            f'<rect class="page" width="{WIDTH}" height="{height}"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


def box(x, y, width, name, purpose, kind="rank"):
    """Returns a box with a bold line and a small one."""
    middle = x + width / 2
    return (
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" '
        f'height="{BOX_HEIGHT}" rx="6"/>'
        f'<text class="name" x="{middle:g}" y="{y + 26:g}" '
        f'text-anchor="middle">{html.escape(name)}</text>'
        f'<text class="small" x="{middle:g}" y="{y + 47:g}" '
        f'text-anchor="middle">{html.escape(purpose)}</text>'
    )


def arrow(y):
    """Returns an arrow in the middle, over the gap below a row."""
    top = y + BOX_HEIGHT + 4
    return f'<path d="M{WIDTH / 2:g} {top}V{top + GAP - 8}"/>'


def draw_rooms():
    parts, y = [], MARGIN
    for row in ROOMS:
        width = (WIDTH - MARGIN * (len(row) + 1)) / len(row)
        for index, (name, purpose) in enumerate(row):
            x = MARGIN + index * (width + MARGIN)
            parts.append(box(x, y, width, name, purpose))
        if row is not ROOMS[-1]:
            parts.append(arrow(y))
        y += BOX_HEIGHT + GAP
    return svg(y - GAP + MARGIN, parts)


def draw_step():
    parts, y = [], MARGIN
    for what, where, meets in STEP:
        kind = "all" if meets else "rank"
        parts.append(box(MARGIN, y, WIDTH - 2 * MARGIN, what, where, kind))
        if where is not STEP[-1][1]:
            parts.append(arrow(y))
        y += BOX_HEIGHT + GAP
    return svg(y - GAP + MARGIN, parts)


FIGURES = {"rooms.svg": draw_rooms, "step.svg": draw_step}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (IMAGES / name).write_text(draw())
