"""How much memory does a model keep that is thrown away?

    python -m benchmarks.speed.memory

A search over learning rates makes many models in one process. Here each of them
is trained for one step and thrown away, with `keras.backend.clear_session()`
and without it. The memory of 40 models is counted after 10 others. Each count
has a process of its own. It took 16 minutes beside other work.
"""

import gc
import json
import subprocess
import sys

from benchmarks import _measure
from benchmarks import _results

OPTIMIZERS = ("SGD", "LARS", "TrustRatio")
MODELS_BEFORE, MODELS = 10, 40


def megabytes_of_a_model(optimizer, clear):
    """Returns the megabytes by which this process grows with each model."""
    train_models(optimizer, clear, MODELS_BEFORE)
    before = _measure.memory_bytes("VmRSS")
    train_models(optimizer, clear, MODELS)
    return (_measure.memory_bytes("VmRSS") - before) / MODELS / 1e6


def train_models(optimizer, clear, number):
    import keras
    import numpy as np

    from keras_lars import LARS
    from keras_lars import TrustRatio

    create = {
        "SGD": keras.optimizers.SGD,
        "LARS": LARS,
        "TrustRatio": lambda rate, momentum: TrustRatio(
            keras.optimizers.SGD(rate, momentum)
        ),
    }[optimizer]
    examples, labels = np.zeros((64, 32), "float32"), np.zeros(64)
    for index in range(number):
        hidden = [keras.layers.Dense(64, "relu") for _ in range(2)]
        model = keras.Sequential([*hidden, keras.layers.Dense(10)])
        model.compile(
            create(0.1 / (index + 1), momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(examples, labels, batch_size=64, verbose=0)
        del model
        if clear:
            keras.backend.clear_session()
        gc.collect()


def measure(rounds):
    """Returns `[{optimizer, clear_session, megabytes}]`."""
    ways = [(o, clear) for clear in (False, True) for o in OPTIMIZERS]
    found = {way: [] for way in ways}
    for _ in range(rounds):
        for optimizer, clear in ways:
            command = [sys.executable, "-m", __spec__.name, "--one", optimizer]
            output = subprocess.run(
                command + ["--clear"] * clear,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            found[optimizer, clear].append(json.loads(output))
    return [
        {
            "optimizer": optimizer,
            "clear_session": clear,
            "megabytes": _measure.spread(values, digits=2),
        }
        for (optimizer, clear), values in found.items()
    ]


def markdown(result):
    rows = [
        [
            line["optimizer"],
            "yes" if line["clear_session"] else "no",
            _results.cell(line["megabytes"]),
        ]
        for line in result["results"]
    ]
    return _results.table(["", "clear_session", "MB a model"], rows)


def main():
    parser = _results.parser(__spec__, __doc__, "docs/results/memory.json")
    _results.add_rounds(parser, 3)
    parser.add_argument(
        "--one",
        choices=OPTIMIZERS,
        help="only print the megabytes of a model with this optimizer",
    )
    parser.add_argument(
        "--clear", action="store_true", help="with --one: clear the session"
    )
    options = parser.parse_args()
    if options.one:
        print(megabytes_of_a_model(options.one, options.clear))
        return
    result = {
        "machine": _measure.machine(),
        "rounds": options.rounds,
        "results": measure(options.rounds),
    }
    print(markdown(result))
    _results.write_json(options.output, result)


if __name__ == "__main__":
    main()
