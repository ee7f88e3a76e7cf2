"""Command lines, tables, figures and JSON files of all benchmarks."""

import argparse
import contextlib
import json
import pathlib

from keras_lars._files import written_atomically

# A figure's pixels per inch.
FIGURE_DPI = 120


def parser(
    spec, doc, output, output_help="JSON file to write (default: %(default)s)"
):
    """Returns a command's parser, whose help is the module's docstring.

    Args:
        spec: The module's `__spec__`.
        doc: The module's `__doc__`.
        output: Default of `--output`, a path or None.
        output_help: Help of `--output`.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m {spec.name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    result.add_argument(
        "--output",
        type=pathlib.Path,
        default=output and pathlib.Path(output),
        metavar="FILE",
        help=output_help,
    )
    return result


def add_integer(parser, name, default, text, at_least=1):
    """Adds an option that takes an integer of `at_least` or more."""

    def integer(value):
        if int(value) < at_least:
            raise argparse.ArgumentTypeError(
                f"must be at least {at_least}, not {value}"
            )
        return int(value)

    parser.add_argument(
        f"--{name}",
        type=integer,
        default=default,
        metavar="N",
        help=f"{text} (default: {default})",
    )


def add_rounds(parser, default):
    """Adds `--rounds`; quartiles need two."""
    text = "how often to time each function"
    add_integer(parser, "rounds", default, text, at_least=2)


def table(header, rows):
    """Returns the lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def cell(values, number_format=""):
    """Returns the text of a median and its quartiles."""
    median, low, high = (format(value, number_format) for value in values)
    return f"{median} ({low} to {high})"


def span(values):
    """Returns the text of the lowest and the highest value."""
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def draw_bars(panels, xlabel, path):
    """Draws medians with quartiles as a PNG, one panel per group.

    Args:
        panels: Dict, title to dict of label to `(median, low, high)`.
        xlabel: String.
        path: String or path.
    """
    import matplotlib.figure

    rows = [len(bars) for bars in panels.values()]
    figure = matplotlib.figure.Figure(
        (8, 0.6 + 0.7 * len(rows) + 0.27 * sum(rows)), layout="constrained"
    )
    all_axes = figure.subplots(
        len(rows), squeeze=False, height_ratios=rows, sharex=True
    )[:, 0]
    for axes, (title, bars) in zip(all_axes, panels.items(), strict=True):
        for label in list(bars)[::-1]:
            median, low, high = bars[label]
            axes.barh(
                label,
                median,
                xerr=[[median - low], [high - median]],
                capsize=3,
                color="tab:blue",
            )
        axes.axvline(1, color="0.3", linewidth=0.8)
        axes.set_title(title, fontsize=10)
    all_axes[-1].set_xlabel(xlabel)
    save_figure(figure, path)


def save_figure(figure, path):
    with _written(path) as part:
        figure.savefig(part, dpi=FIGURE_DPI)


def add_json(path, key, result):
    """Writes `result` under `key` and keeps the file's other keys."""
    path = pathlib.Path(path)
    content = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, content | {key: result})


def write_json(path, result, verbose=True):
    with _written(path, verbose) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")


def write_text(path, text):
    with _written(path) as part:
        part.write_text(text)


@contextlib.contextmanager
def _written(path, verbose=True):
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_atomically(path) as part:
        yield part
    if verbose:
        print(f"written: {path}")
