"""The checkpoints of a run: save, keep the newest and the best, restore.

A checkpoint is a `.keras` file with the optimizer's state. Keras loads it
without Horovod. A JSON file beside it holds what the job had measured.
"""

import contextlib
import errno
import json
import re
import sys

import keras

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.training.workdir import is_number
from keras_lars._files import written_atomically

# What a job has measured when it has reached its target.
TARGET_KEYS = ("target_top1", "epochs_to_target", "seconds_to_target")


def saved_steps(workdir):
    """Returns `{updates done: path}` of the run's checkpoints.

    Files of other names, such as a copy, are no checkpoints.
    """
    return _steps_in(workdir / "checkpoints", r"step-(\d+)\.keras")


def _steps_in(folder, pattern):
    """Returns `{step: path}` of the files whose whole names match."""
    steps = {}
    for path in folder.glob("*.keras"):
        if match := re.fullmatch(pattern, path.name):
            steps[int(match[1])] = path
    return steps


def _best_in(folder):
    """Returns `{updates done: path}` of the best models."""
    return _steps_in(folder, r"top1-\d{3}\.\d{3}-step-(\d+)\.keras")


def restore_latest(workdir, model):
    """Loads the newest checkpoint into a compiled model.

    If the newest is broken, it warns and loads the one before.

    Returns:
        The number of updates done, and the `measured` of `save`. Without a
        checkpoint these are `(0, {})`.

    Raises:
        JobError: If all checkpoints are broken, or if the model or optimizer
            of the one that was loaded differs.
    """
    paths = saved_steps(workdir)
    if not paths:
        return 0, {}
    steps_done, saved, measured = _load_newest(paths)
    path = paths[steps_done]
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for kind, ours, theirs in (
        ("model", model, saved),
        ("optimizer", optimizer, saved.optimizer),
    ):
        if _description(ours) != _description(theirs):
            raise JobError(
                f"{path} was saved from another {kind}; resume with the code "
                "that saved it, or choose another --workdir"
            )
    for variable, value in zip(
        model.weights + optimizer.variables,
        saved.weights + saved.optimizer.variables,
        strict=True,
    ):
        variable.assign(value)
    broken = [later for step, later in paths.items() if step > steps_done]
    for later in broken:
        # Otherwise it would count as one of the newest to keep.
        later.rename(later.with_name(f"{later.name}.broken"))
    if not broken:
        # The job will repeat the later steps and save these files again.
        for step, best in _best_in(workdir / "best").items():
            if step > steps_done:
                best.unlink()
    return steps_done, measured


def _load_newest(paths):
    """Returns the step, the model and the measurements of the newest whole one.

    Args:
        paths: Dict, `{updates done: path}`.
    """
    problem = None
    for step in sorted(paths, reverse=True):
        path = paths[step]
        if problem:
            print(f"warning: {problem}; resuming from {path}", file=sys.stderr)
        try:
            model = keras.saving.load_model(path)
            path = path.with_suffix(".json")
            return step, model, _read_measured(path)
        except Exception as error:  # A broken file can raise any error.
            problem = f"cannot load {path} ({one_line(error)})"
            if _is_of_the_machine(error):
                raise JobError(f"{problem}; try again") from error
    raise JobError(
        f"{problem}; no checkpoint can be loaded: has the code or a version "
        "changed? Otherwise restore a checkpoint from a copy"
    )


def _is_of_the_machine(error):
    """Whether loading failed for another reason than the file's content."""
    # What reads the weights raises an OSError without a number for a cut file,
    # and EINVAL where the file names a place before its begin.
    of_the_file = (None, 0, errno.ENOENT, errno.EINVAL)
    return isinstance(error, MemoryError) or (
        isinstance(error, OSError) and error.errno not in of_the_file
    )


def _read_measured(path):
    measured = json.loads(path.read_text())
    if not isinstance(measured, dict) or any(
        name in measured and not is_number(measured[name])
        for name in ("seconds", *TARGET_KEYS)
    ):
        raise ValueError("it does not have what a job measures")
    if 0 < len(measured.keys() & TARGET_KEYS) < len(TARGET_KEYS):
        raise ValueError("it lacks a part of the target")
    sums = measured.get("metric_sums", [])
    # A sum may be infinite or NaN, as the loss of a step may be.
    if not isinstance(sums, list) or not all(
        isinstance(value, int | float) for value in sums
    ):
        raise ValueError("its metric_sums are not numbers")
    return measured


def _description(model_or_optimizer):
    """Returns the properties that must match before a state is loaded."""
    if isinstance(model_or_optimizer, keras.Model):
        return [(v.path, v.shape) for v in model_or_optimizer.weights]
    config = keras.saving.serialize_keras_object(model_or_optimizer)
    return _without_names(config)


def _without_names(config):
    """Leaves out names: a second optimizer in a process is called "adam_1"."""
    if not isinstance(config, dict):
        return config
    return {k: _without_names(v) for k, v in config.items() if k != "name"}


def save(workdir, model, steps_done, measured, keep):
    """Saves a checkpoint, and then deletes all but the newest ones.

    Args:
        workdir: `pathlib.Path`. The files go to its folder `checkpoints`.
        model: The compiled model.
        steps_done: Integer, the updates done.
        measured: Dict that JSON can hold. `restore_latest` returns it.
        keep: Integer, the number of newest checkpoints to keep.

    Raises:
        JobError: If it cannot write. Older checkpoints then stay.
    """
    folder = workdir / "checkpoints"
    path = folder / f"step-{steps_done:08d}.keras"
    with _cannot_write(path):
        folder.mkdir(exist_ok=True)
        _delete_halves(folder)
        with written_atomically(path.with_suffix(".json")) as part:
            part.write_text(json.dumps(measured) + "\n")
        with written_atomically(path) as part:
            model.save(part)
    paths = saved_steps(workdir)
    for old in sorted(paths)[:-keep]:
        paths[old].unlink()
        paths[old].with_suffix(".json").unlink(missing_ok=True)


def save_if_best(workdir, model, steps_done, top1, keep):
    """Saves the model in `workdir/best` if its top-1 is one of the best.

    Args:
        workdir: `pathlib.Path`, the work folder.
        model: The compiled model.
        steps_done: Integer, the updates done.
        top1: Float, the top-1 in percent.
        keep: Integer, the number of best models to keep.

    Raises:
        JobError: If it cannot write. Older files then stay.
    """
    folder = workdir / "best"
    path = folder / f"top1-{top1:07.3f}-step-{steps_done:08d}.keras"
    # The names sort by top-1. Among equal values, the later step wins.
    others = set(_best_in(folder).values()) - {path}
    best = sorted([*others, path], reverse=True)[:keep]
    if path not in best:
        return
    with _cannot_write(path):
        folder.mkdir(exist_ok=True)
        _delete_halves(folder)
        with written_atomically(path) as part:
            model.save(part)
    for old in others - set(best):
        old.unlink()


@contextlib.contextmanager
def _cannot_write(path):
    try:
        yield
    except OSError as error:
        raise JobError(
            f"cannot write the checkpoint {path}: {error.strerror}; earlier "
            "checkpoints are intact: free disk space, then use --resume"
        ) from error


def _delete_halves(folder):
    """Deletes incomplete files that a killed job left."""
    for path in folder.glob(".part-*"):
        path.unlink()
