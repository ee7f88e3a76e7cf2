"""A training job from its config to its summary: prepare, run, summarise."""

import dataclasses
import pathlib
import warnings

import keras
import numpy as np
from ml_collections import ConfigDict

import horovod_recipes.keras as hvd
from horovod_recipes.configs._check import check_config
from horovod_recipes.configs._check import check_source
from horovod_recipes.data.pipeline import CorruptImages
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import callbacks as job_callbacks
from horovod_recipes.training import logs
from horovod_recipes.training import process
from horovod_recipes.training import workdir as run_folder
from horovod_recipes.training.build import create_network
from horovod_recipes.training.build import create_optimizer
from horovod_recipes.training.build import create_schedule
from horovod_recipes.training.failures import explained
from horovod_recipes.training.failures import raised_on_every_rank
from horovod_recipes.training.job_size import JobSize
from horovod_recipes.training.job_size import job_size
from horovod_recipes.training.tasks import Classification
from horovod_recipes.training.tasks import find_task
from keras_lars.callbacks import TrustRatioLogger
from keras_lars.schedules import WarmupPolynomialDecay


def train_and_evaluate(config, config_name, workdir, mode="new", callbacks=()):
    """Trains, evaluates, and writes all results to `workdir`.

    Every rank calls it, after `hvd.init()`.

    Args:
        config: A `ConfigDict`, as those in `horovod_recipes.configs`.
        config_name: String, the name to report.
        workdir: String or path, the folder for all that is written.
        mode: `"new"`, where `workdir` must not hold a run; `"resume"`, to
            continue from its latest checkpoint, or to return the summary of a
            run that is finished; `"overwrite"`, to delete the run first.
        callbacks: Keras callbacks of your own. They see the metrics of all
            ranks, and act before the job checks weights and saves.

    Returns:
        A dict, on rank 0 the contents of `summary.json`. Times on the other
        ranks are their own.

    Raises:
        StoppedBySigterm: On every rank, after a SIGTERM to any of them, with a
            checkpoint saved.
        JobError: On every rank, if the config, the data or `workdir` do not
            fit; if weights are no longer finite or differ between ranks; if an
            image cannot be decoded or a checkpoint cannot be written; or if a
            rank is lost.
    """
    with raised_on_every_rank():
        check_config(config)
    with hvd.callbacks.Watchdog(config.hang_seconds) as watchdog:
        job = prepare(config, config_name, pathlib.Path(workdir))
        finished = restore(job, mode)
        if finished is not None:
            return finished
        top1, epochs = run(job, watchdog, callbacks)
        return summarise(job, top1, epochs)


@dataclasses.dataclass
class Job:
    """A job that is ready to run; its parts, in the order they are made."""

    config: ConfigDict
    name: str
    workdir: pathlib.Path
    size: JobSize
    schedule: WarmupPolynomialDecay
    model: keras.Model
    task: Classification
    corrupt_images: CorruptImages
    throughput: job_callbacks.Throughput
    target: job_callbacks.TargetTop1 = None
    mlperf_log: logs.MLPerfLog = None
    # Updates that an earlier session has done, and what it had measured.
    steps_done: int = 0
    measured: dict = dataclasses.field(default_factory=dict)


def prepare(config, name, workdir):
    """Returns the `Job`, built but for what `workdir` holds."""
    with raised_on_every_rank():
        source = load_source(config.dataset.name, config.dataset.data_dir)
        check_source(config, source)
        size = job_size(config, hvd.size())
        schedule = create_schedule(config, size)
        corrupt_images = CorruptImages(config.dataset.corrupt_images)
        task = find_task(config)(config, size, source, corrupt_images)
        process.set_seeds(config)
        model = create_network(
            config, source.image_shape(config.dataset.image_size)
        )
        compile_model(model, config, size, schedule, task)
    return Job(
        config=config,
        name=name,
        workdir=workdir,
        size=size,
        schedule=schedule,
        model=model,
        task=task,
        corrupt_images=corrupt_images,
        throughput=job_callbacks.Throughput(size.global_batch_size),
    )


def compile_model(model, config, size, schedule, task):
    """Compiles a network to train on all ranks, one call of Python an update.

    Args:
        model: The network.
        config: The recipe's `ConfigDict`.
        size: The `JobSize`.
        schedule: The learning-rate schedule.
        task: The task, from `tasks.TASKS`.
    """
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            create_optimizer(config, schedule),
            backward_passes_per_step=size.accumulation_steps,
            average_aggregated_gradients=True,
        ),
        loss=task.loss(),
        metrics=task.metrics(),
        steps_per_execution=size.accumulation_steps,
        # XLA stops before the allreduce. LARS compiles its update in any case.
        jit_compile=config.xla,
    )


def restore(job, mode):
    """Prepares the work folder, and loads what it holds of an earlier session.

    Returns:
        The summary of a run that is finished, else None.
    """
    summary = None
    with raised_on_every_rank():
        if hvd.rank() == 0:
            run_folder.prepare_workdir(job.workdir, job.config, mode)
            if mode == "resume":
                summary = run_folder.read_summary(job.workdir)
            if mode == "resume" and summary is None:
                job.steps_done, job.measured = run_folder.restore_latest(
                    job.workdir, job.model
                )
    job.steps_done, job.measured, summary = hvd.broadcast_object(
        (job.steps_done, job.measured, summary), root_rank=0
    )
    if job.steps_done and summary is None:
        # Rank 0 alone has restored, and so built, its optimizer.
        optimizer = job.model.optimizer
        optimizer.build(job.model.trainable_variables)
        hvd.broadcast_variables(
            job.model.weights + optimizer.variables, root_rank=0
        )
    return summary


def run(job, watchdog, callbacks):
    """Trains what is left of the job.

    Returns:
        Top-1 from 0 to 1, and the epochs done, this session's and others'.
    """
    job.target = job_callbacks.TargetTop1(
        job.config.target_top1, job.config.stop_at_target, job.measured
    )
    reports = []
    with raised_on_every_rank():
        if hvd.rank() == 0:
            print(settings_line(job))
            reports = report_callbacks(job)
    # horovodrun sends a SIGTERM when another rank has ended. Noting it leaves
    # the time to find out which one.
    with job_callbacks.sigterm_noted() as sigterm, explained():
        all_callbacks = [
            watchdog,
            hvd.callbacks.BroadcastGlobalVariablesCallback(root_rank=0),
            hvd.callbacks.AverageNonTrainableWeights(),
            hvd.callbacks.ExactMetrics(),
            job_callbacks.RestoreMetrics(
                job.measured.get("metric_sums") if hvd.rank() == 0 else None
            ),
            *callbacks,
            job_callbacks.StopOnNonFinite(),
            hvd.callbacks.ReplicaCheck(job.config.check_replicas_every_steps),
            job.throughput,
            job.target,
            *reports,
            job_callbacks.SaveCheckpoints(job),
            job_callbacks.StopOnSigterm(job, sigterm),
        ]
        return fit_parts(job, watchdog, all_callbacks)


def report_callbacks(job):
    """Returns the callbacks that write to the work folder, for rank 0 alone."""
    job.mlperf_log = logs.MLPerfLog(job.workdir, job.config, job.size)
    reports = [
        job.mlperf_log,
        logs.MetricsTable(
            job.workdir, job.size.steps_per_epoch, job.schedule, job.throughput
        ),
        logs.tensorboard(job.workdir),
    ]
    if job.config.optimizer_name == "lars":
        every = job.config.log_trust_ratios_every_steps
        reports.append(TrustRatioLogger(job.workdir / "trust_ratios", every))
    return reports


def settings_line(job):
    """Returns what a person checks before leaving a job alone, in one line."""
    size, schedule = job.size, job.config.schedule
    return (
        f"config={job.name} ranks={size.ranks} "
        f"global_batch={size.global_batch_size} ({size.ranks} ranks x "
        f"{size.micro_batch_size} micro-batch x {size.accumulation_steps} "
        f"accumulation) steps={size.steps} ({size.epochs} epochs x "
        f"{size.steps_per_epoch}) from_step={job.steps_done} "
        f"schedule={schedule.warmup_epochs} epochs up to "
        f"{schedule.peak_learning_rate}, then down with power "
        f"{schedule.power} seed={job.config.seed}"
    )


def fit_parts(job, watchdog, callbacks):
    """Calls `fit` for each part of the job; returns what `run` does."""
    evaluation = job.task.evaluation_dataset()
    top1, epochs = None, job.steps_done // job.size.steps_per_epoch
    for part in parts_of_job(job.size, job.steps_done):
        if job.target.is_end():
            break
        top1, epochs = fit(job, part, evaluation, callbacks)
    if top1 is None:
        results = hvd.evaluate(
            job.model, evaluation, verbose=0, callbacks=[watchdog]
        )
        top1 = results["top1"]
    return top1, epochs


def parts_of_job(size, steps_done):
    """Returns the epochs still to do, as one or two calls of `fit`.

    Keras cannot begin within an epoch: the rest of one is a call of its own.

    Args:
        size: The `JobSize`.
        steps_done: Integer, in updates.

    Returns:
        List of `(first epoch, updates of it done, epoch to end before)`.
    """
    epoch, done = divmod(steps_done, size.steps_per_epoch)
    parts = []
    if done:
        parts.append((epoch, done, epoch + 1))
        epoch += 1
    if epoch < size.epochs:
        parts.append((epoch, 0, size.epochs))
    return parts


def fit(job, part, evaluation, callbacks):
    """Trains a part of the job; returns top-1 and the epochs done."""
    epoch, updates_done, end = part
    size = job.size
    micro_batches_done = updates_done * size.accumulation_steps
    seed_dropout(
        job.model,
        [job.config.seed, hvd.rank()],
        epoch * size.micro_batches_per_epoch + micro_batches_done,
    )
    with warnings.catch_warnings():
        # Keras prints this for every dataset whose length is unknown.
        warnings.filterwarnings("ignore", "Your input ran out of data")
        history = job.model.fit(
            job.task.training_dataset(epoch, updates_done),
            validation_data=evaluation,
            validation_freq=evaluation_epochs(job.config),
            steps_per_epoch=size.micro_batches_per_epoch - micro_batches_done,
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

    Their state is a seed and a count of micro-batches. A job that resumes draws
    the masks that it would have drawn.
    """
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for index, state in enumerate(states):
        words = np.random.SeedSequence([*seed, index]).generate_state(1)
        state.assign([words[0], micro_batches_done])


def evaluation_epochs(config):
    """Returns the epochs to evaluate after, counted from 1, the last always."""
    every = config.evaluate_every_epochs
    return sorted({*range(every, config.epochs + 1, every), config.epochs})


def summarise(job, top1, epochs):
    """Writes the results on rank 0; returns them, as a dict."""
    with explained():
        skipped = hvd.allgather_object(job.corrupt_images.names)
    summary = {
        "config": job.name,
        "ranks": job.size.ranks,
        "global_batch_size": job.size.global_batch_size,
        "steps": epochs * job.size.steps_per_epoch,
        "epochs": epochs,
        "top1": round(100 * top1, 3),
        "expected_top1": job.config.expected_top1,
        "images_per_second": job.throughput.images_per_second(),
        **job.target.measured(),
        "corrupt_images_skipped": len(set().union(*skipped)),
        "workdir": str(job.workdir),
    }
    with raised_on_every_rank():
        if hvd.rank() == 0:
            job.mlperf_log.run_stop("epochs_to_target" in summary)
            run_folder.write_summary(job.workdir, summary)
    return summary
