"""How much do the norms of weights and gradients differ across layers?

    python -m benchmarks.study.trust_ratios

It takes a few minutes on 2 cores, and downloads photos and Fashion-MNIST. LARS
compensates for the spread of the ratio of both norms. The ratio is measured
twice:

- At the first step, as in Table 2 of the LARS paper: BVLC's AlexNet with its
  initial weights, on 20 photos of ImageNet that the recipe `alexnet` crops. A
  batch of 20 differs from one of thousands, so 5 and 10 photos show how the
  ratios depend on it. Beside them are the paper's ratios, from copies of its
  table in public code.
- Over training: the small AlexNet of `large_batch`, on Fashion-MNIST with LARS
  and a batch of 8,192. The weights are those before an update, and the gradient
  is averaged over its micro-batches. The ratio is computed from the trust ratio
  that `TrustRatioLogger` records at every update.
"""

import csv
import pathlib
import tempfile

import keras
import numpy as np
import tensorflow as tf

from benchmarks import _measure
from benchmarks import _results
from benchmarks import photos
from benchmarks.study import training
from horovod_recipes.configs import alexnet as alexnet_config
from horovod_recipes.data.augmentations import AUGMENTATIONS
from horovod_recipes.models.alexnet import alexnet
from keras_lars.callbacks import TrustRatioLogger

SEED = 0
# Photos of each batch at the first step.
PHOTOS = (5, 10, 20)
# Runs that are not kept led to the rate of 16.
RUN = training.Run("alexnet", "lars_scaled", 8192, 16.0, SEED)
SETTING = training.SETTINGS["full"]
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
# ‖w‖/‖∇L‖ of kernel and bias in Table 2 of the paper, from copies of the table
# in public code. The copies call kernels "b" and biases "w", but the norm 1.86
# of "conv1.b" is that of conv1's kernel: 34,848 numbers with a standard
# deviation of 0.01. The copies' norms of conv5's bias, 0.16 and 0.0002, do not
# give its ratio of 69. All other norms give their ratio within 5 %.
# By these norms the paper's biases start at 0.1 in fc6 and fc7, otherwise at
# 0.01. BVLC's start at 0 or 0.1.
PAPER = {
    "conv1": (8.48, 5.76),
    "conv2": (33.6, 83.5),
    "conv3": (69.9, 127),
    "conv4": (74.6, 148),
    "conv5": (73.6, 69),
    "fc6": (117, 1345),
    "fc7": (68, 489),
    "fc8": (93, 19),
}


def photo_batch():
    """Returns uint8 images `(20, size, size, 3)` and the indices of classes."""
    config = alexnet_config.get_config().dataset
    augmentation, _ = AUGMENTATIONS[config.augmentation]
    shape = (config.image_size, config.image_size, 3)
    paths = photos.fetch()
    images = [
        augmentation(path.read_bytes(), [SEED, index], shape)
        for index, path in enumerate(paths)
    ]
    labels = [int(path.stem.rpartition("_")[2]) for path in paths]
    return np.stack(images), np.array(labels)


def first_step(model, images, labels):
    """Returns the loss, and a dict of norms for each trainable variable.

    The loss is the mean cross-entropy, with dropout and without weight decay.
    """
    with tf.GradientTape() as tape:
        losses = keras.losses.sparse_categorical_crossentropy(
            labels, model(images, training=True), from_logits=True
        )
        loss = tf.reduce_mean(losses)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    lines = []
    for variable, gradient in zip(variables, gradients, strict=True):
        layer, kind = variable.path.rsplit("/", 2)[-2:]
        weight_norm, gradient_norm = (
            float(np.linalg.norm(np.asarray(x, "float64").ravel()))
            for x in (variable.value, gradient)
        )
        lines.append(
            {
                "layer": layer,
                "kind": kind,
                "weight_norm": weight_norm,
                "gradient_norm": gradient_norm,
                "ratio": weight_norm / gradient_norm,
            }
        )
    return float(loss), lines


def norm_ratios(trust_ratios, trust_coefficient, weight_decay):
    """Returns `‖w‖/‖g‖` from trust ratios `c ‖w‖ / (‖g‖ + b ‖w‖)`."""
    return 1 / (trust_coefficient / np.asarray(trust_ratios) - weight_decay)


def course(run, setting):
    """Trains; returns the result and `{layer: [ratio of each update]}`.

    The ratios are those of kernels, which the recipe adapts.
    """
    optimizer, _ = training.make_optimizer(run, setting)
    with tempfile.TemporaryDirectory() as log_dir:
        logger = TrustRatioLogger(log_dir, every_n_steps=1)
        result = training.train(run, setting, [logger])
        table = pathlib.Path(log_dir, "trust_ratios.csv").read_text()
    _, *rows = csv.reader(table.splitlines())
    steps, *columns = np.array(rows, "float64").T
    if list(steps) != list(range(1, result["updates"] + 1)):
        raise RuntimeError(f"not every update was recorded: {steps}")
    return result, {
        layer: norm_ratios(
            column, optimizer.trust_coefficient, training.WEIGHT_DECAY
        ).tolist()
        for layer, column in zip(LAYERS, columns, strict=True)
    }


def measure():
    keras.utils.set_random_seed(SEED)
    images, labels = photo_batch()
    model = alexnet(images.shape[1:], num_classes=1000)
    batches = []
    for count in PHOTOS:
        loss, lines = first_step(model, images[:count], labels[:count])
        batches.append({"photos": count, "loss": loss, "variables": lines})
    result, ratios = course(RUN, SETTING)
    return {
        "command": "python -m benchmarks.study.trust_ratios",
        "machine": _measure.machine(),
        "first_step": {
            "image_size": images.shape[1],
            "seed": SEED,
            "batches": rounded(batches),
        },
        "course": {
            "run": result,
            "epochs": SETTING.epochs,
            "warmup_updates": training.warmup_updates(
                SETTING, result["updates"]
            ),
            "training_images": SETTING.training_images,
            "ratios": rounded(ratios),
        },
    }


def rounded(value):
    """Returns a JSON value whose numbers have 5 digits."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def paper_ratio(line):
    return PAPER[line["layer"]][("kernel", "bias").index(line["kind"])]


def first_step_table(batches):
    """Returns a table: norms of the last batch, and ratios of all."""
    rows = []
    for line, *others in zip(
        *(batch["variables"] for batch in reversed(batches)), strict=True
    ):
        norms = line["weight_norm"], line["gradient_norm"]
        ratios = [x["ratio"] for x in (line, *others)]
        rows.append(
            [f"{line['layer']} {line['kind']}"]
            + [f"{number:.3g}" for number in (*norms, *ratios)]
            + [paper_ratio(line)]
        )
    ratios = [f"‖w‖/‖∇L‖, {b['photos']} photos" for b in reversed(batches)]
    return _results.table(
        ["", "‖w‖", "‖∇L‖", *ratios, "paper, by copies"], rows
    )


def course_table(ratios):
    updates = len(ratios[LAYERS[0]])
    shown = sorted({1, 5, *range(10, updates, 20), updates})
    rows = [
        [layer, *(f"{values[update - 1]:.3g}" for update in shown)]
        for layer, values in ratios.items()
    ]
    return _results.table(
        ["‖w‖/‖∇L‖, kernel", *(f"update {u}" for u in shown)], rows
    )


def draw(lines, ratios, path):
    """Draws ratios over layers at first, then over updates, as a PNG."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(12, 6), layout="constrained")
    at_start, over_time = figure.subplots(1, 2)
    for kind, color, marker in (("kernel", "C0", "o"), ("bias", "C1", "s")):
        own = [line for line in lines if line["kind"] == kind]
        at_start.plot(
            LAYERS,
            # A logarithmic axis cannot show 0; text below does.
            [line["ratio"] or np.nan for line in own],
            marker,
            color=color,
            label=f"{kind}, {PHOTOS[-1]} photos",
        )
        at_start.plot(
            LAYERS,
            [paper_ratio(line) for line in own],
            marker,
            color=color,
            fillstyle="none",
            label=f"{kind}, paper",
        )
        for line in own:
            if not line["ratio"]:
                at_start.text(
                    line["layer"],
                    0.02,
                    "0",
                    color=color,
                    ha="center",
                    transform=at_start.get_xaxis_transform(),
                )
    at_start.set_title("AlexNet, first step")
    for layer, values in ratios.items():
        over_time.plot(range(1, len(values) + 1), values, label=layer)
    over_time.axvline(
        training.warmup_updates(SETTING, len(ratios[LAYERS[0]])),
        color="0.5",
        linestyle=":",
        label="end of warm-up",
    )
    over_time.set_title(f"small AlexNet, kernels, batch {RUN.batch:,}")
    over_time.set_xlabel("update")
    for axes, columns in ((at_start, 2), (over_time, 5)):
        axes.set_yscale("log")
        axes.set_ylabel("‖w‖ / ‖∇L‖")
        axes.grid(alpha=0.3)
        # Below the axes, so that they hide nothing.
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.12),
            ncols=columns,
            fontsize=9,
            frameon=False,
            columnspacing=1.2,
            handlelength=1.5,
        )
    # Leaves space for the text of zeros.
    at_start.set_ylim(bottom=2)
    _results.save_figure(figure, path)


def main():
    parser = _results.parser(
        __spec__, __doc__, "docs/results/trust_ratios.json"
    )
    parser.add_argument(
        "--picture",
        default="docs/images/trust_ratios.png",
        metavar="FILE",
        help="PNG file to write (default: %(default)s)",
    )
    options = parser.parse_args()
    result = measure()
    batches = result["first_step"]["batches"]
    ratios = result["course"]["ratios"]
    print(first_step_table(batches))
    print()
    print(course_table(ratios))
    print(
        f"\ntop-1 on the test images: {result['course']['run']['test_top1']} %"
    )
    _results.write_json(options.output, result)
    draw(batches[-1]["variables"], ratios, options.picture)


if __name__ == "__main__":
    main()
