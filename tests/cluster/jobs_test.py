"""Jobs on two hosts, while a link is cut, slowed down, and mended.

Run it as root: make test-cluster.
"""

import json
import re

import pytest

from tests.cluster.job import LINK
from tests.cluster.job import Job
from tests.cluster.job import assert_nothing_runs
from tests.jobs.launcher import python
from tests.jobs.results import read_summary

BOTH = ("-np", "2", "-H", "h1:1,h2:1", *LINK)
DEMO = ("--config=demo", "--config.model.filters=2")


def test_demo_trains_over_the_link_as_on_one_host(cluster, tmp_path):
    results = {}
    for name, hosts in (("two", BOTH), ("one", ("-np", "2"))):
        workdir = tmp_path / name
        job = Job(
            cluster,
            tmp_path,
            *hosts,
            *python("tests.cluster.compared_job", "--config=demo"),
            *("--config.model.filters=8", "--config.epochs=8"),
            *("--config.schedule.warmup_epochs=2", "--config.deterministic"),
            f"--workdir={workdir}",
        )
        status, _ = job.wait()
        assert status == 0, job.output()
        (line,) = re.findall(r'\{"weights": .*', job.output())
        top1 = read_summary(workdir)["top1"]
        results[name] = (*json.loads(line)["weights"], top1)
        assert_nothing_runs(cluster, seconds=10)
    first, second, top1 = results["two"]
    assert first == second
    # It was 66.1, and chance is 10.
    assert top1 > 50
    assert results["one"] == results["two"]


def test_slow_link_gives_the_same_result(cluster, tmp_path):
    changed = tmp_path / "changed"
    command = python("tests.cluster.allreduce_job", str(changed))
    job = Job(cluster, tmp_path, *BOTH, *command)
    job.wait_for("fast done")
    kinds = [cluster.slow_down(host) for host in cluster.hosts]
    try:
        changed.touch()
        status, _ = job.wait()
    finally:
        for host in cluster.hosts:
            cluster.speed_up(host)
    assert status == 0, job.output()
    results = [json.loads(r) for r in re.findall(r"\{.*\}", job.output())]
    assert len(results) == 2
    for result in results:
        assert result["is_right"]
        # 4 MB each way take 0.8 s at 40 Mbit/s.
        assert result["slow"] > 0.6
        assert result["slow"] > 3 * result["fast"]
    print(f"with {kinds[0]}: {results}")


def test_elastic_job_loses_a_host_and_takes_it_back(cluster, tmp_path):
    """The discovery script finds the hosts whose sshd answers."""
    discover = tmp_path / "discover.sh"
    discover.write_text(
        "#!/bin/bash\n"
        "for host in h1 h2; do\n"
        '  timeout 1 bash -c "< /dev/tcp/$host/22" && echo $host:1\n'
        "done 2> /dev/null\n"
    )
    discover.chmod(0o755)
    job = Job(
        cluster,
        tmp_path,
        *("-np", "2", "--min-np", "1", "--max-np", "2", *LINK),
        *("--host-discovery-script", str(discover)),
        *("--blacklist-cooldown-range", "2", "4"),
        *("--gloo-timeout-seconds", "60"),
        *python("tests.jobs.elastic_digits_job", "--epochs=8", "--pause=0.7"),
        seconds=600,
    )
    job.wait_for('"epoch": 1, "batch": 2')
    cluster.cut("h2")
    job.wait_for('"start", "ranks": 1', seconds=200)
    cluster.mend("h2")
    job.wait_for('"ranks": 1.*(?s:.*)"start", "ranks": 2', seconds=300)
    status, _ = job.wait()
    assert status == 0, job.output()
    events = [json.loads(e) for e in re.findall(r'\{"event".*\}', job.output())]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert {e["used_once"] for e in epochs} == {4000}
    assert {e["different_weights"] for e in epochs} == {1}
    (summary,) = [e for e in events if e["event"] == "summary"]
    assert summary["each_example_once"]
    assert summary["updates"] == 8 * 8
    assert summary["ranks"] == 2
    # An undisturbed job on one rank has 96.4.
    assert summary["top1"] == pytest.approx(96.4, abs=1.5)
    assert_nothing_runs(cluster, seconds=60)
