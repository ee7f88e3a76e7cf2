"""The demo: 4,000 real MNIST digits, LARS, a batch of a quarter of them.

    horovodrun -np 2 python -m horovod_recipes.train --config=demo
        --workdir=runs/demo

Hardware: two CPU cores, less than a minute. Expected top-1: 98 %, the rounded
mean over seeds 0 to 4 (`make demo-seeds`, docs/results/demo_seeds.jsonl).
"""

from ml_collections import config_dict

from horovod_recipes.configs import _defaults


def get_config():
    """Returns the `ConfigDict` of the demo."""
    config = _defaults.get_config()
    config.model = config_dict.create(name="small_cnn", filters=16)
    config.dataset.update(
        name="mnist5k",
        num_classes=10,
        train_examples=4000,
        test_examples=1000,
        augmentation="random_affine",
    )
    config.global_batch_size = 1024
    config.max_micro_batch_size = 1024
    config.epochs = 24
    config.optimizer = config_dict.create(
        momentum=0.9,
        weight_decay=5e-4,
        trust_coefficient=0.001,
        # Scales of batch norm are not adapted, and train at 0.05 of the rate.
        # At the full rate, top-1 varies more over seeds.
        unadapted_scale=0.05,
    )
    config.schedule.peak_learning_rate = 20.0
    config.schedule.warmup_epochs = 8
    config.evaluate_every_epochs = 8
    config.checkpoint_every_epochs = 8
    config.log_trust_ratios_every_steps = 3
    config.expected_top1 = 98.0
    return config
