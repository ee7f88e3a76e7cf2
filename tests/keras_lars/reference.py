"""LARS in float64 NumPy, independent of the package, and inputs for it."""

import inspect

import keras
import numpy as np
import pytest

NEEDS_MUON = pytest.mark.skipif(
    "rms_rate" not in inspect.signature(keras.optimizers.Muon).parameters,
    reason="Muon is another one before Keras 3.13",
)
SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "dense/kernel": (4, 5),
}


def variables_and_gradients(steps, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    variables = []
    for path, shape in SHAPES.items():
        layer, name = path.split("/")
        with keras.name_scope(layer):
            value = rng.normal(size=shape)
            variables.append(keras.Variable(value, dtype=dtype, name=name))
    gradients = [
        [rng.normal(size=shape) * 0.1 for shape in SHAPES.values()]
        for _ in range(steps)
    ]
    return variables, gradients


def reference(
    weights,
    gradients,
    learning_rates,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.0,
    trust_coefficient=0.001,
    epsilon=0.0,
    trust_ratio_norm=None,
    momentum_style="paper",
    trust_clip=False,
    unadapted_scale=1.0,
    adapted=None,
    decayed=None,
):
    """Returns the weights and the trust ratios after all steps.

    `gradients` holds one list of arrays a step; `adapted` and `decayed` one
    bool a variable.
    """
    joint = trust_ratio_norm == "joint"
    weights = [w.astype("float64") for w in weights]
    velocities = [np.zeros_like(w) for w in weights]
    ratios = [1.0] * len(weights)
    for grads, lr in zip(gradients, learning_rates, strict=True):
        for i, g in enumerate(grads):
            w, v = weights[i], velocities[i]
            beta = weight_decay if decayed[i] else 0.0
            d = g + beta * w
            if momentum_style == "popular":
                v = momentum * v + d
                u = momentum * v + d if nesterov else v
                parts = [np.linalg.norm(u)]
            elif joint:
                parts = [np.linalg.norm(d)]
            else:
                parts = [np.linalg.norm(g), beta * np.linalg.norm(w)]
            r = unadapted_scale
            if adapted[i] and np.linalg.norm(w) > 0 and parts[0] > 0:
                r = trust_coefficient * np.linalg.norm(w)
                r /= sum(parts) + epsilon
                if trust_clip:
                    r = min(r / lr, 1.0) if lr > 0 else 1.0
            if momentum_style == "popular":
                w = w - lr * r * u
            elif momentum_style == "paper":
                v = momentum * v + lr * r * d
                w = w - (momentum * v + lr * r * d if nesterov else v)
            else:
                v = momentum * v + r * d
                w = w - lr * (momentum * v + r * d if nesterov else v)
            weights[i], velocities[i], ratios[i] = w, v, r
    return weights, ratios
