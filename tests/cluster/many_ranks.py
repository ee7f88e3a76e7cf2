"""Trains on 16 ranks of four hosts, loses a host, and resumes on 12 ranks.

    python -m tests.cluster.many_ranks

Counts the requests to horovodrun's server, and asks how many it can answer.
Then it watches the memory of rank 0 over 2,000 updates of two ranks. Needs
root, nftables, and what `tests/cluster/hosts` needs.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import pathlib
import re
import tempfile
import time

import psutil
from horovod.runner.http.http_server import RendezvousServer

from keras_lars._files import written_atomically
from tests.cluster.hosts import Cluster
from tests.cluster.job import LINK
from tests.cluster.job import Job
from tests.cluster.job import assert_nothing_runs
from tests.cluster.job import pid_of_rank
from tests.jobs.launcher import python
from tests.jobs.results import read_summary

SIXTEEN = ("-np", "16", "-H", "h1:4,h2:4,h3:4,h4:4", *LINK)
TWO = ("-np", "2", "-H", "h1:1,h2:1", *LINK)
TWELVE = ("-np", "12", "-H", "h1:4,h2:4,h4:4", *LINK)
LOST_HOST = "h3"
LOST_RANKS = range(8, 12)
UPDATES_PER_EPOCH = 4
# The batch is a multiple of 16 and of 12.
TRAIN = (
    "--config=demo",
    "--config.model.filters=2",
    "--config.global_batch_size=960",
    "--config.evaluate_every_epochs=100",
    "--config.checkpoint_every_epochs=10",
)
EPOCHS = 40
EPOCHS_BEFORE_LOSS = 20
# The memory of rank 0 of two is compared between these updates.
FIRST_UPDATE = 200
LAST_UPDATE = 2200
MEMORY_NOISE_MB = 20
# In seconds, for 16 ranks on two cores.
SECONDS_TO_START = 400
SECONDS_TO_END = 120
SECONDS_OF_COUNTING = 20
REQUESTS_OF_SERVER_TEST = 3000


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path)
    output = parser.parse_args().output
    result = {
        "command": "python -m tests.cluster.many_ranks",
        "cores": os.cpu_count(),
        "server_requests_per_second": round(server_requests_per_second()),
    }
    cluster = Cluster(4)
    try:
        with tempfile.TemporaryDirectory() as folder:
            result |= train(cluster, pathlib.Path(folder))
            result |= watch_memory(cluster, pathlib.Path(folder))
    finally:
        cluster.remove()
    print(json.dumps(result, indent=1))
    if output:
        with written_atomically(output) as path:
            path.write_text(json.dumps(result, indent=1) + "\n")


def train(cluster, folder):
    """Trains on 16 ranks, and on 12 after the loss; returns the figures."""
    workdir = folder / "run"
    command = (
        *python("horovod_recipes.train", *TRAIN),
        *(f"--config.epochs={EPOCHS}", f"--workdir={workdir}"),
    )
    count_connections(cluster)
    begin = time.monotonic()
    job = Job(cluster, folder, *SIXTEEN, *command, seconds=1000)
    wait_for_epoch(job, 1, SECONDS_TO_START)
    port = port_of_server(cluster)
    result = {
        "ranks": 16,
        "seconds_to_first_epoch": round(time.monotonic() - begin),
        "requests_to_start": connections(cluster, port),
    }
    wait_for_epoch(job, 3, SECONDS_TO_START)
    before, begin = connections(cluster, port), time.monotonic()
    time.sleep(SECONDS_OF_COUNTING)
    requests = connections(cluster, port) - before
    seconds = time.monotonic() - begin
    result["requests_per_second"] = round(requests / seconds, 1)
    wait_for_epoch(job, EPOCHS_BEFORE_LOSS, SECONDS_TO_START)
    result |= lose_host(cluster, job)
    return result | resume(cluster, folder, command, workdir)


def lose_host(cluster, job):
    assert "error: " not in job.output(), job.output()
    begin = time.monotonic()
    cluster.kill(LOST_HOST)
    assert job.process.wait(SECONDS_TO_END) == 1, job.output()
    seconds = time.monotonic() - begin
    errors = re.findall(r"error: .*", job.output())
    named = {int(n) for e in errors for n in re.findall(r"rank (\d+) on", e)}
    assert named, job.output()
    assert named <= set(LOST_RANKS), errors
    assert_nothing_runs(cluster, seconds=60)
    return {
        "seconds_to_end_after_loss": round(seconds, 1),
        "ranks_that_said_why": len(errors),
        "lost_ranks_named": sorted(named),
    }


def resume(cluster, folder, command, workdir):
    begin = time.monotonic()
    job = Job(cluster, folder, *TWELVE, *command, "--resume", seconds=2000)
    wait_for_epoch(job, 1, SECONDS_TO_START)
    seconds = time.monotonic() - begin
    assert job.process.wait() == 0, job.output()
    assert "error: " not in job.output(), job.output()
    assert_nothing_runs(cluster, seconds=60)
    summary = read_summary(workdir)
    assert summary["ranks"] == 12
    assert summary["steps"] == EPOCHS * UPDATES_PER_EPOCH
    return {"seconds_to_resume": round(seconds), "top1": summary["top1"]}


def watch_memory(cluster, folder):
    """Returns the memory of rank 0 before and after many updates."""
    epochs = LAST_UPDATE // UPDATES_PER_EPOCH + 20
    command = (
        *python("horovod_recipes.train", *TRAIN),
        *(f"--config.epochs={epochs}", f"--workdir={folder}/watched"),
    )
    job = Job(cluster, folder, *TWO, *command, seconds=2000)
    wait_for_epoch(job, 1, SECONDS_TO_START)
    rank0 = psutil.Process(pid_of_rank(cluster, "h1"))
    memory = []
    for updates in (FIRST_UPDATE, LAST_UPDATE):
        wait_for_epoch(job, 1 + updates // UPDATES_PER_EPOCH, 2000)
        memory.append(round(rank0.memory_info().rss / 2**20, 1))
    assert job.process.wait() == 0, job.output()
    assert memory[1] < memory[0] + MEMORY_NOISE_MB, memory
    return {
        "updates_watched": LAST_UPDATE - FIRST_UPDATE,
        "rank0_mb_before": memory[0],
        "rank0_mb_after": memory[1],
    }


def wait_for_epoch(job, number, seconds):
    """Waits for an epoch or a later one; returns the epoch that has begun."""
    end = time.monotonic() + seconds
    while True:
        found = re.findall(r"Epoch (\d+)/\d+\n", job.output())
        if found and int(found[-1]) >= number:
            return int(found[-1])
        assert job.process.poll() is None, job.output()
        assert time.monotonic() < end, job.output()
        time.sleep(0.2)


def count_connections(cluster):
    """Counts the connections to each port of h1, from now on."""
    cluster.run(
        "h1",
        "nft",
        "table inet count {"
        " set ports {"
        "  type inet_service; size 65535; flags dynamic; counter; };"
        " chain input {"
        "  type filter hook input priority 0;"
        "  tcp flags & (syn | ack) == syn add @ports { tcp dport }; }; }",
    )


def connections(cluster, port):
    """Returns how many connections a port has had; one for each request."""
    listing = cluster.run("h1", "nft", "list", "set", "inet", "count", "ports")
    return int(re.search(rf"\b{port} counter packets (\d+)", listing)[1])


def port_of_server(cluster):
    pid = pid_of_rank(cluster, "h1", rank=0)
    return psutil.Process(pid).environ()["HOROVOD_GLOO_RENDEZVOUS_PORT"]


def server_requests_per_second():
    """Returns how many requests the server of horovodrun answers, alone."""
    server = RendezvousServer()
    port = server.start()
    server.init([])

    def request(number):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/scope/{number % 16}", b"1 h1 5")
        connection.getresponse().read()
        connection.close()

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(request, range(REQUESTS_OF_SERVER_TEST)))
    seconds = time.monotonic() - begin
    server.stop()
    return REQUESTS_OF_SERVER_TEST / seconds


if __name__ == "__main__":
    main()
