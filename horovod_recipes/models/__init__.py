"""The networks that the configs train."""

from horovod_recipes.models.alexnet import alexnet
from horovod_recipes.models.resnet import resnet50
from horovod_recipes.models.small_cnn import small_cnn

MODELS = {"alexnet": alexnet, "resnet50": resnet50, "small_cnn": small_cnn}
