"""Runs a training job from config to summary: prepare, run, summarise."""

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
from horovod_recipes.data.pipeline import check_service
from horovod_recipes.data.sources import load_source
from horovod_recipes.training import callbacks as job_callbacks
from horovod_recipes.training import checkpoints
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


def train_and_evaluate(config, config_name, workdir, mode="new", callbacks=()):
    """Trains, evaluates, and writes all results to `workdir`.

    Call it on every rank, after `hvd.init()`.

    Args:
        config: A `ConfigDict` like those in `horovod_recipes.configs`.
        config_name: String, the name of the config in reports.
        workdir: String or path, the folder for all results.
        mode: `"new"`, `"resume"` or `"overwrite"`. With `"new"`, `workdir` must
            not hold a run. `"resume"` continues from the latest checkpoint;
            for a finished run it returns the summary. `"overwrite"` deletes
            the run in `workdir` first.
        callbacks: Your own Keras callbacks. They see the metrics of all ranks.
            They run before the job checks the weights and saves. They may set
            `model.stop_training` at the end of an epoch, on all ranks.

    Returns:
        A dict. On rank 0 it is the contents of `summary.json`. The other ranks
        report their own times.

    Raises:
        StoppedBySigterm: On every rank, after a SIGTERM to any of them. The job
            has then saved a checkpoint, unless it has done no step.
        JobError: On every rank, if the config, the dataset or `workdir` is not
            valid; if weights are not finite or differ between ranks; if an
            image cannot be decoded or a checkpoint cannot be written; or if a
            rank is lost.
    """
    with raised_on_every_rank():
        check_config(config)
    with hvd.callbacks.Watchdog(config.hang_seconds) as watchdog:
        job = prepare(config, config_name, pathlib.Path(workdir))
        try:
            finished = restore(job, mode)
            if finished is not None:
                return finished
            top1, epochs, skipped = run(job, watchdog, callbacks)
            return summarise(job, top1, epochs, skipped)
        finally:
            if job.lock:
                job.lock.release()


@dataclasses.dataclass
class Job:
    """The parts of a job, in the order in which they are made."""

    config: ConfigDict
    name: str
    workdir: pathlib.Path
    size: JobSize
    schedule: keras.optimizers.schedules.LearningRateSchedule
    model: keras.Model
    task: Classification
    corrupt_images: CorruptImages
    throughput: job_callbacks.Throughput
    # On rank 0.
    lock: run_folder.Lock = None
    target: job_callbacks.TargetTop1 = None
    mlperf_log: logs.MLPerfLog = None
    checkpoint_seconds: float = 0.0
    # Updates that earlier sessions have done.
    steps_done: int = 0
    # Measurements that earlier sessions saved.
    measured: dict = dataclasses.field(default_factory=dict)


def prepare(config, name, workdir):
    """Returns the new `Job`, before `restore` reads its work folder."""
    with raised_on_every_rank():
        dataset = config.dataset
        source = load_source(
            dataset.name,
            dataset.data_dir,
            [dataset.train_split, dataset.test_split],
        )
        check_source(config, source)
        if dataset.service:
            check_service(dataset.service)
        size = job_size(config, hvd.size())
        schedule = create_schedule(config, size)
        corrupt_images = CorruptImages(config.dataset.corrupt_images)
        task = find_task(config)(config, size, source, corrupt_images)
        process.set_seeds(config)
        network = create_network(
            config, source.image_shape(config.dataset.image_size)
        )
        model = task.model(network)
        compile_model(model, config, schedule, task)
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


def compile_model(model, config, schedule, task):
    """Compiles a network for all ranks, with one Python call per update.

    Args:
        model: The network.
        config: The recipe's `ConfigDict`.
        schedule: The learning-rate schedule.
        task: The task, from `tasks.TASKS`.
    """
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            create_optimizer(config, schedule),
            backward_passes_per_step=task.batches_per_update,
            average_aggregated_gradients=True,
        ),
        loss=task.loss(),
        metrics=task.metrics(),
        steps_per_execution=task.batches_per_update,
        # XLA cannot compile the allreduce. LARS always compiles its update.
        jit_compile=config.xla,
    )


def restore(job, mode):
    """Prepares the work folder, and restores the state of an earlier session.

    Returns:
        The summary if the run is finished, otherwise None.
    """
    summary = None
    with raised_on_every_rank():
        if hvd.rank() == 0:
            job.lock = run_folder.prepare_workdir(job.workdir, job.config, mode)
            if mode == "resume":
                summary = run_folder.read_summary(job.workdir)
            if mode == "resume" and summary is None:
                job.steps_done, job.measured = checkpoints.restore_latest(
                    job.workdir, job.model
                )
    job.steps_done, job.measured, summary = hvd.broadcast_object(
        (job.steps_done, job.measured, summary), root_rank=0
    )
    if job.steps_done and summary is None:
        # Only on rank 0 did the restore build the optimizer.
        optimizer = job.model.optimizer
        optimizer.build(job.model.trainable_variables)
        hvd.broadcast_variables(
            job.model.weights + optimizer.variables, root_rank=0
        )
    return summary


def run(job, watchdog, callbacks):
    """Trains the rest of the job.

    Returns:
        Top-1 from 0 to 1, the epochs done over all sessions, and the names of
        the images that any rank has skipped.
    """
    job.target = job_callbacks.TargetTop1(
        job.config.target_top1, job.config.stop_at_target, job.measured
    )
    if hvd.rank() == 0:
        print(settings_line(job))
    # horovodrun sends a SIGTERM when another rank has ended.
    # The process must survive it to find out which rank.
    with job_callbacks.sigterm_noted() as sigterm, explained():
        if job_callbacks.any_rank_received(sigterm):
            raise job_callbacks.StoppedBySigterm(job.steps_done)
        all_callbacks = job_callbacks.all_callbacks(
            job, watchdog, sigterm, callbacks
        )
        with warnings.catch_warnings():
            # Keras prints this for every dataset whose length is unknown.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            # A SIGTERM may reach some ranks only.
            warnings.filterwarnings("ignore", "Training stops because")
            top1, epochs = fit_parts(job, watchdog, all_callbacks)
        skipped = hvd.allgather_object(job.corrupt_images.names)
        return top1, epochs, set().union(*skipped)


def settings_line(job):
    """Returns the settings that a person checks at the start, in one line."""
    size, schedule = job.size, job.config.schedule
    decay = "by a cosine"
    if schedule.decay == "polynomial":
        decay = f"with power {schedule.power}"
    return (
        f"config={job.name} ranks={size.ranks} "
        f"global_batch={size.global_batch_size} ({size.ranks} ranks x "
        f"{size.micro_batch_size} micro-batch x {size.accumulation_steps} "
        f"accumulation) steps={size.steps} ({size.epochs} epochs x "
        f"{size.steps_per_epoch}) from_step={job.steps_done} "
        f"schedule={schedule.warmup_epochs} epochs up to "
        f"{schedule.peak_learning_rate}, then down {decay} "
        f"seed={job.config.seed}"
    )


def fit_parts(job, watchdog, callbacks):
    """Calls `fit` for each part of the job; returns top-1 and epochs done."""
    evaluation = job.task.evaluation_dataset()
    top1, epochs = None, job.steps_done // job.size.steps_per_epoch
    for part in parts_of_job(job.size, job.steps_done):
        if job.target.is_end() or job.model.stop_training:
            break
        top1, epochs = fit(job, part, evaluation, callbacks)
    if top1 is None:
        results = hvd.evaluate(
            job.model, evaluation, verbose=0, callbacks=[watchdog]
        )
        top1 = results["top1"]
    return top1, epochs


def parts_of_job(size, steps_done):
    """Divides the remaining epochs into one or two calls of `fit`.

    Keras cannot begin within an epoch. So the rest of an unfinished epoch needs
    a separate call.

    Args:
        size: The `JobSize`.
        steps_done: Integer, the updates done.

    Returns:
        List of `(first epoch, updates done in it, epoch to stop before)`.
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
    """Trains one part of the job.

    Returns:
        Top-1 after the last epoch, or None if it was not evaluated; and the
        epochs done.
    """
    epoch, updates_done, end = part
    size = job.size
    micro_batches_done = updates_done * size.accumulation_steps
    seed_dropout(
        job.model,
        [job.config.seed, hvd.rank()],
        epoch * size.micro_batches_per_epoch + micro_batches_done,
    )
    history = job.model.fit(
        job.task.training_dataset(epoch, updates_done),
        validation_data=evaluation,
        validation_freq=evaluation_epochs(job.config),
        steps_per_epoch=(size.steps_per_epoch - updates_done)
        * job.task.batches_per_update,
        initial_epoch=epoch,
        epochs=end,
        callbacks=callbacks,
        shuffle=False,
        verbose=1 if hvd.rank() == 0 else 0,
    )
    epochs = history.epoch[-1] + 1
    if epochs not in evaluation_epochs(job.config):
        # A callback has stopped training between two evaluations.
        return None, epochs
    return history.history["val_top1"][-1], epochs


def seed_dropout(model, seed, micro_batches_done):
    """Sets the model's random generators as if the job had never stopped.

    Their state is a seed and a count of micro-batches. A resumed job then draws
    the same dropout masks as an uninterrupted one.
    """
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for index, state in enumerate(states):
        words = np.random.SeedSequence([*seed, index]).generate_state(1)
        state.assign([words[0], micro_batches_done])


def evaluation_epochs(config):
    """Returns the epochs, counted from 1, that end with an evaluation.

    The last epoch is always one of them.
    """
    every = config.evaluate_every_epochs
    return sorted({*range(every, config.epochs + 1, every), config.epochs})


def summarise(job, top1, epochs, skipped):
    """Writes the summary on rank 0; returns it on every rank."""
    summary = {
        "config": job.name,
        "ranks": job.size.ranks,
        "global_batch_size": job.size.global_batch_size,
        "steps": epochs * job.size.steps_per_epoch,
        "epochs": epochs,
        "top1": round(100 * top1, 3),
        "expected_top1": job.config.expected_top1,
        "images_per_second": job.throughput.images_per_second(),
        "evaluation_seconds": round(job.throughput.evaluation_seconds, 1),
        "checkpoint_seconds": round(job.checkpoint_seconds, 1),
        **job.target.measured(),
        "corrupt_images_skipped": len(skipped),
        "workdir": str(job.workdir),
    }
    with raised_on_every_rank():
        if hvd.rank() == 0:
            job.task.save_result(job.model, job.workdir)
            job.mlperf_log.run_stop("epochs_to_target" in summary)
            run_folder.write_summary(job.workdir, summary)
    return summary
