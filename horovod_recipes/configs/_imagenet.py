"""The values that all ImageNet recipes share; not a recipe itself."""

from ml_collections import config_dict

from horovod_recipes.configs import _defaults
from horovod_recipes.errors import JobError

# Images in the splits of TFDS's imagenet2012, which is ILSVRC 2012.
TRAIN_EXAMPLES = 1281167
TEST_EXAMPLES = 50000


def get_config():
    """Returns a `ConfigDict` without model, batch size and learning rate.

    All runs of the LARS paper share the other values here. Its learning rate
    decays from step 0 (Algorithm 1), also under the warm-up.
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
        # 450 MB of JPEGs per rank. The order of the files is shuffled too.
        shuffle_buffer=4096,
    )
    config.epochs = 100
    config.optimizer = config_dict.create(
        momentum=0.9, weight_decay=5e-4, trust_coefficient=0.001
    )
    config.schedule.rebase = False
    return config


def without_lars(config):
    """Changes `config` to SGD with momentum and L2 decay.

    Weight decay skips biases and batch norms.
    """
    config.optimizer_name = "sgd"


def row(rows, variant):
    """Returns a variant's row; raises `JobError` if the table lacks it."""
    if variant not in rows:
        raise JobError(
            f"unknown variant {variant!r}; the variants are: {', '.join(rows)}"
        )
    return rows[variant]
