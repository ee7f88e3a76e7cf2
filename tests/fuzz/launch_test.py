"""What the launchers and the watchdog read: hosts, variables, messages.

Horovod alone reads other hostfiles, and the output of discovery scripts.
"""

import http.server
import os
import pathlib
import re
import subprocess
import threading

import pytest
import yaml
from hypothesis import strategies as st

from horovod_recipes.keras import _watchdog
from tests.fuzz import fuzzing
from tests.fuzz.fuzzing import ERROR
from tests.fuzz.fuzzing import RIGHT
from tests.fuzz.fuzzing import tries

LAUNCH = pathlib.Path(__file__).parents[2] / "horovod_recipes/launch"
# These replace the programs that the launchers start.
PROGRAMS = {
    "horovodrun": 'echo "$@" >> "$LOG"',
    "scontrol": 'printf %s "$NODES"',
    "ssh": ":",
}
COUNTS = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK")
texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    max_size=6,
)
values = st.one_of(
    st.integers(1, 9).map(str),
    st.integers().map(str),
    st.sampled_from(["", "4(x2)", "2,3", " 2", "0x2", "08", "1e3", "a[$(id)]"]),
    texts,
)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A folder to launch from, with these programs."""
    folder = tmp_path_factory.mktemp("stage")
    (folder / "run").mkdir()
    (folder / "run/summary.json").touch()
    for name, text in PROGRAMS.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)
    return folder


def launch(stage, *command, **environment):
    """Returns the arguments of horovodrun, or None after one clear line."""
    log = stage / "log"
    log.unlink(missing_ok=True)
    result = subprocess.run(
        command,
        cwd=stage,
        env=os.environ
        | {"PATH": f"{stage}:{os.environ['PATH']}", "LOG": str(log)}
        | environment,
        capture_output=True,
        timeout=fuzzing.SECONDS_PER_INPUT,
    )
    printed = result.stderr.decode(errors="backslashreplace")
    if result.returncode == 0:
        assert printed == ""
        return log.read_text(errors="backslashreplace")
    assert result.returncode == 1
    assert not log.exists()
    assert printed.startswith("error: ")
    return None


@tries(
    full=300,
    short=8,
    counts=st.tuples(values, values, values),
    hosts=st.lists(st.sampled_from(["n1", "n2", "node-3.x"]), max_size=3),
    is_right=st.booleans(),
)
def test_slurm(stage, counts, hosts, is_right):
    if is_right:
        counts = (str(len(hosts) or 1), *counts[1:])
    variables = dict(zip(COUNTS, counts, strict=True))
    arguments = launch(
        stage,
        *("bash", str(LAUNCH / "train.slurm")),
        **variables,
        NODES="".join(f"{host}\n" for host in hosts),
        SLURM_JOB_ID="7",
        SLURM_JOB_NAME="fuzz",
        SLURM_JOB_NODELIST="n[1-3]",
        WORKDIR="run",
    )
    are_counts = all(re.fullmatch("[1-9][0-9]{0,4}", c) for c in counts)
    if arguments is None:
        assert not are_counts or int(counts[0]) != (len(hosts) or 1)
        return ERROR
    assert are_counts
    nodes, tasks = map(int, counts[:2])
    names = hosts if nodes > 1 else ["localhost"]
    slots = ",".join(f"{name}:{tasks}" for name in names)
    assert arguments.startswith(f"--gloo -np {nodes * tasks} -H {slots} ")
    return RIGHT


HOSTFILE = b"job-worker-0.job.default.svc slots=2\njob-worker-1.job slots=4\n"


@tries(full=300, short=8, content=fuzzing.damaged(HOSTFILE, [b"a\n", b"\n"]))
def test_hostfile_of_an_mpijob(stage, content):
    path = stage / "hostfile"
    path.write_bytes(content)
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    launcher = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]
    ((script,),) = (c["args"] for c in launcher["containers"])
    arguments = launch(
        stage,
        *("bash", "-c", script.replace("/etc/mpi/hostfile", str(path))),
        CONFIG="demo",
        WORKDIR="run",
    )
    if arguments is None:
        return ERROR
    lines = content.decode(errors="backslashreplace").splitlines()
    slots = [re.fullmatch(r"[^ ]+ slots=(\d+)", line)[1] for line in lines]
    assert arguments.startswith(f"--gloo -np {sum(map(int, slots))} --hostfile")
    return RIGHT


class Server(http.server.BaseHTTPRequestHandler):
    """Answers as a fuzzer says, instead of the server of horovodrun."""

    answers = {}

    def do_PUT(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(b"")

    def do_GET(self):
        self._answer(self.answers[self.path.rpartition("/")[2]])

    def _answer(self, content):
        head = self.answers["head"]
        length = b"Content-Length: %d\r\n\r\n" % len(content)
        self.wfile.write(head or b"HTTP/1.0 200 OK\r\n" + length)
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        with pytest.MonkeyPatch.context() as patch:
            address, port = server.server_address
            patch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", address)
            patch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(port))
            yield
        server.shutdown()
        thread.join()


messages = st.one_of(
    fuzzing.damaged(b"17 host-1 250"), st.binary(max_size=40), st.just(b"")
)


@tries(
    full=3000,
    short=20,
    beat=messages,
    problem=messages,
    head=st.sampled_from(
        [b"", b"", b"", b"HTTP/1.0 404 No\r\n\r\n", b"\xff\n"]
    ),
)
@pytest.mark.usefixtures("server")
def test_messages_of_the_watchdog(beat, problem, head):
    """A rank that is lost is named, whatever stands in the messages."""
    peers = _watchdog.Peers(rank=0, size=2)
    Server.answers = {
        "rank1": b"16 host-1 249",
        "problem": b"",
        "head": b"",
    }
    peers.beat(1)
    Server.answers = {"rank1": beat, "problem": problem, "head": head}
    peers.beat(2)
    peers._next_heard -= 100
    found = peers.find_problem()
    if head:
        # The server has not answered, or not yet for long.
        assert found is None or "rank 1 on " in found
        return ERROR
    assert "\n" not in found
    if told := " ".join(problem.decode(errors="replace").split()):
        assert found == told
    else:
        assert found.startswith("rank 1 on ")
        assert " is lost: nothing has been heard of it for 100 s" in found
    return RIGHT
