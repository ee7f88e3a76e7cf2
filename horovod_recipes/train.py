"""Trains a network as a config says, on every rank of a Horovod job.

horovodrun -np 2 python -m horovod_recipes.train --config=demo
    --workdir=DIR [--config.key=value ...] [--resume | --overwrite]
    [--rehearse]
"""

import json
import os
import pathlib
import re
import sys
import time
import warnings

from horovod_recipes.install_horovod import check_installed

try:
    check_installed()
except ImportError as error:
    sys.exit(f"error: {error}")

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from absl import logging

import horovod_recipes.keras as hvd
from horovod_recipes import checkpoints
from horovod_recipes import command_line
from horovod_recipes import input_pipeline
from horovod_recipes import rehearsal
from horovod_recipes import training_callbacks
from horovod_recipes.errors import SHUTDOWN_ERRORS
from horovod_recipes.errors import JobError
from horovod_recipes.errors import another_rank_stopped
from horovod_recipes.errors import raised_on_every_rank
from horovod_recipes.errors import root_cause
from horovod_recipes.job import check_config
from horovod_recipes.job import check_source
from horovod_recipes.job import is_sgd
from horovod_recipes.job import job_size
from horovod_recipes.keras.watchdog import SECONDS_TO_SAY_WHY
from horovod_recipes.keras.watchdog import is_lost_rank
from horovod_recipes.mlperf_log import MLPerfLog
from horovod_recipes.models import MODELS
from horovod_recipes.sources import load_source
from horovod_recipes.training_callbacks import StoppedBySigterm
from keras_lars import LARS
from keras_lars.callbacks import TrustRatioLogger
from keras_lars.schedules import WarmupPolynomialDecay


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
        A dict, on rank 0 the contents of `summary.json`; on the others, times
        are their own.

    Raises:
        StoppedBySigterm: On every rank, after a SIGTERM to any of them, with a
            checkpoint saved.
        JobError: On every rank, if the config, the data or `workdir` do not
            serve, if the weights are no longer finite or differ between ranks,
            if an image cannot be decoded, if a checkpoint cannot be written, or
            if a rank is lost.
    """
    with raised_on_every_rank():
        check_config(config)
    with hvd.callbacks.Watchdog(config.hang_seconds) as watchdog:
        return _train_and_evaluate(
            config, config_name, pathlib.Path(workdir), mode, watchdog
        )


def _train_and_evaluate(config, config_name, workdir, mode, watchdog):
    with raised_on_every_rank():
        source = load_source(config.dataset.name, config.dataset.data_dir)
        check_source(config, source)
        job = job_size(config, hvd.size())
        schedule = create_schedule(config, job)
        model = create_model(config, job, schedule, source)
    steps_done, measured, summary = 0, {}, None
    with raised_on_every_rank():
        if hvd.rank() == 0:
            checkpoints.prepare_workdir(workdir, config, mode)
            if mode == "resume":
                summary = checkpoints.read_summary(workdir)
            if mode == "resume" and summary is None:
                steps_done, measured = checkpoints.restore_latest(
                    workdir, model
                )
    steps_done, measured, summary = hvd.broadcast_object(
        (steps_done, measured, summary), root_rank=0
    )
    if summary is not None:
        return summary
    if steps_done:
        # Rank 0 alone has restored, and so built, its optimizer.
        model.optimizer.build(model.trainable_variables)
        hvd.broadcast_variables(
            model.weights + model.optimizer.variables, root_rank=0
        )

    throughput = training_callbacks.Throughput(job.global_batch_size)
    target = training_callbacks.TargetTop1(
        config.target_top1, config.stop_at_target, measured
    )
    corrupt_images = input_pipeline.CorruptImages(config.dataset.corrupt_images)
    evaluation = evaluation_dataset(config, job, source, corrupt_images)
    reports = []
    with raised_on_every_rank():
        if hvd.rank() == 0:
            print(settings_line(config, config_name, job, steps_done))
            mlperf_log = MLPerfLog(workdir, config, job)
            reports = [
                mlperf_log,
                *reporting_callbacks(
                    config, job, schedule, workdir, throughput
                ),
            ]
    # horovodrun sends a SIGTERM when another rank has ended; there must be time
    # to find out which.
    with training_callbacks.sigterm_noted() as asked:
        try:
            callbacks = [
                watchdog,
                hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
                hvd.callbacks.AverageNonTrainableWeights(),
                hvd.callbacks.ExactMetrics(),
                training_callbacks.RestoreMetrics(
                    measured.get("metric_sums") if hvd.rank() == 0 else None
                ),
                training_callbacks.StopOnNonFinite(),
                hvd.callbacks.ReplicaCheck(config.check_replicas_every_steps),
                throughput,
                target,
                *reports,
                training_callbacks.SaveCheckpoints(
                    workdir, config, job.steps_per_epoch, target
                ),
                training_callbacks.StopOnSigterm(
                    workdir,
                    job.steps_per_epoch,
                    steps_done,
                    target,
                    config.keep_checkpoints,
                    asked,
                ),
            ]
            top1, epochs = None, steps_done // job.steps_per_epoch
            for part in parts_of_job(job, steps_done):
                if target.is_end():
                    break
                training = training_dataset(
                    config, job, source, part, corrupt_images
                )
                top1, epochs = fit(
                    model, config, job, part, training, evaluation, callbacks
                )
            if top1 is None:
                top1 = hvd.evaluate(
                    model, evaluation, verbose=0, callbacks=[watchdog]
                )["top1"]
            skipped = hvd.allgather_object(corrupt_images.names)
        except hvd.callbacks.ReplicasDiffer as error:
            raise JobError(str(error)) from error
        except (*SHUTDOWN_ERRORS, OSError) as error:
            raise stop_reason(error) from error
    summary = {
        "config": config_name,
        "ranks": job.ranks,
        "global_batch_size": job.global_batch_size,
        "steps": epochs * job.steps_per_epoch,
        "epochs": epochs,
        "top1": round(100 * top1, 3),
        "expected_top1": config.expected_top1,
        "images_per_second": throughput.images_per_second(),
        **target.measured(),
        "corrupt_images_skipped": len(set().union(*skipped)),
        "workdir": str(workdir),
    }
    with raised_on_every_rank():
        if hvd.rank() == 0:
            mlperf_log.run_stop("epochs_to_target" in summary)
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


def create_model(config, job, schedule, source):
    """Returns the compiled network, with initial weights of this rank's own."""
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.config.set_dtype_policy(config.precision)
    # The weights of rank 0 are broadcast later.
    keras.utils.set_random_seed(config.seed + hvd.rank())
    arguments = dict(config.model)
    model = MODELS[arguments.pop("name")](
        image_shape=source.image_shape(config.dataset.image_size),
        num_classes=config.dataset.num_classes,
        **arguments,
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            LARS(schedule, **config.optimizer),
            backward_passes_per_step=job.accumulation_steps,
            average_aggregated_gradients=True,
        ),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=config.label_smoothing
        ),
        metrics=[keras.metrics.CategoricalAccuracy(name="top1")],
        # One call of Python an update.
        steps_per_execution=job.accumulation_steps,
        # Up to the allreduce. The update of LARS is compiled in any case.
        jit_compile=config.xla,
    )
    return model


def parts_of_job(job, steps_done):
    """Returns the epochs still to do, as one or two calls of `fit`.

    Keras cannot begin within an epoch: the rest of one is a call of its own.

    Returns:
        List of `(first epoch, updates of it done, epoch to end before)`.
    """
    epoch, done = divmod(steps_done, job.steps_per_epoch)
    parts = []
    if done:
        parts.append((epoch, done, epoch + 1))
        epoch += 1
    if epoch < job.epochs:
        parts.append((epoch, 0, job.epochs))
    return parts


def training_dataset(config, job, source, part, corrupt_images):
    """Returns this rank's batches of a part of the job, with one-hot labels."""
    epoch, done, _ = part
    batches = input_pipeline.training_batches(
        source,
        config.dataset,
        rank=hvd.rank(),
        ranks=job.ranks,
        batch_size=job.micro_batch_size,
        batches_per_epoch=job.steps_per_epoch * job.accumulation_steps,
        first_epoch=epoch,
        first_batch=done * job.accumulation_steps,
        seed=config.seed,
        threads=input_threads(config),
        corrupt_images=corrupt_images,
    )
    return one_hot(batches, config)


def evaluation_dataset(config, job, source, corrupt_images):
    """Returns this rank's part of the test split, with one-hot labels."""
    batches = input_pipeline.evaluation_batches(
        source,
        config.dataset,
        rank=hvd.rank(),
        ranks=job.ranks,
        batch_size=job.micro_batch_size,
        threads=input_threads(config),
        corrupt_images=corrupt_images,
    )
    return one_hot(batches, config)


def one_hot(batches, config):
    num_classes = config.dataset.num_classes
    return batches.map(
        lambda images, labels: (images, tf.one_hot(labels, num_classes))
    )


def input_threads(config):
    """Returns this rank's share of its host's cores, unless the config says."""
    cores = len(os.sched_getaffinity(0))
    return config.dataset.threads or max(1, cores // hvd.local_size())


def fit(model, config, job, part, training, evaluation, callbacks):
    """Trains a part of the job; returns top-1 and the epochs done."""
    epoch, done, end = part
    micro_batches = job.steps_per_epoch * job.accumulation_steps
    seed_dropout(
        model,
        [config.seed, hvd.rank()],
        epoch * micro_batches + done * job.accumulation_steps,
    )
    history = model.fit(
        training,
        validation_data=evaluation,
        validation_freq=evaluation_epochs(config),
        steps_per_epoch=micro_batches - done * job.accumulation_steps,
        initial_epoch=epoch,
        epochs=end,
        callbacks=callbacks,
        shuffle=False,
        verbose=1 if hvd.rank() == 0 else 0,
    )
    top1 = history.history.get("val_top1", [None])[-1]
    return top1, history.epoch[-1] + 1


def seed_dropout(model, seed, micro_batches_done):
    """Puts the model's random generators where a job of this rank would be.

    Their state is a seed and how often it was used, once a micro-batch. So a
    job that resumes draws the masks that it would have drawn.
    """
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for index, state in enumerate(states):
        words = np.random.SeedSequence([*seed, index]).generate_state(1)
        state.assign([words[0], micro_batches_done])


def settings_line(config, config_name, job, steps_done):
    """Returns what a person checks before leaving a job alone, in one line."""
    schedule = config.schedule
    return (
        f"config={config_name} ranks={job.ranks} "
        f"global_batch={job.global_batch_size} ({job.ranks} ranks x "
        f"{job.micro_batch_size} micro-batch x {job.accumulation_steps} "
        f"accumulation) steps={job.steps} ({job.epochs} epochs x "
        f"{job.steps_per_epoch}) from_step={steps_done} "
        f"schedule={schedule.warmup_epochs} epochs up to "
        f"{schedule.peak_learning_rate}, then down with power "
        f"{schedule.power} seed={config.seed}"
    )


def reporting_callbacks(config, job, schedule, workdir, throughput):
    """Returns the callbacks that write to `workdir`; for rank 0 alone."""
    callbacks = [
        training_callbacks.MetricsTable(
            workdir, job.steps_per_epoch, schedule, throughput
        ),
        keras.callbacks.TensorBoard(workdir / "tensorboard", write_graph=False),
    ]
    if not is_sgd(config):
        every = config.log_trust_ratios_every_steps
        callbacks.append(TrustRatioLogger(workdir / "trust_ratios", every))
    return callbacks


def evaluation_epochs(config):
    """Returns the epochs to evaluate after, counted from 1, the last always."""
    every = config.evaluate_every_epochs
    return sorted({*range(every, config.epochs + 1, every), config.epochs})


def stop_reason(error):
    """Returns the `JobError` that says what ended training on this rank."""
    corrupt = re.search(r"corrupt image: ([^\]\n]+)", str(error))
    if corrupt:
        return JobError(
            f"rank {hvd.rank()} met a corrupt image: {corrupt[1]}; replace it, "
            "or train without it: --config.dataset.corrupt_images=skip"
        )
    if is_lost_rank(error):
        return another_rank_stopped()
    return JobError(
        f"rank {hvd.rank()} failed: {type(error).__name__}: {root_cause(error)}"
    )


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
    # Under PYTHONUNBUFFERED a line and its end are written one by one, and
    # mpirun writes the label of the rank between them.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=False)
    hvd.init()
    try:
        with raised_on_every_rank():
            choose_gpu()
            config_name = command_line.parse(FLAGS, argv)
            if FLAGS.config.deterministic:
                # On a CPU the rounding of gradients depends on which operations
                # run beside each other. Can be set before the first one alone.
                tf.config.threading.set_inter_op_parallelism_threads(1)
            mode = run_mode()
            if FLAGS.rehearse:
                images = FLAGS.workdir.rstrip("/") + "-images"
                rehearsal.make_small(FLAGS.config, images, hvd.size())
                config_name += " --rehearse"
        with raised_on_every_rank():
            if FLAGS.rehearse and hvd.rank() == 0:
                rehearsal.write_dataset(images)
        summary = train_and_evaluate(
            FLAGS.config, config_name, FLAGS.workdir, mode
        )
    except StoppedBySigterm as stop:
        if hvd.rank() == 0:
            print(
                f"stopped by SIGTERM after step {stop.steps_done}, with a "
                "checkpoint; go on with --resume",
                flush=True,
            )
        return 0
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


def run_mode():
    """Returns the mode for `train_and_evaluate` that the flags ask for."""
    if not FLAGS.workdir:
        raise JobError("--workdir is missing: the folder for the results")
    if FLAGS.resume and FLAGS.overwrite:
        raise JobError("--resume and --overwrite exclude each other")
    if FLAGS.resume:
        return "resume"
    return "overwrite" if FLAGS.overwrite else "new"


FLAGS = flags.FlagValues()
command_line.define_config(FLAGS)
flags.DEFINE_string("workdir", None, "The folder for the results.", FLAGS)
flags.DEFINE_bool("resume", False, "Go on with the run in workdir.", FLAGS)
flags.DEFINE_bool("overwrite", False, "Delete the run in workdir.", FLAGS)
flags.DEFINE_bool(
    "rehearse",
    False,
    "Run a few small updates of the config on generated images.",
    FLAGS,
)

if __name__ == "__main__":
    sys.exit(main(sys.argv))
