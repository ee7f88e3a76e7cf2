"""Short forms of TensorFlow's errors."""

import pytest

from horovod_recipes.errors import root_cause

PLACES = (
    "Graph execution error:\n\n"
    "Detected at node X defined at (most recent call last):\n"
    '  File "a.py", line 9, in <module>\n\n'
    '  File "a.py", line 6, in write\n\n'
)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        # Of a full disk.
        (
            PLACES + "run/events; No space left on device\n"
            "\tFailed to flush 1 events to run/events\n"
            "\t [[{{node FlushSummaryWriter}}]]\n"
            "Hint: If you want to see a list of allocated tensors ...\n"
            " [Op:__inference_write_209]",
            "run/events; No space left on device "
            "Failed to flush 1 events to run/events",
        ),
        (
            PLACES + "corrupted record at 5\n"
            "\t [[{{node IteratorGetNext}}]] [Op:__inference_step_1]",
            "corrupted record at 5",
        ),
        (
            "{{function_node __wrapped__IteratorGetNext}} truncated record "
            "[Op:IteratorGetNext] name: ",
            "truncated record",
        ),
        ("out of memory", "out of memory"),
        ("", "no message"),
    ],
)
def test_root_cause_is_one_line(message, cause):
    assert root_cause(message) == cause
