"""TFDS builders of this project. Importing this module registers them."""

from horovod_recipes.data.datasets.mnist5k import Mnist5k

__all__ = ["Mnist5k"]
