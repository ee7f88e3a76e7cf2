"""The keys of a recipe, with what most recipes have; not one itself.

A recipe adds model, optimizer, global_batch_size, epochs, and what is not here
of the dataset and the schedule.
"""

from ml_collections import config_dict


def get_config():
    """Returns a `ConfigDict` that lacks only what a recipe is about."""
    config = config_dict.ConfigDict()
    # Of horovod_recipes.training.tasks.
    config.task = "classification"
    config.dataset = config_dict.create(
        # None is TFDS's default folder, or TFDS_DATA_DIR.
        data_dir=config_dict.placeholder(str),
        train_split="train",
        test_split="test",
        # In pixels, after the crop; None for the size on disk.
        image_size=config_dict.placeholder(int),
        # Of horovod_recipes.data.augmentations.
        augmentation="none",
        # "stop" names the image and ends the job; "skip" warns and counts.
        corrupt_images="stop",
        # Encoded images of a rank.
        shuffle_buffer=16384,
        # Keeps a rank's encoded images in memory after the first epoch.
        cache=False,
        # "grpc://HOST:PORT" of a tf.data service that makes the batches.
        service=config_dict.placeholder(str),
        # Of the input pipeline of a rank; None for its share of the cores.
        threads=config_dict.placeholder(int),
    )
    # Images of one rank in one forward and backward pass, at most: what fits
    # into memory, and what batch norm takes its statistics of.
    config.max_micro_batch_size = 64
    config.seed = 0
    # Or "mixed_bfloat16", "mixed_float16".
    config.precision = "float32"
    # Whether XLA compiles forward and backward pass, and evaluation.
    config.xla = False
    # Bit-equal results of equal jobs, at some cost of speed.
    config.deterministic = False
    config.label_smoothing = 0.0
    # Or "sgd": momentum and L2 decay of `optimizer`, no layer-wise adaptation.
    config.optimizer_name = "lars"
    config.schedule = config_dict.create(power=2.0)
    config.evaluate_every_epochs = 1
    config.checkpoint_every_epochs = 1
    # Of the newest, and of those with the best top-1.
    config.keep_checkpoints = 2
    config.keep_best_checkpoints = 1
    config.log_trust_ratios_every_steps = 100
    # Compares the ranks' weights and optimizer states, and stops where they
    # differ.
    config.check_replicas_every_steps = 100
    # Without progress for so long, as from one batch to the next, a rank ends
    # the job and names the rank that hangs. More than the first step takes.
    config.hang_seconds = 600
    # In percent: summary.json says when it was reached; None for no target.
    config.target_top1 = config_dict.placeholder(float)
    config.stop_at_target = False
    # In percent, of the source that the recipe names, for summary.json; None if
    # there is none.
    config.expected_top1 = config_dict.placeholder(float)
    return config
