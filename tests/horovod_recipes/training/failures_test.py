"""Errors of an input pipeline, and the line that a job makes of them."""

import pytest
import tensorflow as tf

import horovod_recipes.keras as hvd
from horovod_recipes.data.named_errors import error_if_any
from horovod_recipes.data.pipeline import CORRUPT_IMAGE
from horovod_recipes.data.sources import DAMAGED_SHARD
from horovod_recipes.errors import JobError
from horovod_recipes.training.failures import explained

SPEC = {"image": tf.io.FixedLenFeature([], tf.string)}


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    hvd.init()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (DAMAGED_SHARD, "rank 0 cannot read all of the shard a b: it is dam"),
        (CORRUPT_IMAGE, "rank 0 found a corrupt image: a b; replace it, or"),
    ],
)
def test_file_is_named(message, line):
    def fail(name):
        with tf.control_dependencies([error_if_any(message, name[None])]):
            return tf.identity(name)

    with pytest.raises(JobError, match=f"^{line}"), explained():
        list(tf.data.Dataset.from_tensors("a b").map(fail))


@pytest.mark.parametrize("record", [b"\xff\n\xfe", b"\n", b"text"])
def test_record_that_is_no_example(record):
    """TensorFlow puts its bytes into the message, which may be no text."""
    records = tf.data.Dataset.from_tensors([record])
    examples = records.map(lambda record: tf.io.parse_example(record, SPEC))
    match = "^rank 0 read a record .* no example of TensorFlow; prepare the"
    with pytest.raises(JobError, match=match), explained():
        list(examples)


def test_other_text_that_cannot_be_decoded_is_not_hidden():
    with pytest.raises(UnicodeDecodeError), explained():
        b"\xff".decode()
