"""The default values that recipes start from; not a recipe itself.

A recipe adds the model, optimizer, global_batch_size and epochs. It also adds
the keys of the dataset and the schedule that have no default here.
"""

from ml_collections import config_dict


def get_config():
    """Returns a `ConfigDict` with the default values."""
    config = config_dict.ConfigDict()
    # A name in horovod_recipes.training.tasks.
    config.task = "classification"
    config.dataset = config_dict.create(
        # TFDS's data folder. None means TFDS_DATA_DIR or TFDS's default.
        data_dir=config_dict.placeholder(str),
        train_split="train",
        test_split="test",
        # Height and width of the crops in pixels. None keeps the size on disk.
        image_size=config_dict.placeholder(int),
        # A name in horovod_recipes.data.augmentations.
        augmentation="none",
        # "stop" ends the job and names the image. "skip" warns and counts.
        corrupt_images="stop",
        # Size of a rank's shuffle buffer, in encoded images.
        shuffle_buffer=16384,
        # Keeps a rank's encoded images in memory after the first epoch.
        cache=False,
        # "grpc://HOST:PORT" of a tf.data service that makes the batches.
        service=config_dict.placeholder(str),
        # Threads of a rank's input pipeline. None means its share of the cores.
        threads=config_dict.placeholder(int),
    )
    # Images in one forward pass of one rank, at most.
    # Memory limits it, and batch norm computes its statistics over it.
    config.max_micro_batch_size = 64
    config.seed = 0
    # "float32", "mixed_bfloat16" or "mixed_float16".
    config.precision = "float32"
    # Lets XLA compile the forward and backward passes, and evaluation.
    config.xla = False
    # Makes equal jobs give bit-equal results, but slower.
    config.deterministic = False
    config.label_smoothing = 0.0
    # "lars", "sgd", "lamb" or "trust_ratio:NAME", with its arguments in
    # `optimizer`. SGD uses the momentum and weight decay. With "trust_ratio",
    # `optimizer.inner` has arguments of the optimizer that is called NAME.
    config.optimizer_name = "lars"
    # The decay after the warm-up: "polynomial", with `power`, or "cosine".
    config.schedule = config_dict.create(decay="polynomial", power=2.0)
    config.evaluate_every_epochs = 1
    config.checkpoint_every_epochs = 1
    # Number of newest checkpoints to keep.
    config.keep_checkpoints = 2
    # Number of checkpoints with the best top-1 to keep.
    config.keep_best_checkpoints = 1
    config.log_trust_ratios_every_steps = 100
    # Compares weights and optimizer states of all ranks; stops if they differ.
    config.check_replicas_every_steps = 100
    # A rank without progress for this time ends the job.
    # The first step must finish within it.
    config.hang_seconds = 600
    # Top-1 in percent. summary.json says when it was reached.
    config.target_top1 = config_dict.placeholder(float)
    config.stop_at_target = False
    # Top-1 in percent that the recipe's source reports, for summary.json.
    config.expected_top1 = config_dict.placeholder(float)
    return config
