"""The optimizers of a model: `compile` takes one, a GAN has two."""

import keras


def optimizers_of(model):
    """Returns the optimizers that are attributes of a model.

    Returns:
        Dictionary of an optimizer for each attribute. An attribute may also be
        a list, a tuple or a dictionary of optimizers.
    """
    found = {}
    for name, value in vars(model).items():
        if name.startswith("_self_"):
            continue  # TensorFlow's own lists of attributes.
        if isinstance(value, dict):
            values = {f"{name}[{key!r}]": v for key, v in value.items()}
        elif isinstance(value, (list, tuple)):
            values = {f"{name}[{i}]": v for i, v in enumerate(value)}
        else:
            values = {name: value}
        for place, item in values.items():
            is_new = not any(item is known for known in found.values())
            if isinstance(item, keras.optimizers.Optimizer) and is_new:
                found[place] = item
    return found


def has_own_train_step(model):
    """Whether the model's `train_step` is not Keras's."""
    train_step = getattr(model.train_step, "__func__", None)
    return train_step is not keras.Model.train_step
