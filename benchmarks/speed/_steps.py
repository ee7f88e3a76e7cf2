"""One training step of ResNet-50, by this project or by a peer.

    python benchmarks/speed/_steps.py NAME VERSION SIZE MICRO_BATCH THREADS

`training_step` runs it in the environment of the peer. Each line of standard
input asks for a step. The answer is a line with its seconds.
"""

import importlib
import os
import sys
import time

# TensorFlow leaves oneDNN off on some processors; docs/performance.md has more.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")


def this_project(version, size, micro_batch, optimizer="SGD"):
    import keras

    import keras_lars
    from horovod_recipes.models import MODELS
    from keras_lars import _xla_flags

    # As a job does.
    _xla_flags.allow_two_outputs()
    model = MODELS["resnet50"]((size, size, 3), 1000, version=version)
    rates = {"learning_rate": 0.01, "momentum": 0.9}
    if optimizer == "LARS":
        model.compile(keras_lars.LARS(**rates), loss=_loss(keras))
    else:
        model.compile(keras.optimizers.SGD(**rates), loss=_loss(keras))
    return _step_of_keras(model, micro_batch)


def this_project_lars(*arguments):
    return this_project(*arguments, optimizer="LARS")


def this_project_unfused(*arguments):
    """As `this_project`, with the batch norm of Keras."""
    import keras

    from horovod_recipes.models import batch_norm

    batch_norm.FusedBatchNormalization = keras.layers.BatchNormalization
    return this_project(*arguments)


def tf_keras(version, size, micro_batch):
    import tf_keras

    if version != "v1":
        raise ValueError("tf_keras has ResNet-50 v1 alone")
    model = tf_keras.applications.ResNet50(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    sgd = tf_keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(sgd, loss=_loss(tf_keras))
    return _step_of_keras(model, micro_batch)


def _loss(keras):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _step_of_keras(model, micro_batch):
    """Returns a function that takes a step as `fit` does."""
    import tensorflow as tf

    shape = [micro_batch, *model.input_shape[1:]]
    images = tf.random.uniform(shape, 0, 256, tf.int32)
    labels = tf.random.uniform([micro_batch], 0, 1000, tf.int32)
    batch = tf.cast(images, model.inputs[0].dtype), labels
    batches = iter(tf.data.Dataset.from_tensors(batch).repeat())
    function = model.make_train_function() or model.train_function
    return lambda: function(batches)


def pytorch(version, size, micro_batch):
    import torch

    if version != "v1.5":
        raise ValueError("the ResNet-50 in PyTorch is v1.5")
    model = _resnet50_in_pytorch().to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    images = torch.randn(micro_batch, 3, size, size)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, [micro_batch])

    def step():
        sgd.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        sgd.step()

    return step


def _resnet50_in_pytorch():
    """Returns the network of torchvision, which is v1.5."""
    from torch import nn

    def convolution(inputs, outputs, size, stride=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False),
            nn.BatchNorm2d(outputs),
        )

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            relu, outputs = nn.ReLU(inplace=True), 4 * width
            self.main = nn.Sequential(
                convolution(inputs, width, 1),
                relu,
                convolution(width, width, 3, stride),
                relu,
                convolution(width, outputs, 1),
            )
            self.shortcut = nn.Identity()
            if stride > 1 or inputs != outputs:
                self.shortcut = convolution(inputs, outputs, 1, stride)
            self.relu = relu

        def forward(self, x):
            return self.relu(self.main(x) + self.shortcut(x))

    blocks, channels = [], 64
    for stage, count in enumerate([3, 4, 6, 3]):
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(Block(channels, 64 * 2**stage, stride))
            channels = 4 * 64 * 2**stage
    return nn.Sequential(
        convolution(3, 64, 7, stride=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 1000),
    )


STEPS = (
    this_project,
    this_project_lars,
    this_project_unfused,
    tf_keras,
    pytorch,
)


def set_threads(library, threads):
    library = importlib.import_module(library)
    if library.__name__ == "torch":
        library.set_num_threads(threads)
        return
    library.config.threading.set_intra_op_parallelism_threads(threads)
    library.config.threading.set_inter_op_parallelism_threads(threads)


def main():
    name, version, *numbers = sys.argv[1:]
    size, micro_batch, threads = map(int, numbers)
    set_threads("torch" if name == "pytorch" else "tensorflow", threads)
    create = {function.__name__: function for function in STEPS}[name]
    step = create(version, size, micro_batch)
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
