"""What a config asks for, checked before anything starts."""

import dataclasses

from horovod_recipes.errors import JobError
from horovod_recipes.input_pipeline import AUGMENTATIONS
from horovod_recipes.models import MODELS


def check_config(config):
    """Raises `JobError` where a key is missing or a value out of its range."""
    for key in (
        "model.name",
        "dataset.name",
        "dataset.data_dir",
        "dataset.augmentation",
        "dataset.corrupt_images",
        "global_batch_size",
        "accumulation_steps",
        "epochs",
        "seed",
        "optimizer",
        "schedule.peak_learning_rate",
        "schedule.warmup_epochs",
        "schedule.power",
        "evaluate_every_epochs",
        "checkpoint_every_epochs",
        "keep_checkpoints",
        "log_trust_ratios_every_steps",
    ):
        group = config
        for part in key.split("."):
            if part not in group:
                raise JobError(f"the config has no {key}; configs/demo.py has")
            group = group[part]
    for key in (
        "global_batch_size",
        "accumulation_steps",
        "epochs",
        "evaluate_every_epochs",
        "checkpoint_every_epochs",
        "keep_checkpoints",
        "log_trust_ratios_every_steps",
    ):
        if config[key] < 1:
            raise JobError(f"{key} must be 1 or more, but is {config[key]}")
    if not 0 <= config.schedule.warmup_epochs < config.epochs:
        raise JobError(
            "schedule.warmup_epochs must be 0 or more and below the "
            f"{config.epochs} epochs, but is {config.schedule.warmup_epochs}"
        )
    for key, value, choices in (
        ("model.name", config.model.name, MODELS),
        (
            "dataset.augmentation",
            config.dataset.augmentation,
            AUGMENTATIONS,
        ),
        (
            "dataset.corrupt_images",
            config.dataset.corrupt_images,
            ("stop", "skip"),
        ),
    ):
        if value not in choices:
            raise JobError(
                f"{key} must be one of {', '.join(choices)}, but is {value}"
            )


@dataclasses.dataclass(frozen=True)
class JobSize:
    """How the global batch is made up, and how many updates there are."""

    ranks: int
    micro_batch_size: int
    accumulation_steps: int
    steps_per_epoch: int
    epochs: int

    @property
    def global_batch_size(self):
        return self.ranks * self.micro_batch_size * self.accumulation_steps

    @property
    def steps(self):
        return self.steps_per_epoch * self.epochs


def job_size(config, builder, ranks):
    """Returns the `JobSize`; raises `JobError` where it does not work out."""
    batch = config.global_batch_size
    for split in ("train", "test"):
        examples = builder.info.splits[split].num_examples
        if ranks > examples:
            raise JobError(
                f"{ranks} ranks are more than the {examples} examples of "
                f"{config.dataset.name}'s {split} split; use at most {examples}"
            )
    micro_batches = ranks * config.accumulation_steps
    if batch % micro_batches:
        below = batch // micro_batches * micro_batches
        nearest = [n for n in (below, below + micro_batches) if n > 0]
        raise JobError(
            f"global_batch_size {batch} is not divisible by {ranks} ranks x "
            f"{config.accumulation_steps} accumulation steps = "
            f"{micro_batches}; the nearest that is: "
            f"{min(nearest, key=lambda n: abs(n - batch))}"
        )
    examples = builder.info.splits["train"].num_examples
    if batch > examples:
        raise JobError(
            f"global_batch_size {batch} is more than the {examples} training "
            f"examples of {config.dataset.name}; the largest that works is "
            f"{examples // micro_batches * micro_batches}"
        )
    return JobSize(
        ranks=ranks,
        micro_batch_size=batch // micro_batches,
        accumulation_steps=config.accumulation_steps,
        steps_per_epoch=examples // batch,
        epochs=config.epochs,
    )
