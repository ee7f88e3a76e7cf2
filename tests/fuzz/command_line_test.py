"""Command lines and configs, up to the point where training would start."""

import json
import pathlib
import shutil
import sys

import pytest
from hypothesis import strategies as st

import horovod_recipes.keras as hvd
from horovod_recipes import evaluate
from horovod_recipes import plan
from horovod_recipes import train
from horovod_recipes.configs import _check
from horovod_recipes.configs import _config_flag
from horovod_recipes.configs import demo
from horovod_recipes.configs import resnet50
from horovod_recipes.configs import simclr
from horovod_recipes.errors import JobError
from horovod_recipes.training import job
from horovod_recipes.training import process
from horovod_recipes.training.job_size import job_size
from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import ERROR
from tests.fuzz.fuzzing import RIGHT
from tests.fuzz.fuzzing import tries

# ml_collections loads config files in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def keys_of(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys_of(value, f"{prefix}{key}.")
        yield f"{prefix}{key}"


KEYS = sorted(
    {
        key
        for recipe in (demo, resnet50, simclr)
        for key in keys_of(recipe.get_config())
        # TensorFlow takes these settings only once in a process.
        if key != "deterministic"
    }
)
NAMES = ("demo", "simclr", "simclr:digits", "resnet50:32k", "alexnet_bn")
HUGE = (10**12, 10**18, 2**63, 10**30, -(10**30), 1e308, 1e-308)
# The parsers of Python and absl repeat line breaks in what they do not know.
texts = st.text(st.characters(exclude_characters="\n\r"), max_size=8)
# Sizes between these and the huge ones would fill the machine's memory.
VALUES = st.one_of(
    st.integers(-3, 40),
    st.sampled_from(HUGE),
    st.floats(),
    st.booleans(),
    st.none(),
    texts,
    st.sampled_from(
        ("", "[]", "()", "{}", "(1, 2)", "['x']", "nan", "inf", "1e9", "0x10")
        + ("lars", "sgd", "lamb", "trust_ratio:", "trust_ratio:adam", "simclr")
        + ("cosine", "skip", "stop", "mixed_bfloat16", "mixed_float16", "none")
        + ("synchronized", "micro_batch", "inception_small", "small_cnn")
        + ("train", "folder", "mnist5k", "/", ".", "grpc://", "1_000", "١٢")
    ),
)


def mostly(usual, *odd):
    """Draws three times in four from the usual strategy."""
    return st.integers(0, 3).flatmap(
        lambda number: usual if number < 3 else st.one_of(*odd)
    )


@st.composite
def misspelt(draw, words):
    """Draws a word with a letter less, another letter, or one more."""
    word = draw(st.sampled_from(words))
    place = draw(st.integers(0, len(word)))
    letters = draw(st.text(max_size=1) | st.sampled_from(".=-_ "))
    return word[:place] + letters + word[place + draw(st.integers(0, 1)) :]


# Counts of any size. They take no memory before training starts.
COUNTS = sorted({*_check.COUNTS, *_check.NUMBERS} - {"dataset.num_classes"})
numbers = st.one_of(
    st.integers(0, 5000),
    st.integers(1, 62).map(lambda power: 2**power - 1),
    st.integers(1, 18).map(lambda power: 10**power),
    st.floats(0, 100),
)
GOOD = (
    *("epochs=12", "epochs=40", "seed=7", "label_smoothing=0.5", "xla=True"),
    *("max_micro_batch_size=64", "global_batch_size=500", "schedule.power=1.0"),
    *("schedule.decay=cosine", "optimizer.momentum=0.5", "model.filters=4"),
    *("dataset.corrupt_images=skip", "target_top1=90.0", "hang_seconds=30"),
    *("precision=mixed_bfloat16", "dataset.cache=True", "keep_checkpoints=5"),
)
overrides = mostly(
    st.sampled_from(GOOD).map("--config.{}".format),
    st.builds("--config.{}={}".format, st.sampled_from(KEYS), VALUES),
    st.builds("--config.{}={}".format, misspelt(KEYS), VALUES),
    st.builds("--config.{}={}".format, st.sampled_from(COUNTS), numbers),
)
configs = st.builds(
    "--config={}".format,
    st.sampled_from(NAMES) | misspelt(NAMES) | texts,
)
odd_arguments = st.one_of(
    configs,
    misspelt(["--workdir", "--resume", "--overwrite", "--config"]).filter(
        lambda argument: argument != "--workdir"
    ),
    st.sampled_from(
        ("--resume", "--noresume", "--resume=maybe", "--overwrite", "--", "-")
        + ("--flagfile=/nowhere", "--config", "--workdir=", "--undefok=x", "-x")
    ),
    texts,
)


def command_lines(first):
    """Draws the arguments of a command: a config and changes, or anything."""
    return st.builds(
        lambda name, changes, others: [*name, *changes, *others],
        mostly(st.just([first]), st.lists(configs, max_size=2)),
        st.lists(overrides, max_size=4),
        mostly(st.just([]), st.lists(odd_arguments, max_size=2)),
    )


class TrainingStarts(Exception):
    """The command line was right: the job is prepared."""


@pytest.fixture(scope="module", autouse=True)
def _one_process(folder):
    """Lets many jobs start in this process, and lets none train."""

    def start(*arguments):
        raise TrainingStarts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])
        patch.chdir(folder)
        # Under MPI, a process cannot start Horovod again.
        patch.setattr(hvd, "shutdown", lambda: None)
        patch.setattr(hvd.callbacks, "SECONDS_TO_SAY_WHY", 0)
        patch.setattr(job, "fit_parts", start)
        patch.setattr(process, "run_operations_one_by_one", lambda: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("command_line")


def changed_value(config, argument):
    """Returns what a change asks for, and what the config has, if plain."""
    key, _, text = argument.removeprefix("--config.").partition("=")
    value = config
    for part in key.split("."):
        value = value[part]
    return text, value


@tries(full=1000, short=10, arguments=command_lines("--config=demo"))
def test_train(folder, arguments):
    workdir = folder / "run"
    with fuzzing.captured() as printed:
        try:
            command = ["train", f"--workdir={workdir}", *arguments]
            sys.argv = command
            status = train.main(command)
        except TrainingStarts:
            status = None
    lines = printed()
    if status == 1:
        fuzzing.assert_one_error(lines)
        assert not workdir.exists()
        return ERROR
    fuzzing.assert_only_warnings(lines)
    if status == 0:
        assert "--help" in arguments
        return RIGHT
    saved = json.loads((workdir / "config.json").read_text())
    shutil.rmtree(workdir)
    last = {a.partition("=")[0]: a for a in arguments if "--config." in a}
    for argument in last.values():
        text, value = changed_value(saved, argument)
        if isinstance(value, int) and not isinstance(value, bool):
            assert int(text, 0) == value
        elif isinstance(value, float) and value == value:
            assert float(text) == value
    return RIGHT


@tries(
    full=1000,
    short=10,
    arguments=command_lines("--config=demo"),
    ranks=mostly(st.sampled_from([1, 2, 4]), VALUES),
    hardware=st.sampled_from(["a100", "h100", "v100", "p100", "a10"]),
    output=st.sampled_from(["", "", "", "", "plan", "mine.py", "/proc/plan"]),
)
def test_plan(folder, arguments, ranks, hardware, output):
    (folder / "mine.py").touch()
    with fuzzing.captured() as printed:
        sys.argv = ["plan", f"--ranks={ranks}", f"--hardware={hardware}"]
        sys.argv += [f"--output={output}", *arguments]
        status = plan.main(sys.argv)
    if status == 1:
        fuzzing.assert_one_error(printed())
        return ERROR
    fuzzing.assert_only_warnings(printed())
    return RIGHT


@tries(
    full=500,
    short=10,
    arguments=st.lists(
        st.one_of(
            odd_arguments,
            st.builds("--linear_epochs={}".format, VALUES),
            st.builds("--workdir={}".format, texts),
            misspelt(["--with_random_weights", "--linear_epochs=3"]),
        ),
        max_size=4,
    ),
)
def test_evaluate(arguments):
    with fuzzing.captured() as printed:
        try:
            status = evaluate.main(arguments)
        except SystemExit as end:
            # Python's own parser of arguments.
            status = end.code
            assert "-h" in "".join(arguments) or status == 2
    if status == 0:
        return RIGHT
    lines = printed()
    usage = next(i for i, line in enumerate(lines) if "error: " in line)
    lines = lines[usage:]
    fuzzing.assert_one_error(lines)
    return ERROR


SOURCE = pathlib.Path(demo.__file__).read_bytes()
STATEMENTS = (
    *("return None", "return []", "return {}", "return 3", "raise KeyError"),
    *("raise ValueError", "raise ValueError('two\\nlines')", "1 / 0", "pass"),
    *("import nothing", "return get_config()", "raise SystemExit(3)"),
    *("raise AttributeError", "return config_dict.ConfigDict()"),
    *("return _defaults.get_config()", "assert False", "yield 3"),
    *(
        "import sys; sys.exit()",
        "return config_dict.FrozenConfigDict({'a': 1})",
    ),
)


@st.composite
def config_files(draw):
    """Draws the content of a config file that is not as it should be."""
    kind = draw(st.sampled_from(["damaged", "statement", "key"]))
    if kind == "damaged":
        return draw(fuzzing.damaged(SOURCE))
    if kind == "statement":
        statement = draw(st.sampled_from(STATEMENTS)).encode()
        inside = draw(st.booleans())
        line = b"    return config\n" if inside else b"def get_config():\n"
        new = (
            b"    " + statement + b"\n" if inside else statement + b"\n" + line
        )
        return SOURCE.replace(line, new)
    key, value = draw(st.sampled_from(KEYS)), draw(VALUES)
    line = f"    config.{key} = {value!r}\n    return config\n".encode()
    return SOURCE.replace(b"    return config\n", line)


@tries(
    full=2500,
    short=30,
    content=config_files(),
    suffix=st.sampled_from(["", ":", ":small"]),
)
def test_config_file(folder, content, suffix):
    path = folder / "mine.py"
    path.write_bytes(content)
    flags = train.create_flags()
    with fuzzing.captured():
        try:
            _config_flag.parse(flags, ["train", f"--config={path}{suffix}"])
            _check.check_config(flags.config)
            job_size(flags.config, 2)
        except JobError as error:
            fuzzing.assert_clear(error)
            return ERROR
    return RIGHT
