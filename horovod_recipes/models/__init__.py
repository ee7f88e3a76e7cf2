"""The networks that the configs train."""

from horovod_recipes.models.small_cnn import small_cnn

MODELS = {"small_cnn": small_cnn}
