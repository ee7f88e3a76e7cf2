"""The networks that the configs train."""

from horovod_recipes.models.alexnet import alexnet
from horovod_recipes.models.resnet import resnet50
from horovod_recipes.models.resnet18 import resnet18
from horovod_recipes.models.small_cnn import small_cnn

MODELS = {
    "alexnet": alexnet,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "small_cnn": small_cnn,
}
