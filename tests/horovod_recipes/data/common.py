"""The `RankInput` that the tests of this room use."""

from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.pipeline import RankInput


def rank_input(rank=0, ranks=1, batch_size=500, corrupt_images=None):
    """Returns a `RankInput` that stops at corrupt images by default."""
    return RankInput(
        rank=rank,
        ranks=ranks,
        batch_size=batch_size,
        threads=2,
        corrupt_images=corrupt_images or CorruptImages("stop"),
    )
