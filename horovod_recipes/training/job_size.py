"""Computes the size of a job: its batches and its number of updates."""

import dataclasses
import math

from horovod_recipes.errors import JobError

# A job of more updates has a mistake in its config.
MOST_STEPS = 20_000_000


@dataclasses.dataclass(frozen=True)
class JobSize:
    """The parts of the global batch, and the number of updates.

    Attributes:
        ranks: Integer, the number of ranks.
        micro_batch_size: Integer, the images in one forward pass of one rank.
        accumulation_steps: Integer, the micro-batches of one rank per update.
        steps_per_epoch: Integer, the updates per epoch.
        epochs: Integer, the number of epochs.
    """

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

    @property
    def micro_batches_per_epoch(self):
        """The number of micro-batches of one rank in an epoch."""
        return self.steps_per_epoch * self.accumulation_steps


def job_size(config, ranks):
    """Returns the `JobSize` of a config on a number of ranks.

    It splits a rank's share of the global batch into equal micro-batches. Their
    number is the smallest that `config.max_micro_batch_size` allows.

    Raises:
        JobError: If the global batch is not divisible by the ranks, if the
            dataset is too small for the ranks or the batch, if a micro-batch
            is too small for SimCLR, or if the job has too many updates.
    """
    _check_ranks(config, ranks)
    share = config.global_batch_size // ranks
    micro_batch_size = max(
        n for n in _divisors(share) if n <= config.max_micro_batch_size
    )
    if config.task == "simclr" and micro_batch_size < 2:
        raise JobError(
            "task=simclr needs 2 images or more in a micro-batch, for batch "
            "norm; use fewer ranks, a larger global_batch_size or a larger "
            "max_micro_batch_size"
        )
    size = JobSize(
        ranks=ranks,
        micro_batch_size=micro_batch_size,
        accumulation_steps=share // micro_batch_size,
        steps_per_epoch=(
            config.dataset.train_examples // config.global_batch_size
        ),
        epochs=config.epochs,
    )
    if size.steps > MOST_STEPS:
        raise JobError(
            f"{size.epochs:,} epochs of {size.steps_per_epoch:,} updates are "
            f"more than {MOST_STEPS:,} updates; use fewer epochs, or a larger "
            "global_batch_size"
        )
    return size


def _divisors(number):
    """Returns the divisors of a number."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return [*small, *(number // n for n in small)]


def _check_ranks(config, ranks):
    dataset, batch = config.dataset, config.global_batch_size
    for split in ("train", "test"):
        examples = dataset[f"{split}_examples"]
        if ranks > examples:
            raise JobError(
                f"{ranks} ranks are more than the {examples} examples of "
                f"{dataset.name}'s {split} split; use at most {examples} ranks"
            )
    if batch % ranks:
        below = batch // ranks * ranks
        candidates = [n for n in (below, below + ranks) if n > 0]
        nearest = min(candidates, key=lambda n: abs(n - batch))
        raise JobError(
            f"global_batch_size {batch} is not divisible by {ranks} ranks; the "
            f"nearest divisible size is {nearest}"
        )
    if batch > dataset.train_examples:
        raise JobError(
            f"global_batch_size {batch} is more than the "
            f"{dataset.train_examples} training examples of {dataset.name}; "
            "the largest that works is "
            f"{dataset.train_examples // ranks * ranks}"
        )
