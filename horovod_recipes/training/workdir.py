"""The work folder of a run: its config, its summary, and who may use it."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import socket

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from keras_lars._files import written_atomically

# Files and folders that a run writes and --overwrite deletes.
RUN_FILES = (
    "config.json",
    "checkpoints",
    "best",
    "encoder.keras",
    "evaluation.json",
    "neighbours.png",
    "metrics.csv",
    "metrics.png",
    "mlperf.log",
    "summary.json",
    "tensorboard",
    "trust_ratios",
)
LOCK_FILE = ".horovod_recipes.lock"
# Keys that may change when a run resumes.
# max_micro_batch_size also changes batch norm's statistics and dropout.
FREE_KEYS = {
    "dataset.data_dir",
    "dataset.corrupt_images",
    "dataset.cache",
    "dataset.service",
    "dataset.threads",
    "max_micro_batch_size",
    "evaluate_every_epochs",
    "checkpoint_every_epochs",
    "keep_checkpoints",
    "keep_best_checkpoints",
    "log_trust_ratios_every_steps",
    "check_replicas_every_steps",
    "hang_seconds",
    "target_top1",
    "stop_at_target",
    "expected_top1",
}


class Lock:
    """Keeps other jobs out of a work folder, until `release` or a kill.

    Args:
        workdir: `pathlib.Path`, a folder that exists.

    Raises:
        JobError: If another job has it.
    """

    def __init__(self, workdir):
        self._path = workdir / LOCK_FILE
        if self._path.is_symlink():
            # In a stranger's folder, it may lead to a file outside of it.
            self._path.unlink()
        while True:
            # A damaged file may hold anything.
            self._file = self._path.open("a+", errors="replace")
            self._acquire(workdir)
            if self._is_in_folder():
                break
            # A job that ended in between has deleted the file.
            self._file.close()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def _acquire(self, workdir):
        try:
            # The kernel gives it back when the process ends.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = one_line(self._file.read())
            self._file.close()
            raise JobError(
                f"another job uses {workdir}: {owner}; wait until it has "
                "ended, or choose another --workdir"
            ) from None
        except OSError:
            pass  # Some network file systems have no locks.

    def _is_in_folder(self):
        try:
            return os.path.samestat(
                os.fstat(self._file.fileno()), self._path.stat()
            )
        except FileNotFoundError:
            return False

    def release(self):
        # It may fail on the disk that ended the job, whose error must be seen.
        with contextlib.suppress(OSError):
            self._path.unlink()
        # The lock itself ends here.
        self._file.close()


def prepare_workdir(workdir, config, mode):
    """Makes the folder ready for a run. Only rank 0 calls this.

    Returns:
        The `Lock` of the folder, or None if the run to resume is finished.

    Raises:
        JobError: If the folder is not writable, if another job uses it, or if
            its contents do not match `mode` and `config`.
    """
    try:
        if mode == "resume":
            check_same_config(read_config(workdir), config, workdir)
            if read_summary(workdir) is not None:
                return None
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir)
        try:
            _make_ready(workdir, config, mode)
        except BaseException:
            lock.release()
            raise
        return lock
    except OSError as error:
        raise JobError(
            f"cannot write to --workdir={workdir}: {error.strerror}; choose a "
            "writable folder"
        ) from None


def _make_ready(workdir, config, mode):
    others = [p for p in workdir.iterdir() if p.name != LOCK_FILE]
    if mode != "resume" and others:
        check_overwritable(read_config(workdir), workdir, mode)
        delete_run(workdir)
    with written_atomically(workdir / "config.json") as part:
        part.write_text(config.to_json(indent=2))


def read_config(workdir):
    """Returns the config of the run in `workdir`, or None without a run."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        # A ValueError means that it is neither UTF-8 nor JSON.
        return None
    is_ours = isinstance(config, dict) and "global_batch_size" in config
    return config if is_ours else None


def check_overwritable(saved_config, workdir, mode):
    if saved_config is None:
        raise JobError(
            f"{workdir} holds files that do not belong to a run; choose "
            "another --workdir"
        )
    if mode == "new":
        raise JobError(
            f"{workdir} already holds a run; continue it (--resume), delete "
            "it (--overwrite), or choose another --workdir"
        )


def delete_run(workdir):
    for path in (
        *(workdir / name for name in RUN_FILES),
        *workdir.glob("metrics.damaged*.csv"),
    ):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same_config(saved, config, workdir):
    """Raises `JobError` unless the run in `workdir` has the same config."""
    if saved is None:
        raise JobError(
            f"no run to resume in {workdir}: it has no config.json of a run; "
            "start one without --resume"
        )
    saved = _flatten(saved)
    asked = _flatten(json.loads(config.to_json()))
    differences = [
        f"{key} was {saved.get(key)!r} and now is {asked.get(key)!r}"
        for key in sorted((saved | asked).keys() - FREE_KEYS)
        if saved.get(key) != asked.get(key)
    ]
    if differences:
        raise JobError(
            f"the run in {workdir} cannot continue with another config: "
            f"{one_line('; '.join(differences))}. Use the same values, or "
            "another --workdir"
        )


def _flatten(values, prefix=""):
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_summary(workdir):
    """Returns the summary of a finished run, or None for any other.

    Raises:
        JobError: If the file is damaged.
    """
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
    except ValueError:  # Neither UTF-8 nor JSON.
        summary = None
    is_ours = isinstance(summary, dict) and is_number(summary.get("top1"))
    if not is_ours:
        raise JobError(
            f"{path} is not the summary of a run; delete it, and --resume "
            "ends the run again"
        )
    return summary


def is_number(value):
    """Whether a value in a JSON file is a finite number."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def write_summary(workdir, summary):
    """Writes summary.json, which marks a run as finished."""
    with written_atomically(workdir / "summary.json") as part:
        part.write_text(json.dumps(summary) + "\n")
