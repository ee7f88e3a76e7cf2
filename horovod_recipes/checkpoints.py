"""The working folder of a run, and its checkpoints: save, keep, restore.

A checkpoint is a `.keras` file, with the optimizer's state, that Keras loads
without Horovod.
"""

import json
import re
import shutil

import keras

from horovod_recipes.errors import JobError
from horovod_recipes.errors import one_line
from horovod_recipes.files import written_atomically

# All that a run writes, and so all that --overwrite deletes.
RUN_FILES = (
    "config.json",
    "checkpoints",
    "metrics.csv",
    "metrics.png",
    "summary.json",
    "tensorboard",
    "trust_ratios",
)
# Keys that a run may be resumed with another value of: they change where it
# reads and what it writes, not what it computes from the data that is good.
FREE_KEYS = {
    "dataset.data_dir",
    "dataset.corrupt_images",
    "evaluate_every_epochs",
    "checkpoint_every_epochs",
    "keep_checkpoints",
    "log_trust_ratios_every_steps",
}


def prepare_workdir(workdir, config, mode):
    """Makes the folder ready for a run; rank 0 alone calls this.

    Raises:
        JobError: If the folder cannot be written to, or if what it holds does
            not go with `mode` and `config`.
    """
    try:
        saved_config = read_config(workdir)
        if mode == "resume":
            check_same_config(saved_config, config, workdir)
            return
        if workdir.exists() and any(workdir.iterdir()):
            check_overwritable(saved_config, workdir, mode)
            delete_run(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        with written_atomically(workdir / "config.json") as part:
            part.write_text(config.to_json(indent=2))
    except OSError as error:
        raise JobError(
            f"cannot write to --workdir={workdir}: {error.strerror}; choose a "
            "folder that can be written to"
        ) from None


def read_config(workdir):
    """Returns the config of the run in `workdir`; None if it holds no run."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    is_ours = isinstance(config, dict) and "global_batch_size" in config
    return config if is_ours else None


def check_overwritable(saved_config, workdir, mode):
    if saved_config is None:
        raise JobError(
            f"{workdir} holds files that are not of a run; choose another "
            "--workdir"
        )
    if mode == "new":
        raise JobError(
            f"{workdir} holds a run; go on with it (--resume), delete it "
            "(--overwrite), or choose another --workdir"
        )


def delete_run(workdir):
    for name in RUN_FILES:
        path = workdir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def check_same_config(saved, config, workdir):
    """Raises `JobError` unless the run in `workdir` had this config."""
    if saved is None:
        raise JobError(
            f"no run to resume in {workdir}: it has no config.json of a run; "
            "start one without --resume"
        )
    saved = _flatten(saved)
    asked = _flatten(json.loads(config.to_json()))
    differences = [
        f"{key} was {saved.get(key)!r} and is {asked.get(key)!r}"
        for key in sorted((saved | asked).keys() - FREE_KEYS)
        if saved.get(key) != asked.get(key)
    ]
    if differences:
        raise JobError(
            f"the run in {workdir} cannot go on with another config: "
            f"{'; '.join(differences)}. Use the same values, or another "
            "--workdir"
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
    """Returns the summary of a run that is finished, else None."""
    path = workdir / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_summary(workdir, summary):
    """Writes the file that says that a run is finished, in one line."""
    with written_atomically(workdir / "summary.json") as part:
        part.write_text(json.dumps(summary) + "\n")


def saved_epochs(workdir):
    """Returns `{epochs done: path}` of the run's checkpoints."""
    epochs = {}
    for path in (workdir / "checkpoints").glob("epoch-*.keras"):
        epochs[int(re.fullmatch(r"epoch-(\d+)\.keras", path.name)[1])] = path
    return epochs


def restore_latest(workdir, model):
    """Loads the newest checkpoint into a compiled model.

    Returns:
        The number of epochs done; 0 if there is no checkpoint yet.

    Raises:
        JobError: If the checkpoint is of another model or optimizer.
    """
    paths = saved_epochs(workdir)
    if not paths:
        return 0
    path = paths[max(paths)]
    try:
        saved = keras.saving.load_model(path)
    except Exception as error:
        raise JobError(
            f"cannot load {path} ({one_line(error)}); delete it to go on from "
            "the checkpoint before it"
        ) from error
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    for kind, ours, theirs in (
        ("model", model, saved),
        ("optimizer", optimizer, saved.optimizer),
    ):
        if _description(ours) != _description(theirs):
            raise JobError(
                f"{path} was saved from another {kind}; go on with the code "
                "it was saved with, or choose another --workdir"
            )
    for variable, value in zip(
        model.weights + optimizer.variables,
        saved.weights + saved.optimizer.variables,
        strict=True,
    ):
        variable.assign(value)
    return max(paths)


def _description(model_or_optimizer):
    """Returns what must be equal for a state to be loaded."""
    if isinstance(model_or_optimizer, keras.Model):
        return [(v.path, v.shape) for v in model_or_optimizer.weights]
    return keras.saving.serialize_keras_object(model_or_optimizer)


class SaveCheckpoints(keras.callbacks.Callback):
    """Saves the model after every so many epochs and after the last.

    Args:
        workdir: `pathlib.Path`; files go to its folder `checkpoints`.
        every: Integer, in epochs.
        epochs: Integer, the last epoch.
        keep: Integer, how many of the newest to keep.
    """

    def __init__(self, workdir, every, epochs, keep):
        super().__init__()
        self.workdir = workdir
        self.every = every
        self.epochs = epochs
        self.keep = keep

    def on_epoch_end(self, epoch, logs=None):
        done = epoch + 1
        if done % self.every and done != self.epochs:
            return
        folder = self.workdir / "checkpoints"
        folder.mkdir(exist_ok=True)
        with written_atomically(folder / f"epoch-{done:04d}.keras") as part:
            self.model.save(part)
        paths = saved_epochs(self.workdir)
        for old in sorted(paths)[: -self.keep]:
            paths[old].unlink()
