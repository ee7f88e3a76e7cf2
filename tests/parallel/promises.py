"""The promises of Horovod's Keras binding, each as a trial on two ranks.

A trial takes a binding, as a user's script would import it. It returns whether
the binding keeps the promise, and what was measured, in words.
"""

import pathlib
import tempfile

import horovod.tensorflow
import keras
import numpy as np
import tensorflow as tf

from tests.parallel.common import largest_difference


def upstream():
    import horovod.keras
    import horovod.tensorflow.keras as hvd

    # Horovod has these names in other modules.
    hvd.DistributedGradientTape = horovod.tensorflow.DistributedGradientTape
    hvd.SyncBatchNormalization = horovod.tensorflow.SyncBatchNormalization
    hvd.broadcast_variables = horovod.tensorflow.broadcast_variables
    hvd.PartialDistributedOptimizer = horovod.keras.PartialDistributedOptimizer
    return hvd


def ours():
    import horovod_recipes.keras as hvd

    return hvd


BINDINGS = {"upstream": upstream, "ours": ours}


def create_model(optimizer, seed=0, **compile_arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.Dense(2),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=False, **compile_arguments)
    return model


def examples(rank, number=16):
    """Returns the examples of a rank; they are unlike those of the other."""
    x = np.random.default_rng(rank).normal(size=(number, 4)).astype("float32")
    return x + rank, (x[:, 0] > 0).astype("int64")


def fit(model, hvd, **arguments):
    x, y = examples(hvd.rank())
    arguments = {"batch_size": 4, "shuffle": False, "verbose": 0} | arguments
    return model.fit(x, y, **arguments)


def of_all_ranks(value):
    return horovod.tensorflow.allgather_object(value)


def weights_are_equal(model):
    return difference(
        "weights of the two ranks",
        largest_difference(*of_all_ranks(model.get_weights())),
    )


def difference(what, largest, tolerance=0.0):
    largest = float(largest)
    if largest <= tolerance:
        return True, f"{what}: equal"
    return False, f"{what}: differ by {largest:.2g}"


def weights_after_fit(hvd):
    model = create_model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    fit(model, hvd)
    return weights_are_equal(model)


def broadcast_callback(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.0))
    model = create_model(optimizer, seed=hvd.rank())
    callback = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    fit(model, hvd, callbacks=[callback])
    return weights_are_equal(model)


def broadcast_variables(hvd):
    model = create_model(keras.optimizers.Adam(), seed=hvd.rank())
    half = keras.Variable([float(hvd.rank())], dtype="bfloat16")
    hvd.broadcast_variables(model.weights + [half], root_rank=0)
    return weights_are_equal(model)


def mean_of_gradients(optimizer, variables, hvd):
    """Whether gradients of 0 on rank 0 and 1 on rank 1 are applied as 0.5."""
    gradients = [tf.constant([float(hvd.rank())])] * len(variables)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    largest = max(abs(float(v[0]) + 0.5) for v in variables)
    return difference("update and mean gradient", largest)


def variables_of_one_name():
    return [keras.Variable([0.0], name="kernel") for _ in range(3)]


def custom_loop(hvd):
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(1.0))
    return mean_of_gradients(optimizer, variables_of_one_name(), hvd)


def groups_of_variables(hvd):
    variables = variables_of_one_name()
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(1.0), groups=[variables[:2]]
    )
    return mean_of_gradients(optimizer, variables, hvd)


def gradient_tape(hvd):
    variable = keras.Variable([0.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable * float(hvd.rank()))
    tape = hvd.DistributedGradientTape(tape)
    (gradient,) = tape.gradient(loss, [variable])
    return difference("gradient and mean gradient", abs(gradient[0] - 0.5))


def local_layer(hvd):
    model = create_model(keras.optimizers.SGD(0.1))
    model.optimizer = hvd.PartialDistributedOptimizer(
        keras.optimizers.SGD(0.1), local_layers=[model.layers[0]]
    )
    fit(model, hvd)
    first, second = of_all_ranks(model.get_weights())
    gaps = [np.abs(a - b).max() for a, b in zip(first, second, strict=True)]
    kept = min(gaps[:2]) > 0 and max(gaps[2:]) == 0
    return kept, (
        f"local layer differs by {max(gaps[:2]):.2g}, "
        f"shared layer by {max(gaps[2:]):.2g}"
    )


def sync_batch_norm(hvd):
    x = [examples(rank)[0] for rank in range(2)]
    layer = hvd.SyncBatchNormalization(momentum=0.5)
    outputs = layer(x[hvd.rank()], training=True)
    alone = keras.layers.BatchNormalization(momentum=0.5)
    expected = alone(np.concatenate(x), training=True)
    own = expected[16 * hvd.rank() :][:16]
    return difference(
        "outputs and those of the concatenated batch",
        np.abs(outputs - own).max(),
        tolerance=1e-5,
    )


def load_model(hvd):
    """The model was saved without Horovod."""
    model = create_model(keras.optimizers.SGD(0.1, momentum=0.9))
    model.fit(*examples(rank=0), verbose=0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        model.save(path)
        loaded = hvd.load_model(path)
    fit(loaded, hvd)
    return weights_are_equal(loaded)


def loads_without_horovod(hvd):
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    model = create_model(hvd.DistributedOptimizer(optimizer))
    fit(model, hvd)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        model.save(path)
        loaded = keras.saving.load_model(path)
    kind = type(loaded.optimizer)
    return difference(
        f"{kind.__module__}.{kind.__name__}, its state and what was saved",
        largest_difference(
            [v.numpy() for v in loaded.optimizer.variables],
            [v.numpy() for v in model.optimizer.variables],
        ),
    )


def config_round_trip(hvd):
    plain = keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=2.0)
    expected = plain.get_config()
    optimizer = hvd.DistributedOptimizer(plain)
    config = type(optimizer).from_config(optimizer.get_config()).get_config()
    changed = sorted(k for k in expected if config.get(k) != expected[k])
    if changed:
        return False, f"config changed: {', '.join(changed)}"
    return True, "config: equal"


def accumulation(hvd):
    """4 batches of 4 on 2 ranks: 2 updates of 16 examples."""
    model = create_model(
        hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.1),
            backward_passes_per_step=2,
            average_aggregated_gradients=True,
        )
    )
    fit(model, hvd)
    alone = create_model(keras.optimizers.SGD(0.1))
    x, y = (
        np.stack([examples(rank)[part] for rank in range(2)])
        for part in range(2)
    )
    x = x.reshape(2, 2, 8, 4).swapaxes(0, 1).reshape(32, 4)
    y = y.reshape(2, 2, 8).swapaxes(0, 1).reshape(32)
    alone.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    updates = int(model.optimizer.iterations)
    kept, text = difference(
        "weights and those of one rank with the global batch",
        largest_difference(model.get_weights(), alone.get_weights()),
        tolerance=1e-5,
    )
    return kept and updates == 2, f"{updates} updates; {text}"


def metric_average(hvd):
    return accuracy(hvd, "MetricAverageCallback", expected=0.5)


def exact_metrics(hvd):
    return accuracy(hvd, "ExactMetrics", expected=0.75)


def accuracy(hvd, callback, expected):
    """Rank 0 has 30 examples, all classified right; rank 1 has 10, wrong."""
    model = create_model(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.0)),
        metrics=["accuracy"],
    )
    number = [30, 10][hvd.rank()]
    x, _ = examples(0, 30)
    right = np.argmax(model.predict(x, verbose=0), axis=1)
    y = right if hvd.rank() == 0 else 1 - right
    history = model.fit(
        x[:number],
        y[:number],
        batch_size=number,
        verbose=0,
        callbacks=[getattr(hvd.callbacks, callback)()],
    )
    result = history.history["accuracy"][0]
    return abs(result - expected) < 1e-6, (
        f"accuracy {result:.2f}, where {expected} is right"
    )


def warmup_callback(hvd):
    model = create_model(
        hvd.DistributedOptimizer(keras.optimizers.SGD(0.4, momentum=0.9))
    )
    rates = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: rates.append(
            round(float(model.optimizer.learning_rate), 3)
        )
    )
    warmup = hvd.callbacks.LearningRateWarmupCallback(
        initial_lr=0.4, warmup_epochs=2, steps_per_epoch=4
    )
    fit(model, hvd, epochs=3, callbacks=[warmup, record])
    rises = rates == sorted(rates) and rates[0] < 0.3
    return rises and rates[-1] == 0.4, (
        f"the rate is {rates[0]} in batch 1, and {rates[-1]} after the warm-up"
    )


def best_model_checkpoint(hvd):
    model = create_model(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)))
    with tempfile.TemporaryDirectory() as folder:
        callback = hvd.callbacks.BestModelCheckpoint(monitor="loss")
        callback.filepath = f"{folder}/best.keras"
        fit(model, hvd, callbacks=[callback])
        # Rank 0 saves.
        there, _ = of_all_ranks(pathlib.Path(callback.filepath).exists())
    return there, "best model saved" if there else "no file"


def elastic_state(hvd):
    optimizer = hvd.DistributedOptimizer(
        keras.optimizers.SGD(0.1, momentum=0.9)
    )
    model = create_model(optimizer)
    fit(model, hvd)
    state = hvd.elastic.KerasState(model, batch=3)
    state.save()
    variables = model.weights + model.optimizer.variables
    saved = [v.numpy() for v in variables]
    fit(model, hvd)
    state.batch = 7
    state.restore()
    kept, text = difference(
        "weights and optimizer after restore and those that were saved",
        largest_difference([v.numpy() for v in variables], saved),
    )
    return kept and state.batch == 3, text


def local_infinity(hvd):
    """An infinity on rank 1 alone, in the first step of mixed_float16."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1))
        model = create_model(optimizer)
        x, y = examples(hvd.rank())
        if hvd.rank() == 1:
            x[0, 0] = np.inf
        model.fit(x, y, batch_size=4, shuffle=False, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    steps = of_all_ranks(int(model.optimizer.iterations))
    kept, text = weights_are_equal(model)
    return kept and steps == [3, 3], f"updates of the ranks: {steps}; {text}"


PROMISES = {
    "`fit` averages gradients": weights_after_fit,
    "`apply_gradients` in a custom loop averages": custom_loop,
    "`DistributedGradientTape` averages": gradient_tape,
    "`BroadcastGlobalVariablesCallback`": broadcast_callback,
    "`broadcast_variables`, one of them bfloat16": broadcast_variables,
    "`groups` as lists of variables": groups_of_variables,
    "`PartialDistributedOptimizer`": local_layer,
    "`backward_passes_per_step=2`": accumulation,
    "`SyncBatchNormalization`": sync_batch_norm,
    "a model from `load_model` averages": load_model,
    "saved model loads with Keras alone": loads_without_horovod,
    "`get_config`, `from_config`": config_round_trip,
    "`MetricAverageCallback`, mean of the ranks": metric_average,
    "metrics weighted by examples, `ExactMetrics`": exact_metrics,
    "`LearningRateWarmupCallback`": warmup_callback,
    "`BestModelCheckpoint`": best_model_checkpoint,
    "`elastic.KerasState` saves and restores": elastic_state,
    "infinity on one rank, mixed_float16": local_infinity,
}
