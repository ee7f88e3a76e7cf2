"""Trains a network as a config says, on every rank of a Horovod job.

horovodrun -np 2 python -m horovod_recipes.train --config=demo
    --workdir=DIR [--config.key=value ...] [--resume | --overwrite]
"""

import json
import pathlib
import sys
import time
import warnings

from horovod_recipes.install_horovod import check_installed

try:
    check_installed()
except ImportError as error:
    sys.exit(f"error: {error}")

import keras
import tensorflow as tf
from absl import flags
from absl import logging
from ml_collections import config_flags

import horovod_recipes.keras as hvd
from horovod_recipes import checkpoints
from horovod_recipes import input_pipeline
from horovod_recipes import training_callbacks
from horovod_recipes.errors import SHUTDOWN_ERRORS
from horovod_recipes.errors import JobError
from horovod_recipes.errors import another_rank_stopped
from horovod_recipes.errors import one_line
from horovod_recipes.errors import raised_on_every_rank
from horovod_recipes.job import check_config
from horovod_recipes.job import job_size
from horovod_recipes.models import MODELS
from keras_lars import LARS
from keras_lars.callbacks import TrustRatioLogger
from keras_lars.schedules import WarmupPolynomialDecay

SECONDS_TO_SAY_WHY = 5
CONFIGS = pathlib.Path(__file__).with_name("configs")
CONFIG_CHOICES = "give the path of a file, or one of " + ", ".join(
    sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))
)


def train_and_evaluate(config, config_name, workdir, mode="new"):
    """Trains, evaluates, and writes all results to `workdir`.

    Args:
        config: A `ConfigDict`, as those in `horovod_recipes.configs`.
        config_name: String, the name to report.
        workdir: String, the folder for all that is written.
        mode: `"new"`, where `workdir` must not hold a run; `"resume"`, to go
            on from its latest checkpoint, or to return the summary of a run
            that is finished; `"overwrite"`, to delete the run first.

    Returns:
        The contents of `summary.json`, a dict, on every rank.

    Raises:
        JobError: On every rank, if the config, the data or `workdir` do not
            serve, if the weights are no longer finite, or if an image cannot
            be decoded.
    """
    begin = time.time()
    workdir = pathlib.Path(workdir)
    with raised_on_every_rank():
        check_config(config)
        builder = input_pipeline.load_builder(
            config.dataset.name, config.dataset.data_dir
        )
        job = job_size(config, builder, hvd.size())
        schedule = create_schedule(config, job)
        model = create_model(config, job, schedule, builder)
    first_epoch, summary = 0, None
    with raised_on_every_rank():
        if hvd.rank() == 0:
            checkpoints.prepare_workdir(workdir, config, mode)
            if mode == "resume":
                summary = checkpoints.read_summary(workdir)
            if mode == "resume" and summary is None:
                first_epoch = checkpoints.restore_latest(workdir, model)
    first_epoch, summary = hvd.broadcast_object((first_epoch, summary), 0)
    if summary is not None:
        return summary

    corrupt_images = input_pipeline.CorruptImages(config.dataset.corrupt_images)
    training, evaluation = create_datasets(
        config, job, builder, first_epoch, corrupt_images
    )
    throughput = training_callbacks.Throughput(job.global_batch_size)
    callbacks = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
        hvd.callbacks.AverageNonTrainableWeights(),
        hvd.callbacks.ExactMetrics(),
        training_callbacks.StopOnNonFinite(),
        throughput,
    ]
    if hvd.rank() == 0:
        print(settings_line(config, config_name, job, first_epoch), flush=True)
        callbacks += results_callbacks(
            config, job, schedule, workdir, throughput
        )
    try:
        history = model.fit(
            training,
            validation_data=evaluation,
            validation_freq=evaluation_epochs(config),
            steps_per_epoch=job.steps_per_epoch * job.accumulation_steps,
            initial_epoch=first_epoch,
            epochs=job.epochs,
            callbacks=callbacks,
            shuffle=False,
            verbose=1 if hvd.rank() == 0 else 0,
        )
        if first_epoch < job.epochs:
            top1 = history.history["val_top1"][-1]
        else:
            top1 = hvd.evaluate(model, evaluation, verbose=0)["top1"]
        skipped = hvd.allgather_object(corrupt_images.names)
    except (*SHUTDOWN_ERRORS, OSError) as error:
        raise stop_reason(error, corrupt_images) from error
    summary = {
        "config": config_name,
        "ranks": job.ranks,
        "global_batch_size": job.global_batch_size,
        "steps": job.steps,
        "epochs": job.epochs,
        "top1": round(100 * top1, 2),
        "images_per_second": throughput.images_per_second(),
        "seconds": round(time.time() - begin, 1),
        "corrupt_images_skipped": len(set().union(*skipped)),
        "workdir": str(workdir),
    }
    with raised_on_every_rank():
        if hvd.rank() == 0:
            checkpoints.write_summary(workdir, summary)
    return summary


def create_schedule(config, job):
    """Returns the learning rate as a function of the update."""
    arguments = dict(config.schedule)
    warmup_epochs = arguments.pop("warmup_epochs")
    return WarmupPolynomialDecay(
        total_steps=job.steps,
        warmup_steps=round(warmup_epochs * job.steps_per_epoch),
        **arguments,
    )


def create_model(config, job, schedule, builder):
    """Returns the compiled network, with initial weights of this rank's own."""
    # Ranks differ in their dropout masks; the weights are broadcast later.
    keras.utils.set_random_seed(config.seed + hvd.rank())
    arguments = dict(config.model)
    model = MODELS[arguments.pop("name")](
        image_shape=builder.info.features["image"].shape,
        num_classes=builder.info.features["label"].num_classes,
        **arguments,
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            LARS(schedule, **config.optimizer),
            backward_passes_per_step=job.accumulation_steps,
            average_aggregated_gradients=True,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="top1")],
        # One call of Python an update.
        steps_per_execution=job.accumulation_steps,
        # Horovod's operations cannot be inside an XLA program. The update
        # of LARS is one all the same.
        jit_compile=False,
    )
    return model


def create_datasets(config, job, builder, first_epoch, corrupt_images):
    """Returns this rank's batches for training and for evaluation."""
    training = input_pipeline.training_batches(
        builder,
        rank=hvd.rank(),
        ranks=job.ranks,
        batch_size=job.micro_batch_size,
        batches_per_epoch=job.steps_per_epoch * job.accumulation_steps,
        first_epoch=first_epoch,
        augmentation=input_pipeline.AUGMENTATIONS[config.dataset.augmentation],
        seed=config.seed,
        corrupt_images=corrupt_images,
    )
    evaluation = input_pipeline.evaluation_batches(
        builder,
        "test",
        rank=hvd.rank(),
        ranks=job.ranks,
        batch_size=job.micro_batch_size,
        corrupt_images=corrupt_images,
    )
    return training, evaluation


def settings_line(config, config_name, job, first_epoch):
    """Returns what a person checks before leaving a job alone, in one line."""
    schedule = config.schedule
    return (
        f"config={config_name} ranks={job.ranks} "
        f"global_batch={job.global_batch_size} ({job.ranks} ranks x "
        f"{job.micro_batch_size} micro-batch x {job.accumulation_steps} "
        f"accumulation) steps={job.steps} ({job.epochs} epochs x "
        f"{job.steps_per_epoch}) from_epoch={first_epoch} "
        f"schedule={schedule.warmup_epochs} epochs up to "
        f"{schedule.peak_learning_rate}, then down with power "
        f"{schedule.power} seed={config.seed}"
    )


def results_callbacks(config, job, schedule, workdir, throughput):
    """Returns the callbacks that write to `workdir`; for rank 0 alone."""
    return [
        training_callbacks.MetricsTable(
            workdir, job.steps_per_epoch, schedule, throughput
        ),
        keras.callbacks.TensorBoard(workdir / "tensorboard", write_graph=False),
        TrustRatioLogger(
            workdir / "trust_ratios", config.log_trust_ratios_every_steps
        ),
        checkpoints.SaveCheckpoints(
            workdir,
            config.checkpoint_every_epochs,
            job.epochs,
            config.keep_checkpoints,
        ),
    ]


def evaluation_epochs(config):
    """Returns the epochs to evaluate after, counted from 1, the last always."""
    every = config.evaluate_every_epochs
    return sorted({*range(every, config.epochs + 1, every), config.epochs})


def stop_reason(error, corrupt_images):
    """Returns the `JobError` that says what ended training on this rank."""
    if corrupt_images.action == "stop" and corrupt_images.names:
        return JobError(
            f"rank {hvd.rank()} met a corrupt image: "
            f"{', '.join(sorted(corrupt_images.names))}; replace it, or train "
            "without it: --config.dataset.corrupt_images=skip"
        )
    if "Horovod has been shut down" in str(error):
        return another_rank_stopped()
    return JobError(
        f"rank {hvd.rank()} failed: {type(error).__name__}: {root_cause(error)}"
    )


def root_cause(error):
    """Returns the line of a TensorFlow error that a person wants to see.

    The message of an error in a graph is a list of places in the code, then
    what happened, then marks in double brackets of the nodes it came through.
    """
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("[[")]
    return lines[-1] if lines else "no message"


def parse_flags(argv):
    """Parses the command line into `FLAGS`; returns the config's name and mode.

    Raises:
        JobError: If a flag or a key of the config is unknown or unfit.
    """
    argv = list(argv)
    if "--config" in argv[:-1]:
        index = argv.index("--config")
        argv[index : index + 2] = [f"--config={argv[index + 1]}"]
    names = [a.removeprefix("--config=") for a in argv if "--config=" in a]
    if not names:
        raise JobError(f"--config is missing: {CONFIG_CHOICES}")
    # The config comes before the changes to it, which ml_collections looks for
    # in `sys.argv`.
    argv.remove(f"--config={names[-1]}")
    argv.insert(1, config_flag(names[-1]))
    sys.argv = argv
    try:
        rest = FLAGS(argv)[1:]
    except AttributeError as error:
        # ml_collections wraps a KeyError, whose own text would be a repr.
        cause = error.args[0]
        text = cause.args[0] if isinstance(cause, KeyError) else cause
        raise JobError(f"unknown key of the config: {one_line(text)}") from None
    except flags.Error as error:
        raise JobError(root_cause(error)) from None
    except Exception as error:  # Whatever a config file may raise.
        raise JobError(
            f"cannot load --config={names[-1]}: {type(error).__name__}: "
            f"{root_cause(error)}"
        ) from None
    if rest:
        raise JobError(f"unknown argument {rest[0]!r}")
    if not FLAGS.workdir:
        raise JobError("--workdir is missing: the folder for the results")
    if FLAGS.resume and FLAGS.overwrite:
        raise JobError("--resume and --overwrite exclude each other")
    if FLAGS.resume:
        return names[-1], "resume"
    return names[-1], "overwrite" if FLAGS.overwrite else "new"


def config_flag(name):
    """Returns `--config=` with the path of the config, packaged or not."""
    stem, colon, variant = name.partition(":")
    for path in (CONFIGS / f"{stem}.py", pathlib.Path(stem)):
        if path.is_file():
            return f"--config={path}{colon}{variant}"
    raise JobError(f"unknown config {stem!r}: {CONFIG_CHOICES}")


def choose_gpu():
    """Gives this rank the GPU of its local rank, where the host has GPUs."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return
    if len(gpus) < hvd.local_size():
        raise JobError(
            f"{hvd.local_size()} ranks are more than the {len(gpus)} GPUs of "
            "their host; start one rank a GPU, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES=-1"
        )
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def main(argv):
    """Runs a job from its command line; returns the exit status."""
    if "--help" in argv:
        print(__doc__, FLAGS, sep="")
        return 0
    # Keras says so of every dataset whose length is not known beforehand.
    warnings.filterwarnings("ignore", "Your input ran out of data")
    tf.get_logger().setLevel("ERROR")
    logging.set_verbosity(logging.ERROR)
    hvd.init()
    try:
        with raised_on_every_rank():
            choose_gpu()
            config_name, mode = parse_flags(argv)
        summary = train_and_evaluate(
            FLAGS.config, config_name, FLAGS.workdir, mode
        )
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # horovodrun kills the other ranks when the first one exits. This tells
        # them to stop, and leaves them time to say so.
        hvd.shutdown()
        time.sleep(SECONDS_TO_SAY_WHY)
        return 1
    if hvd.rank() == 0:
        print(json.dumps(summary), flush=True)
    return 0


FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file(
    "config",
    None,
    f"What to train: {CONFIG_CHOICES}. Any key of it can be changed: "
    "--config.epochs=10, --config.schedule.power=1.0 and so on.",
    flag_values=FLAGS,
)
flags.DEFINE_string("workdir", None, "The folder for the results.", FLAGS)
flags.DEFINE_bool("resume", False, "Go on with the run in workdir.", FLAGS)
flags.DEFINE_bool("overwrite", False, "Delete the run in workdir.", FLAGS)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
