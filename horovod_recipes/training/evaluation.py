"""Evaluates a trained encoder: a linear classifier and nearest neighbours.

The linear classifier follows Chen et al., arXiv 2002.05709, appendix B.6. It
trains for 90 epochs by SGD with Nesterov's momentum of 0.9, without weight
decay, with random crops and flips. The rate is 0.1 per 256 images, and falls
along a cosine. The neighbours' settings are those of Wu et al., arXiv
1805.01978, section 3.4.

A network trained with labels is evaluated in the same way, for comparison.
"""

import json
import warnings

import keras
from ml_collections import ConfigDict

import horovod_recipes.keras as hvd
from horovod_recipes.configs._check import check_config
from horovod_recipes.configs._check import check_source
from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.pipeline import check_service
from horovod_recipes.data.sources import load_source
from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.models.heads import encoder_of
from horovod_recipes.training import checkpoints
from horovod_recipes.training import fixed_features
from horovod_recipes.training import neighbours
from horovod_recipes.training import process
from horovod_recipes.training import workdir as run_folder
from horovod_recipes.training.build import create_network
from horovod_recipes.training.failures import explained
from horovod_recipes.training.failures import raised_on_every_rank
from horovod_recipes.training.job_size import job_size
from horovod_recipes.training.tasks import Classification
from keras_lars._files import written_atomically
from keras_lars.schedules import WarmupCosineDecay
from keras_lars.schedules import scale_learning_rate

RATE_PER_256_IMAGES = 0.1
MOMENTUM = 0.9
# By the augmentation of the views: crops and flips, without distortions.
AUGMENTATION_OF_CLASSIFIER = {
    "simclr": "inception",
    "simclr_small": "inception_small",
    "simclr_grey": "large_crop",
    # A mirrored digit is not a digit.
    "simclr_digits": "random_affine",
}


def evaluate_workdir(workdir, linear_epochs, with_random_weights=False):
    """Evaluates the encoder of a finished run on the test split, exactly.

    Call it on every rank, after `hvd.init()`. It writes `evaluation.json` and
    `neighbours.png` to `workdir`.

    Args:
        workdir: `pathlib.Path`, the work folder of the run.
        linear_epochs: Integer >= 1, the epochs of the linear classifier, or
            None for `fixed_features`.
        with_random_weights: Whether to evaluate the same network with new
            random weights too. Defaults to `False`.

    Returns:
        A dict, the contents of `evaluation.json`, the same on every rank.

    Raises:
        JobError: On every rank, if `workdir` has no encoder, if the dataset is
            not on disk, or if a rank is lost.
    """
    with raised_on_every_rank():
        config = read_job(workdir)
        encoder = load_encoder(config, workdir)
        source = load_source(
            config.dataset.name,
            config.dataset.data_dir,
            [config.dataset.train_split, config.dataset.test_split],
        )
        check_source(config, source)
        if config.dataset.service:
            check_service(config.dataset.service)
    corrupt_images = CorruptImages(config.dataset.corrupt_images)
    with hvd.callbacks.Watchdog(config.hang_seconds) as watchdog, explained():
        inputs = config, source, corrupt_images, watchdog
        process.set_seeds(config)
        results, nearest = evaluate(encoder, linear_epochs, *inputs)
        picture = neighbours.images_of(nearest, *inputs)
        if with_random_weights:
            process.set_seeds(config)
            encoder = random_encoder(config, source)
            random, _ = evaluate(encoder, linear_epochs, *inputs)
            results |= {f"random_{name}": v for name, v in random.items()}
    results = {
        "fixed_features": linear_epochs is None,
        "linear_epochs": linear_epochs,
        "neighbours": neighbours.NEIGHBOURS,
        "ranks": hvd.size(),
        **results,
    }
    with raised_on_every_rank():
        if hvd.rank() == 0:
            with written_atomically(workdir / "evaluation.json") as part:
                part.write_text(json.dumps(results) + "\n")
            with written_atomically(workdir / "neighbours.png") as part:
                neighbours.draw(picture, part)
    return results


def read_job(workdir):
    """Returns the config of the run in `workdir`."""
    saved = run_folder.read_config(workdir)
    if saved is None:
        raise JobError(
            f"no run in {workdir}: it has no config.json of a run; train one: "
            "python -m horovod_recipes.train --config=simclr:... --workdir=..."
        )
    try:
        config = ConfigDict(saved)
        check_config(config)
    except (JobError, ValueError) as error:
        # ConfigDict refuses some keys.
        raise JobError(
            f"{workdir / 'config.json'} is damaged, or of another version: "
            f"{one_line(error)}"
        ) from None
    return config


def load_encoder(config, workdir):
    """Returns the encoder of a finished run.

    A run with labels has not saved it alone, so it is a part of the network.
    """
    if run_folder.read_summary(workdir) is None:
        raise JobError(
            f"no encoder in {workdir}: the run is not finished; continue it "
            "with horovod_recipes.train --resume"
        )
    path = workdir / "encoder.keras"
    if config.task != "simclr":
        steps = checkpoints.saved_steps(workdir)
        path = steps[max(steps)] if steps else workdir / "checkpoints"
    try:
        model = keras.saving.load_model(path)
        return model if config.task == "simclr" else encoder_of(model)
    except Exception as error:  # A broken file can raise any error.
        raise JobError(
            f"cannot load {path} ({one_line(error)}); restore it, or train "
            "again with --overwrite"
        ) from error


def random_encoder(config, source):
    """Returns the run's encoder with random weights, equal on all ranks."""
    shape = source.image_shape(config.dataset.image_size)
    encoder = encoder_of(create_network(config, shape))
    hvd.broadcast_variables(encoder.weights, root_rank=0)
    return encoder


def evaluate(encoder, epochs, config, source, corrupt_images, watchdog):
    """Returns the top-1 in percent of both methods, and the neighbours."""
    # No gradient, and batch norm uses its moving statistics.
    encoder.trainable = False
    inputs = source, corrupt_images, watchdog
    features = neighbours.features_of_splits(encoder, config, *inputs)
    if epochs is None:
        linear = fixed_features.linear_top1(
            *features, config.dataset.num_classes, watchdog
        )
    else:
        classifier = config_of_classifier(config, epochs)
        linear = linear_top1(encoder, classifier, *inputs)
    nearest = neighbours.find(*features, config, *inputs)
    results = {
        "linear_top1": round(100 * linear, 3),
        "knn_top1": round(100 * nearest.top1, 3),
    }
    return results, nearest


def config_of_classifier(config, epochs):
    """Returns the config, with the images of a classifier: not distorted."""
    config = ConfigDict(config.to_dict())
    config.task = "classification"
    config.epochs = epochs
    config.label_smoothing = 0.0
    augmentation = config.dataset.augmentation
    config.dataset.augmentation = AUGMENTATION_OF_CLASSIFIER.get(
        augmentation, augmentation
    )
    return config


def linear_top1(encoder, config, source, corrupt_images, watchdog):
    """Trains a linear classifier on all ranks; returns its top-1, 0 to 1."""
    with raised_on_every_rank():
        size = job_size(config, hvd.size())
        task = Classification(config, size, source, corrupt_images)
    rate = scale_learning_rate(
        RATE_PER_256_IMAGES, size.global_batch_size, base_batch_size=256
    )
    optimizer = keras.optimizers.SGD(
        WarmupCosineDecay(rate, total_steps=size.steps),
        momentum=MOMENTUM,
        nesterov=True,
    )
    inputs = keras.Input(encoder.input_shape[1:], dtype="uint8")
    logits = keras.layers.Dense(config.dataset.num_classes, dtype="float32")
    model = keras.Model(inputs, logits(encoder(inputs, training=False)))
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            optimizer,
            backward_passes_per_step=size.accumulation_steps,
            average_aggregated_gradients=True,
        ),
        loss=task.loss(),
        metrics=task.metrics(),
        steps_per_execution=size.accumulation_steps,
        jit_compile=False,
    )
    model.fit(
        task.training_dataset(first_epoch=0, updates_done=0),
        steps_per_epoch=size.micro_batches_per_epoch,
        epochs=config.epochs,
        shuffle=False,
        verbose=0,
        callbacks=[
            watchdog,
            hvd.callbacks.BroadcastGlobalVariablesCallback(0),
            hvd.callbacks.ExactMetrics(),
        ],
    )
    with warnings.catch_warnings():
        # Keras prints this for every dataset whose length is unknown.
        warnings.filterwarnings("ignore", "Your input ran out of data")
        results = hvd.evaluate(
            model, task.evaluation_dataset(), verbose=0, callbacks=[watchdog]
        )
    return results["top1"]
