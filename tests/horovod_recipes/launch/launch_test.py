"""The launchers: what they start, how they stop it, whether they parse."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml
from horovod.runner.common.util import hosts

ROOT = pathlib.Path(__file__).parents[3]
LAUNCH = ROOT / "horovod_recipes/launch"
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "keras-lars",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "3",
}

# These replace the programs that the launchers start. The job writes down its
# threads, and exits with status 0 after SIGTERM.
HOROVODRUN = """#!/bin/bash
echo "$@" >> horovodrun.log
while [ "$1" != python ]; do shift; done
exec "$@"
"""
TRAIN = """
import os, pathlib, signal, sys, time
stopped = pathlib.Path("stopped")
signal.signal(signal.SIGTERM, lambda *_: stopped.write_text("by SIGTERM"))
pathlib.Path("threads").write_text(os.environ["TF_NUM_INTRAOP_THREADS"])
while pathlib.Path("wait").exists() and not stopped.exists():
    time.sleep(0.05)
sys.exit(pathlib.Path("fail").exists())
"""
SCONTROL = """#!/bin/bash
if [ "$*" = "show hostnames node[1-2]" ]; then
  printf 'node1\\nnode2\\n'
else
  echo "$@" >> scontrol.log
fi
"""


@pytest.fixture
def stage(tmp_path):
    """A folder to launch from, with these programs, and a run in `run`."""
    (tmp_path / "horovod_recipes").mkdir()
    (tmp_path / "horovod_recipes/train.py").write_text(TRAIN)
    (tmp_path / "run").mkdir()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, text in (
        ("horovodrun", HOROVODRUN),
        ("scontrol", SCONTROL),
        ("ssh", "#!/bin/bash\necho $* >> ssh.log\n"),
    ):
        (bin_ / name).write_text(text)
        (bin_ / name).chmod(0o755)
    (bin_ / "python").symlink_to(sys.executable)
    return tmp_path


def start(stage, *command, **environment):
    path = f"{stage / 'bin'}:{os.environ['PATH']}"
    return subprocess.Popen(
        command, cwd=stage, env=os.environ | {"PATH": path} | environment
    )


def wait_for(path):
    for _ in range(200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear in 20 seconds")


def start_slurm(stage, **environment):
    return start(
        stage,
        "bash",
        str(LAUNCH / "train.slurm"),
        WORKDIR=str(stage / "run"),
        **(SLURM | environment),
    )


def test_hostfile():
    assert hosts.parse_host_files(LAUNCH / "hostfile") == "localhost:2"
    result = subprocess.run(
        [
            pathlib.Path(sys.executable).with_name("horovodrun"),
            *("--gloo", "-np", "2", "--hostfile", LAUNCH / "hostfile"),
            *("bash", "-c", "echo rank $HOROVOD_RANK of $HOROVOD_SIZE"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [
        "[0]<stdout>:rank 0 of 2",
        "[1]<stdout>:rank 1 of 2",
    ]


def test_slurm_on_one_node(stage):
    arguments = "--config.seed=1 --config.epochs=2"
    job = start_slurm(stage, NIC="ib0", ARGS=arguments)
    assert job.wait(60) == 0
    assert (stage / "horovodrun.log").read_text() == (
        "--gloo -np 4 -H localhost:4 python -m horovod_recipes.train "
        f"--workdir={stage}/run --config=demo {arguments}\n"
    )
    assert (stage / "threads").read_text() == "3"


def test_slurm_on_two_nodes_after_a_requeue(stage):
    (stage / "run/config.json").touch()
    job = start_slurm(
        stage, SLURM_JOB_NUM_NODES="2", NIC="ib0", SLURM_RESTART_COUNT="1"
    )
    assert job.wait(60) == 0
    assert (stage / "horovodrun.log").read_text() == (
        "--gloo -np 8 -H node1:4,node2:4 --network-interface=ib0 "
        f"python -m horovod_recipes.train --workdir={stage}/run --config=demo "
        "--resume\n"
    )


@pytest.mark.parametrize("value", ["", "0", "4(x2)", "08", "a[$(touch x)]"])
@pytest.mark.parametrize(
    "name",
    ["SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"],
)
def test_slurm_without_a_number(stage, capfd, name, value):
    """For example, Slurm sets no tasks per node for --ntasks alone."""
    assert start_slurm(stage, **{name: value}).wait(60) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"error: {name} must be a number from 1 to 99999, but is '{value}'; "
        "submit with --nodes, --ntasks-per-node and --cpus-per-task"
    )
    assert not (stage / "horovodrun.log").exists()
    assert not (stage / "x").exists()


def test_slurm_with_another_number_of_hosts(stage, capfd):
    assert start_slurm(stage, SLURM_JOB_NUM_NODES="3").wait(60) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        "error: scontrol names the hosts 'node1:4,node2:4' of "
        "SLURM_JOB_NODELIST, which are not 3 nodes"
    )
    assert not (stage / "horovodrun.log").exists()


def test_slurm_gives_the_status_of_a_failed_job(stage):
    (stage / "fail").touch()
    assert start_slurm(stage).wait(60) == 1
    assert not (stage / "scontrol.log").exists()


@pytest.mark.parametrize(
    ("signal_number", "asked_of_slurm"),
    [(signal.SIGUSR1, "requeue 7\n"), (signal.SIGTERM, None)],
)
def test_slurm_stops_the_ranks(stage, signal_number, asked_of_slurm):
    (stage / "wait").touch()
    job = start_slurm(stage)
    wait_for(stage / "threads")
    job.send_signal(signal_number)
    assert job.wait(60) == 0
    assert (stage / "stopped").read_text() == "by SIGTERM"
    log = stage / "scontrol.log"
    assert (log.read_text() if log.exists() else None) == asked_of_slurm


def test_slurm_does_not_requeue_a_job_that_was_finished(stage):
    (stage / "wait").touch()
    (stage / "run/summary.json").touch()
    job = start_slurm(stage)
    wait_for(stage / "threads")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert not (stage / "scontrol.log").exists()


def read_mpijob():
    return yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())


def container(job, role):
    (one,) = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"][
        "containers"
    ]
    return one


def check_mpijob(job):
    schema = json.loads(
        (ROOT / "tests/horovod_recipes/launch/mpijob_schema.json").read_text()
    )
    jsonschema.validate(job, schema)


def test_mpijob_is_valid():
    job = read_mpijob()
    check_mpijob(job)
    # No schema checks that the ranks of a worker share its CPUs.
    worker = container(job, "Worker")
    cores = worker["resources"]["limits"]["cpu"]
    env = {e["name"]: e["value"] for e in container(job, "Launcher")["env"]}
    threads = cores // job["spec"]["slotsPerWorker"]
    assert env["TF_NUM_INTRAOP_THREADS"] == str(threads)
    (script,) = container(job, "Launcher")["args"]
    assert f"--config.dataset.threads={threads} " in script


def test_mpijob_runs_as_an_ordinary_user():
    """The image's user, whose home has the ssh keys, without capabilities."""
    image = (LAUNCH / "Dockerfile").read_text()
    ((uid, user),) = re.findall(
        r"useradd --create-home --uid (\d+) (\S+)", image
    )
    assert re.findall(r"^USER (.*)", image, re.MULTILINE)[-1] == user
    job = read_mpijob()
    keys = job["spec"]["sshAuthMountPath"]
    assert keys == f"/home/{user}/.ssh"
    assert f"'HostKey {keys}/id_rsa'" in image
    for role in ("Launcher", "Worker"):
        pod = job["spec"]["mpiReplicaSpecs"][role]["template"]["spec"]
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": int(uid),
            "fsGroup": int(uid),
        }
        assert container(job, role)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize(
    ("line", "mistake", "message"),
    [
        ("kubeflow.org/v2beta1", "kubeflow.org/v1", "v2beta1' was expected"),
        ("slotsPerWorker: 2", 'slotsPerWorker: "2"', "not of type 'integer'"),
        ("slotsPerWorker:", "slots:", "'slots' was unexpected"),
        ("Launcher:", "launcher:", "'launcher' was unexpected"),
        ("replicas: 1", "replicas: 2", "1 was expected"),
        ("restartPolicy: Never", "restartPolicy: Always", "'Always' is not"),
        ("runAsUser: 1000", 'runAsUser: "me"', "not of type 'integer'"),
        ("preStop:", "prestop:", "'prestop' was unexpected"),
        ("claimName: keras-lars", "claimName: 3", "3 is not of type 'string'"),
        ("memory: 16Gi", "memory: 16GB", "'16GB' does not match"),
        ('value: "2"', "value: 2", "2 is not of type 'string'"),
    ],
)
def test_mpijob_with_a_mistake_is_not(line, mistake, message):
    text = (LAUNCH / "mpijob.yaml").read_text()
    assert line in text
    with pytest.raises(jsonschema.ValidationError, match=message):
        check_mpijob(yaml.safe_load(text.replace(line, mistake)))


# mpi-operator writes such a file.
HOSTFILE = (
    "keras-lars-worker-0.keras-lars.default.svc slots=2\n"
    "keras-lars-worker-1.keras-lars.default.svc slots=2\n"
)


def start_launcher(stage, content=HOSTFILE):
    """Runs the launcher's script with this hostfile instead of /etc/mpi's."""
    hostfile = stage / "hostfile"
    hostfile.write_text(content)
    launcher = container(read_mpijob(), "Launcher")
    (script,) = launcher["args"]
    environment = {e["name"]: e["value"] for e in launcher["env"]}
    environment["WORKDIR"] = str(stage / "run")
    return start(
        stage,
        *launcher["command"],
        script.replace("/etc/mpi/hostfile", str(hostfile)),
        **environment,
    )


def test_horovod_reads_the_hostfile_of_an_mpijob(stage):
    hostfile = stage / "hostfile"
    hostfile.write_text(HOSTFILE)
    assert hosts.parse_hosts_and_slots(hosts.parse_host_files(hostfile))[1] == {
        "keras-lars-worker-0.keras-lars.default.svc": 2,
        "keras-lars-worker-1.keras-lars.default.svc": 2,
    }


@pytest.mark.parametrize("content", ["", "\n", "a\n", "a slots=x\n", "a:2\n"])
def test_mpijob_with_a_damaged_hostfile(stage, capfd, content):
    """Waiting for a host without a name would never end."""
    assert start_launcher(stage, content).wait(60) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"error: each line of {stage}/hostfile must be like 'worker-0 "
        "slots=2', as mpi-operator writes it"
    )
    assert not (stage / "horovodrun.log").exists()


def test_mpijob_launcher(stage):
    (stage / "run/summary.json").touch()
    assert start_launcher(stage).wait(60) == 0
    assert (stage / "ssh.log").read_text() == (
        "-o StrictHostKeyChecking=no "
        "keras-lars-worker-0.keras-lars.default.svc true\n"
        "-o StrictHostKeyChecking=no "
        "keras-lars-worker-1.keras-lars.default.svc true\n"
    )
    assert (stage / "horovodrun.log").read_text() == (
        f"--gloo -np 4 --hostfile {stage}/hostfile --network-interface eth0 "
        f"python -m horovod_recipes.train --workdir={stage}/run --config=demo "
        "--config.dataset.threads=4\n"
    )


def test_mpijob_waits_for_the_ranks_that_a_worker_stops(stage):
    (stage / "wait").touch()
    (stage / "run/config.json").touch()
    launcher = start_launcher(stage)
    wait_for(stage / "threads")
    launcher.terminate()
    time.sleep(1)
    assert launcher.poll() is None
    assert not (stage / "stopped").exists()
    command = container(read_mpijob(), "Worker")["lifecycle"]["preStop"]
    *shell, script = command["exec"]["command"]
    # Other jobs may run on this machine.
    ours = script.replace("train '", f"train --workdir={stage}/run '")
    assert ours != script
    assert start(stage, *shell, ours).wait(60) == 0
    assert (stage / "stopped").read_text() == "by SIGTERM"
    # Status 1 makes Kubernetes start it again. Then it resumes.
    assert launcher.wait(60) == 1
    assert (stage / "horovodrun.log").read_text().endswith(" --resume\n")


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck")
@pytest.mark.parametrize(
    "script", ["horovod_recipes/launch/train.slurm", "tests/slurm/run.sh"]
)
def test_shellcheck(script):
    subprocess.run(["shellcheck", ROOT / script], check=True, timeout=60)
