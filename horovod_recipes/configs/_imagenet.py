"""What the ImageNet recipes share; not a recipe itself."""

from ml_collections import config_dict

from horovod_recipes.configs import _defaults
from horovod_recipes.errors import JobError

# ILSVRC 2012 as TFDS's imagenet2012 has it.
TRAIN_EXAMPLES = 1281167
TEST_EXAMPLES = 50000


def get_config():
    """Returns a `ConfigDict` that lacks model, batch, rate and augmentation.

    Momentum, weight decay, trust coefficient, the power of the decay and 100
    epochs are those of all the paper's runs. The paper's decay runs from step
    0 (its Algorithm 1), below the warm-up.
    """
    config = _defaults.get_config()
    config.dataset.update(
        name="imagenet2012",
        test_split="validation",
        num_classes=1000,
        train_examples=TRAIN_EXAMPLES,
        test_examples=TEST_EXAMPLES,
        image_size=224,
        augmentation="minimal",
        # 450 MB of JPEGs a rank, beside the order of the files.
        shuffle_buffer=4096,
    )
    config.epochs = 100
    config.optimizer = config_dict.create(
        momentum=0.9, weight_decay=5e-4, trust_coefficient=0.001
    )
    config.schedule.rebase = False
    return config


def without_lars(config):
    """Makes the optimizer SGD with momentum and L2 decay, in place.

    Biases and batch norms are not decayed.
    """
    config.optimizer_name = "sgd"


def row(rows, variant):
    """Returns the row of a table of variants; the error lists them."""
    if variant not in rows:
        raise JobError(
            f"unknown variant {variant!r}; the variants are: {', '.join(rows)}"
        )
    return rows[variant]
