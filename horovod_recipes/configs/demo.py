"""A small network on 4,000 real MNIST digits, on two ranks of one machine.

Shows the whole way in two minutes on two CPU cores: LARS at a batch of a
quarter of the training set. Expected top-1: 97.9 to 98.5 %.

    horovodrun -np 2 python -m horovod_recipes.train --config=demo \
        --workdir=DIR
"""

from ml_collections import config_dict


def get_config():
    config = config_dict.ConfigDict()

    config.model = config_dict.ConfigDict()
    config.model.name = "small_cnn"
    config.model.filters = 16

    config.dataset = config_dict.ConfigDict()
    config.dataset.name = "mnist5k"
    # TFDS's own default, unless a folder is given.
    config.dataset.data_dir = config_dict.placeholder(str)
    config.dataset.augmentation = "random_affine"
    # "stop" ends the job; "skip" leaves the image out, and counts it.
    config.dataset.corrupt_images = "stop"

    # The batch of one update: ranks x micro-batch x accumulation steps.
    config.global_batch_size = 1024
    config.accumulation_steps = 1
    config.epochs = 30
    config.seed = 0

    # The arguments of keras_lars.LARS.
    config.optimizer = config_dict.ConfigDict()
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 5e-4
    config.optimizer.trust_coefficient = 0.001
    # The full rate would be too much for the scales and offsets of batch norm.
    config.optimizer.unadapted_scale = 0.05

    # Those of keras_lars.schedules.WarmupPolynomialDecay; epochs for steps.
    config.schedule = config_dict.ConfigDict()
    config.schedule.peak_learning_rate = 20.0
    config.schedule.warmup_epochs = 5
    config.schedule.power = 2.0

    config.evaluate_every_epochs = 5
    config.checkpoint_every_epochs = 5
    config.keep_checkpoints = 3
    config.log_trust_ratios_every_steps = 3
    return config
