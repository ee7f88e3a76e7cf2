"""TFDS builders of this project; importing it registers them with TFDS."""

from horovod_recipes.data.datasets.mnist5k import Mnist5k

__all__ = ["Mnist5k"]
