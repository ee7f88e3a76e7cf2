"""The variables that collectives need are made wherever the first one is."""

import subprocess
import sys


def test_first_collective_is_in_a_later_trace():
    """A tf.function refuses variables that its later traces create."""
    script = """
import keras
import tensorflow as tf
import horovod_recipes.keras as hvd

hvd.init()
weight = keras.Variable(3.0)
optimizer = keras.optimizers.SGD(0.1)

@tf.function
def step(averages):
    with tf.GradientTape() as tape:
        loss = weight.value**2
    if averages:
        tape = hvd.DistributedGradientTape(tape)
    optimizer.apply([tape.gradient(loss, weight)], [weight])

step(False)
step(True)
assert abs(float(weight) - 3 * 0.8**2) < 1e-6, weight
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)
