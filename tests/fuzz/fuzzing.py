"""What all fuzzers share: the number of inputs, a time limit, the count.

A test that `tries` decorates gets one input at a time. It returns how the
program took the input, `RIGHT` or `ERROR`, and fails on anything else.
"""

import collections
import contextlib
import functools
import io
import pathlib
import re
import signal
import sys

import hypothesis
from hypothesis import strategies as st

from horovod_recipes.errors import JobError

RIGHT = "right result"
ERROR = "clear error"
# Inputs of each test in the short run, where a test does not say another.
FEW = 20
SECONDS_PER_INPUT = 60
# Errors whose text tells a user nothing, though a command prints one line.
UNCLEAR = re.compile(
    r"(error: )?(on rank \d+: )?(AssertionError|AttributeError|IndexError|"
    r"KeyError|RecursionError|UnboundLocalError|UnicodeDecodeError|"
    r"UnicodeEncodeError|ZeroDivisionError|OverflowError|JSONDecodeError): "
)

# Of the test that runs: outcome to number of inputs.
counts = collections.Counter()


class Hangs(BaseException):
    """An input took too long. No `except Exception` may catch this."""


def is_full():
    profile = hypothesis.settings.get_current_profile_name()
    return profile == "full"


def tries(full, short=FEW, **inputs):
    """Decorates a test of one input: it gets `full` inputs, or `short`.

    Args:
        full: Integer, the inputs of `make fuzz`.
        short: Integer, the inputs of `make test`.
        **inputs: Strategies of hypothesis, one for each argument.
    """

    def decorate(test):
        @functools.wraps(test)
        def limited(*args, **kwargs):
            with _time_limit():
                outcome = test(*args, **kwargs)
            assert outcome in (RIGHT, ERROR)
            counts[outcome] += 1

        number = hypothesis.settings(max_examples=full if is_full() else short)
        return number(hypothesis.given(**inputs)(limited))

    return decorate


@contextlib.contextmanager
def _time_limit():
    def end(number, frame):
        raise Hangs(f"no end after {SECONDS_PER_INPUT} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS_PER_INPUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def captured():
    """Yields a function that returns the lines printed to stderr so far."""
    before = sys.stdout, sys.stderr
    # A command sets how these streams write.
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        for _ in before
    )
    printed = sys.stderr

    def lines():
        printed.flush()
        text = printed.buffer.getvalue().decode()
        return text.removesuffix("\n").split("\n") if text else []

    try:
        yield lines
    finally:
        sys.stdout, sys.stderr = before


def assert_clear(error, *parts):
    """Checks the error of a function: one line, with these parts of text."""
    text = str(error)
    assert isinstance(error, (JobError, ValueError)), repr(error)
    assert text.strip(), repr(error)
    assert "\n" not in text, text
    assert not UNCLEAR.match(text), text
    for part in parts:
        assert part in text, text


def assert_one_error(lines):
    """Checks what a command that failed has printed to stderr."""
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == 1, lines
    assert not UNCLEAR.match(errors[0]), errors
    assert_only_warnings(line for line in lines if line not in errors)


def assert_only_warnings(lines):
    for line in lines:
        assert line.startswith("warning: "), line


def content_of(folder):
    """Returns `{path in it: bytes}` of the files of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(pathlib.Path(folder).rglob("*"))
        if path.is_file()
    }


# Values of a file that is whole, but not what it should be.
OTHER_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def damaged(draw, whole, others=()):
    """Draws a damaged copy of some bytes.

    Args:
        draw: From hypothesis.
        whole: Bytes.
        others: List of bytes, the content of other files to swap it with.
    """
    kinds = ["cut", "flip", "empty", "zeros", "line", "noise", "doubled"]
    kind = draw(st.sampled_from(kinds + ["swap"] * bool(others)))
    if kind == "empty":
        return b""
    if kind == "swap":
        return draw(st.sampled_from(others))
    if kind == "noise":
        return draw(st.binary(max_size=200))
    place = st.integers(0, max(len(whole) - 1, 0))
    if kind == "cut":
        return whole[: draw(place)]
    if kind == "doubled":
        return whole + whole[draw(place) :]
    if kind == "line":
        lines = whole.splitlines(keepends=True)
        del lines[draw(st.integers(0, len(lines) - 1))]
        return b"".join(lines)
    copy = bytearray(whole)
    if kind == "zeros":
        begin = draw(place)
        end = min(begin + draw(st.integers(1, 512)), len(copy))
        copy[begin:end] = bytes(end - begin)
        return bytes(copy)
    for _ in range(draw(st.integers(1, 4))):
        copy[draw(place)] ^= 1 << draw(st.integers(0, 7))
    return bytes(copy)
