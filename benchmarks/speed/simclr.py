"""What do gradient caching and the contrastive loss cost in SimCLR?

    horovodrun --gloo -np 2 python -m benchmarks.speed.simclr

It times updates of two networks on generated images, on two ranks with one
thread each, at a global batch of 1,024. With 4 micro-batches, gradient caching
stands beside plain accumulation, whose loss sees one micro-batch of all ranks
at a time. With 1 micro-batch, the update stands beside the same without the
gather and the loss. All take turns. On 2 cores, six rounds take 7 minutes.
"""

import keras
import tensorflow as tf

import horovod_recipes.keras as hvd
from benchmarks import _measure
from benchmarks import _results
from benchmarks.speed import _ranks
from horovod_recipes.configs import simclr as recipes
from horovod_recipes.models.losses import Contrast
from horovod_recipes.training import build
from horovod_recipes.training import simclr

GLOBAL_BATCH = 1024
MICRO_BATCHES = 4
# The network of the recipe for digits, and a slower one.
NETWORKS = {
    "3 blocks, 28 x 28": ((28, 28, 1), {"stage_blocks": (1, 1, 1)}),
    "ResNet-18 with 16 channels, 32 x 32": (
        (32, 32, 3),
        {"stage_blocks": (2, 2, 2, 2), "stem_stride": 1},
    ),
}


class Accumulated(simclr.SimCLRModel):
    """Adds up the gradients of micro-batches, each with a loss of its own."""

    def _gradients_in_two_passes(self, views, labels):
        def add_micro_batch(index, sums):
            gradients = self._gradients_in_one_pass(views[index], labels[index])
            return index + 1, [
                a + b / MICRO_BATCHES
                for a, b in zip(sums, gradients, strict=True)
            ]

        _, sums = tf.while_loop(
            lambda index, sums: index < MICRO_BATCHES,
            add_micro_batch,
            (0, [tf.zeros_like(value) for value in self._values()]),
            parallel_iterations=1,
        )
        return sums


class WithoutLoss(simclr.SimCLRModel):
    """Has a loss that costs nothing, and gathers nothing."""

    def _contrastive_loss(self, first, second):
        zeros = tf.zeros(tf.shape(first)[:1])
        nothing = Contrast(tf.reduce_sum(first * second), zeros, zeros, zeros)
        self._mean_contrastive_loss.update_state(nothing.loss)
        return nothing.loss


# Class of the model and number of micro-batches of each way to update.
WAYS = {
    "gradient caching": (simclr.SimCLRModel, MICRO_BATCHES),
    "plain accumulation": (Accumulated, MICRO_BATCHES),
    "one micro-batch": (simclr.SimCLRModel, 1),
    "one micro-batch, no gather and loss": (WithoutLoss, 1),
}
# What is compared with what, and the name of the ratio.
RATIOS = {
    "gradient caching / plain accumulation": (
        "gradient caching",
        "plain accumulation",
    ),
    "with / without gather and loss": (
        "one micro-batch",
        "one micro-batch, no gather and loss",
    ),
}


def update_function(kind, micro_batches, image_shape, changes):
    """Returns a function that makes one update."""
    config = recipes.get_config("fashion_mnist")
    config.model.update(changes)
    network = build.create_network(config, image_shape)
    model = kind(network.input, network.output)
    optimizer = build.create_optimizer(config, schedule=0.01)
    model.compile(
        optimizer=hvd.DistributedOptimizer(optimizer),
        loss=simclr.NTXent(config.simclr.temperature),
        jit_compile=False,
    )
    model.make_train_function()
    images = GLOBAL_BATCH // hvd.size() // micro_batches
    shape = [micro_batches, images]
    views = tf.random.uniform([*shape, 2, *image_shape], 0, 256, tf.int32)
    labels = tf.random.uniform(shape, 0, 10, tf.int32)
    batch = tf.cast(views, tf.uint8), labels
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    return lambda: model.train_function(batches)


def summary(times):
    """Returns the milliseconds of each way, and the ratios in each round."""
    return {
        "ms": {
            name: _measure.spread([1e3 * s for s in seconds], 1)
            for name, seconds in times.items()
        },
        "ratios": {
            name: _measure.spread_of_ratios(times[a], times[b])
            for name, (a, b) in RATIOS.items()
        },
    }


def markdown(result):
    tables = []
    for network, of_network in result["results"].items():
        for column, values in of_network.items():
            number_format = ".3f" if column == "ratios" else ".0f"
            rows = [
                [name, _results.cell(value, number_format)]
                for name, value in values.items()
            ]
            title = "ratio" if column == "ratios" else "ms an update"
            tables.append(_results.table([network, title], rows))
    return "\n\n".join(tables)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/simclr_step.json")
    _results.add_rounds(parser, 6)
    options = parser.parse_args()
    with _ranks.start():
        results = {}
        for name, (shape, changes) in NETWORKS.items():
            keras.backend.clear_session()
            functions = {
                way: update_function(kind, micro_batches, shape, changes)
                for way, (kind, micro_batches) in WAYS.items()
            }
            times = _measure.interleaved_times(functions, options.rounds)
            results[name] = summary(times)
    if hvd.rank() == 0:
        result = {
            "machine": _measure.machine(),
            "ranks": hvd.size(),
            "rounds": options.rounds,
            "global_batch": GLOBAL_BATCH,
            "results": results,
        }
        print(markdown(result))
        _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
