"""Checks of a config, made before anything starts."""

import difflib

from ml_collections import ConfigDict

from horovod_recipes.data.augmentations import AUGMENTATIONS
from horovod_recipes.data.augmentations import AUGMENTATIONS_OF_VIEWS
from horovod_recipes.errors import JobError
from horovod_recipes.models import MODELS

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
OPTIMIZERS = ("lars", "sgd", "lamb")
# Keys whose values must be 1 or more.
COUNTS = (
    "dataset.num_classes",
    "dataset.train_examples",
    "dataset.test_examples",
    "dataset.shuffle_buffer",
    "global_batch_size",
    "max_micro_batch_size",
    "epochs",
    "evaluate_every_epochs",
    "checkpoint_every_epochs",
    "keep_checkpoints",
    "log_trust_ratios_every_steps",
    "check_replicas_every_steps",
)
KEYS = COUNTS + (
    "hang_seconds",
    "task",
    "model.name",
    "dataset.name",
    "dataset.data_dir",
    "dataset.train_split",
    "dataset.test_split",
    "dataset.image_size",
    "dataset.augmentation",
    "dataset.corrupt_images",
    "dataset.cache",
    "dataset.service",
    "dataset.threads",
    "seed",
    "precision",
    "xla",
    "deterministic",
    "label_smoothing",
    "optimizer_name",
    "optimizer",
    "schedule.peak_learning_rate",
    "schedule.warmup_epochs",
    "schedule.decay",
    "schedule.power",
    "keep_best_checkpoints",
    "target_top1",
    "stop_at_target",
    "expected_top1",
)


# Integers besides `COUNTS`.
INTEGERS = ("seed", "keep_best_checkpoints")
# Integers and numbers that may be None.
OPTIONAL_INTEGERS = ("dataset.image_size", "dataset.threads")
OPTIONAL_NUMBERS = ("target_top1", "expected_top1")
NUMBERS = (
    "hang_seconds",
    "label_smoothing",
    "schedule.peak_learning_rate",
    "schedule.warmup_epochs",
    "schedule.power",
)
SWITCHES = ("dataset.cache", "xla", "deterministic", "stop_at_target")
TEXTS = (
    "task",
    "model.name",
    "dataset.name",
    "dataset.train_split",
    "dataset.test_split",
    "optimizer_name",
)
# Parts of a config whose keys are the arguments of a function.
ARGUMENTS = ("model", "optimizer", "schedule", "simclr")
PARTS = ("dataset", *ARGUMENTS)
# A job of more epochs has a mistake in its config.
MOST_EPOCHS = 1_000_000
# So has one with a larger number of examples, images or steps.
MOST_OF_A_COUNT = 10**12
# The largest float32.
HIGHEST_RATE = 3.4e38


def check_config(config):
    """Raises `JobError` if a key is missing or a value is not valid."""
    for key in PARTS:
        if not isinstance(config.get(key, ConfigDict()), ConfigDict):
            raise JobError(
                f"{key} must be a part of the config, with keys of its own, "
                f"but is {config[key]!r}"
            )
    for key in KEYS:
        _value(config, key)
    _check_keys(config)
    _check_types(config)
    _check_numbers(config)
    _check_choices(config)
    _check_combinations(config)
    if config.task == "simclr":
        _check_simclr(config)


def _check_keys(config):
    """Raises `JobError` for a key that looks like a misspelt one.

    Other unknown keys may be for callbacks of the user.
    """
    known = {*KEYS, *(key.partition(".")[0] for key in KEYS), *ARGUMENTS}
    for key in (*config, *(f"dataset.{key}" for key in config.dataset)):
        if key in known:
            continue
        if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
            raise JobError(
                f"the config has an unknown key {key}; did you mean {close[0]}?"
            )


def _check_types(config):
    number = int, float
    for keys, types, what in (
        ((*COUNTS, *INTEGERS), int, "an integer"),
        (OPTIONAL_INTEGERS, (int, type(None)), "an integer, or None"),
        (NUMBERS, number, "a number"),
        (OPTIONAL_NUMBERS, (*number, type(None)), "a number, or None"),
        (SWITCHES, bool, "True or False"),
        (TEXTS, str, "a text"),
    ):
        for key in keys:
            value = _value(config, key)
            # In Python, True is an integer.
            is_switch = isinstance(value, bool) and types is not bool
            if is_switch or not isinstance(value, types):
                raise JobError(
                    f"{key} must be {what}, but is {value!r} "
                    f"({type(value).__name__})"
                )


def _check_numbers(config):
    if config.epochs > MOST_EPOCHS:
        raise JobError(
            f"epochs must be at most {MOST_EPOCHS:,}, but is {config.epochs}"
        )
    for key in (*COUNTS, "hang_seconds"):
        if _value(config, key) < 1:
            raise JobError(
                f"{key} must be 1 or more, but is {_value(config, key)}"
            )
    for key in COUNTS:
        if _value(config, key) > MOST_OF_A_COUNT:
            raise JobError(
                f"{key} must be at most {MOST_OF_A_COUNT:,}, but is "
                f"{_value(config, key)}"
            )
    for key in ("dataset.image_size", "dataset.threads"):
        if _value(config, key) is not None and _value(config, key) < 1:
            raise JobError(
                f"{key} must be 1 or more, or None, but is "
                f"{_value(config, key)}"
            )
    if not 0 <= config.schedule.warmup_epochs < config.epochs:
        raise JobError(
            "schedule.warmup_epochs must be 0 or more and below the "
            f"{config.epochs} epochs, but is {config.schedule.warmup_epochs}"
        )
    rate = config.schedule.peak_learning_rate
    if not 0 <= rate <= HIGHEST_RATE:
        raise JobError(
            "schedule.peak_learning_rate must be from 0 to the largest "
            f"float32, but is {rate}"
        )
    if not 0 <= config.label_smoothing < 1:
        raise JobError(
            "label_smoothing must be 0 or more and below 1, but is "
            f"{config.label_smoothing}"
        )
    if config.keep_best_checkpoints < 0:
        raise JobError(
            "keep_best_checkpoints must be 0 or more, but is "
            f"{config.keep_best_checkpoints}"
        )
    if config.target_top1 is not None and not 1 <= config.target_top1 <= 100:
        raise JobError(
            "target_top1 must be from 1 to 100, in percent, but is "
            f"{config.target_top1}"
        )


def _check_choices(config):
    for key, choices in (
        ("model.name", MODELS),
        ("dataset.augmentation", AUGMENTATIONS),
        ("dataset.corrupt_images", ("stop", "skip")),
        ("precision", PRECISIONS),
        ("schedule.decay", ("polynomial", "cosine")),
    ):
        if _value(config, key) not in choices:
            raise JobError(
                f"{key} must be one of {', '.join(choices)}, but is "
                f"{_value(config, key)}"
            )
    is_trust_ratio = config.optimizer_name.startswith("trust_ratio:")
    if config.optimizer_name not in OPTIMIZERS and not is_trust_ratio:
        raise JobError(
            f"optimizer_name must be one of {', '.join(OPTIMIZERS)}, "
            f"trust_ratio:NAME, but is {config.optimizer_name}; NAME is "
            "conv_muon, or an optimizer of Keras"
        )


def _check_combinations(config):
    if config.dataset.service and config.dataset.corrupt_images == "skip":
        raise JobError(
            "dataset.corrupt_images=skip does not work with dataset.service, "
            "whose workers cannot count skipped images; use "
            "dataset.corrupt_images=stop"
        )
    if config.xla and config.model.get("batch_norm") == "synchronized":
        raise JobError(
            "xla cannot compile the allreduce of "
            "model.batch_norm=synchronized; use "
            "model.batch_norm=micro_batch, or xla=False"
        )
    excluded = config.optimizer.get("exclude_from_layer_adaptation")
    # The optimizer checks other types.
    leaves_none = isinstance(excluded, list | tuple) and ".*" in excluded
    if config.optimizer_name != "sgd" and leaves_none:
        raise JobError(
            "optimizer.exclude_from_layer_adaptation leaves no layer to adapt; "
            "use optimizer_name=sgd"
        )
    if config.stop_at_target and config.target_top1 is None:
        raise JobError("stop_at_target needs target_top1, in percent")


def _check_simclr(config):
    for key in ("projection_layers", "embedding_size"):
        if _value(config, f"simclr.{key}") < 1:
            raise JobError(
                f"simclr.{key} must be 1 or more, but is {config.simclr[key]}"
            )
    if not _value(config, "simclr.temperature") > 0:
        raise JobError(
            "simclr.temperature must be above 0, but is "
            f"{config.simclr.temperature}"
        )
    if config.dataset.augmentation not in AUGMENTATIONS_OF_VIEWS:
        raise JobError(
            "task=simclr needs different views of an image: "
            "dataset.augmentation must be one of "
            f"{', '.join(AUGMENTATIONS_OF_VIEWS)}, but is "
            f"{config.dataset.augmentation}"
        )
    if config.xla:
        raise JobError("task=simclr does not work with xla; use xla=False")


def _value(config, key):
    for part in key.split("."):
        if part not in config:
            raise JobError(
                f"the config has no {key}; see configs/_defaults.py and "
                "configs/demo.py"
            )
        config = config[part]
    return config


def check_source(config, source):
    """Raises `JobError` if the dataset does not match the config."""
    dataset = config.dataset
    for key, found in (
        ("num_classes", source.num_classes),
        ("train_examples", source.num_examples(dataset.train_split)),
        ("test_examples", source.num_examples(dataset.test_split)),
    ):
        if dataset[key] != found:
            raise JobError(
                f"the config has dataset.{key}={dataset[key]}, but the "
                f"dataset {dataset.name!r} on disk has {found}: "
                f"{source.why_another_number()} To use it as it is: "
                f"--config.dataset.{key}={found}"
            )
