"""Events of a job in the form of MLPerf's logs, with its own library.

A log to compare runs with, and not fit to be submitted as it is: who ran it on
what is not in it.
"""

import logging

import keras
from mlperf_logging.mllog import constants
from mlperf_logging.mllog.mllog import MLLogger

from horovod_recipes.job import is_sgd


class MLPerfLog(keras.callbacks.Callback):
    """Writes what MLPerf asks to be logged to `workdir/mlperf.log`.

    List it after `ExactMetrics`. A job that is resumed adds to the file, with a
    `run_start` of its own.

    Args:
        workdir: `pathlib.Path`.
        config: The recipe's `ConfigDict`.
        job: The `JobSize`.
    """

    def __init__(self, workdir, config, job):
        super().__init__()
        logger = logging.Logger("mlperf")
        logger.addHandler(_AppendToFile(workdir / "mlperf.log"))
        self._log = MLLogger(logger)
        self._log.start(constants.INIT_START)
        for key, value in _settings(config, job):
            self._log.event(key, value)
        self._log.end(constants.INIT_STOP)
        self._log.start(constants.RUN_START)

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = {constants.EPOCH_NUM: epoch + 1}
        self._log.start(constants.EPOCH_START, metadata=self._epoch)

    def on_test_begin(self, logs=None):
        self._log.start(constants.EVAL_START, metadata=self._epoch)

    def on_epoch_end(self, epoch, logs=None):
        if "val_top1" in logs:
            self._log.event(
                constants.EVAL_ACCURACY,
                logs["val_top1"],
                metadata=self._epoch,
            )
            self._log.end(constants.EVAL_STOP, metadata=self._epoch)
        self._log.end(constants.EPOCH_STOP, metadata=self._epoch)

    def run_stop(self, reached_target):
        """Writes how the job ended."""
        status = constants.SUCCESS if reached_target else constants.ABORTED
        self._log.end(constants.RUN_STOP, metadata={"status": status})


class _AppendToFile(logging.Handler):
    """Keeps no file open, so that a job may end anywhere."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def emit(self, record):
        with self._path.open("a") as file:
            file.write(f"{record.getMessage()}\n")


def _settings(config, job):
    lars, schedule = config.optimizer, config.schedule
    synchronized = config.model.get("batch_norm") == "synchronized"
    ranks_of_a_norm = job.ranks if synchronized else 1
    return (
        (constants.SUBMISSION_BENCHMARK, config.model.name),
        (constants.SEED, config.seed),
        (constants.GLOBAL_BATCH_SIZE, job.global_batch_size),
        (constants.GRADIENT_ACCUMULATION_STEPS, job.accumulation_steps),
        (constants.MODEL_BN_SPAN, job.micro_batch_size * ranks_of_a_norm),
        (constants.TRAIN_SAMPLES, config.dataset.train_examples),
        (constants.EVAL_SAMPLES, config.dataset.test_examples),
        (
            constants.OPT_NAME,
            constants.SGD if is_sgd(config) else constants.LARS,
        ),
        (constants.OPT_BASE_LR, schedule.peak_learning_rate),
        (constants.OPT_END_LR, schedule.get("end_learning_rate", 0.0)),
        (constants.OPT_LR_WARMUP_EPOCHS, schedule.warmup_epochs),
        (constants.LARS_OPT_LR_DECAY_POLY_POWER, schedule.power),
        (constants.LARS_OPT_MOMENTUM, lars.get("momentum", 0.9)),
        (constants.LARS_OPT_WEIGHT_DECAY, lars.get("weight_decay", 0.0)),
        (constants.LARS_EPSILON, lars.get("epsilon", 0.0)),
    )
