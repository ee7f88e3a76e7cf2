"""Hosts on one machine: network namespaces with addresses and sshd.

Each host has one link, `eth0`, to a switch. The switch is a bridge in its own
namespace, so no packet leaves the cluster. All hosts share the machine's files.
This needs root, Linux, iproute2 and openssh-server. As a program it says what
this machine lacks: python -m tests.cluster.hosts.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

PREFIX = "horovod-test-"
ETC = pathlib.Path("/etc/netns")
# The name of the table that drops packets.
LOSS = "loss"
# In seconds. ssh and sshd give up after three of these without an answer. Gloo
# gives up after 30 seconds, so the ranks can still say why.
SSH_ALIVE_SECONDS = 15

_clusters = itertools.count()


class Cluster:
    """Hosts `h1`, `h2`, ... that exist until `remove`.

    Args:
        size: Integer, the number of hosts.
    """

    def __init__(self, size):
        remove_stale()
        self._prefix = f"{PREFIX}{os.getpid()}-{next(_clusters)}-"
        self.hosts = [f"h{n}" for n in range(1, size + 1)]
        self._folder = pathlib.Path(tempfile.mkdtemp(prefix=PREFIX))
        self._sshd = []
        try:
            self._create_keys()
            self._create_switch()
            for number, host in enumerate(self.hosts, start=1):
                self._create_host(host, number)
            for host in self.hosts:
                self._start_sshd(host)
        except BaseException:
            self.remove()
            raise

    def popen(self, host, *command, **kwargs):
        """Starts a command on a host; returns its `subprocess.Popen`."""
        name = self.namespace(host)
        return subprocess.Popen(
            ["ip", "netns", "exec", name, *command], **kwargs
        )

    def run(self, host, *command, seconds=60):
        """Runs a command on a host to its end; returns its output."""
        name = self.namespace(host)
        return subprocess.run(
            ["ip", "netns", "exec", name, *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=seconds,
        ).stdout

    def cut(self, host):
        """Disconnects a host from the switch."""
        _ip("-n", self.namespace("switch"), "link", "set", host, "down")

    def mend(self, host):
        """Connects a host to the switch again."""
        _ip("-n", self.namespace("switch"), "link", "set", host, "up")

    def slow_down(self, host):
        """Limits a host to sending 40 Mbit/s, with 10 ms delay if possible.

        Returns:
            `"netem"`, or `"tbf"`, without delay, if the kernel has no netem.
        """
        link = ("-n", self.namespace(host), "qdisc", "add", "dev", "eth0")
        try:
            _run(
                "tc", *link, "root", "netem", "delay", "10ms", "rate", "40mbit"
            )
            return "netem"
        except RuntimeError:
            limits = ("rate", "40mbit", "burst", "32k", "latency", "400ms")
            _run("tc", *link, "root", "tbf", *limits)
            return "tbf"

    def limit(self, host, rate):
        """Limits what a host sends, for example to `"1gbit"`."""
        link = ("-n", self.namespace(host), "qdisc", "add", "dev", "eth0")
        # A smaller bucket would empty between two ticks of the kernel's clock.
        limits = ("rate", rate, "burst", "1mb", "latency", "100ms")
        _run("tc", *link, "root", "tbf", *limits)

    def lose_packets(self, host, percent):
        """Drops so many of the packets that a host sends; needs nftables."""
        chain = "type filter hook output priority 0;"
        rule = f"numgen random mod 100 < {percent} drop;"
        table = f"table inet {LOSS} {{ chain output {{ {chain} {rule} }}; }}"
        self.run(host, "nft", table)

    def keep_packets(self, host):
        self.run(host, "nft", "delete", "table", "inet", LOSS)

    def speed_up(self, host):
        name = self.namespace(host)
        _run("tc", "-n", name, "qdisc", "delete", "dev", "eth0", "root")

    def pids(self, host):
        """Returns a host's processes, except the `sshd` that listens."""
        output = _ip("netns", "pids", self.namespace(host))
        servers = {server.pid for server in self._sshd}
        return sorted({int(pid) for pid in output.split()} - servers)

    def kill(self, host):
        """Ends a host's processes, except the `sshd` that listens."""
        while pids := self.pids(host):
            _kill(pids)

    def namespace(self, host):
        return f"{self._prefix}{host}"

    def remove(self):
        """Ends all processes of the hosts, and removes the hosts."""
        for name in namespaces():
            if name.startswith(self._prefix):
                remove_namespace(name)
        for server in self._sshd:
            server.wait()
        shutil.rmtree(self._folder)

    def _create_keys(self):
        for name in ("host", "user"):
            path = str(self._folder / name)
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path)

    def _create_switch(self):
        name = self.namespace("switch")
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", name, "link", "set", "bridge", "up")

    def _create_host(self, host, number):
        name, switch = self.namespace(host), self.namespace("switch")
        _ip("netns", "add", name)
        cable = ("eth0", "netns", name, "type", "veth", "peer", "name", host)
        _ip("link", "add", *cable, "netns", switch)
        _ip("-n", switch, "link", "set", host, "master", "bridge", "up")
        _ip(
            "-n",
            name,
            "address",
            "add",
            f"{_address(number)}/24",
            "dev",
            "eth0",
        )
        for link in ("lo", "eth0"):
            _ip("-n", name, "link", "set", link, "up")
        self._write_etc(host, number)

    def _write_etc(self, host, number):
        """Writes files that replace the machine's in a host's /etc."""
        etc = ETC / self.namespace(host)
        (etc / "ssh").mkdir(parents=True)
        names = [
            f"{_address(n)} {other}" for n, other in enumerate(self.hosts, 1)
        ]
        # Gloo looks up the machine's own name. It must not get loopback.
        names += [f"{_address(number)} {socket.gethostname()}"]
        (etc / "hosts").write_text(
            "\n".join(["127.0.0.1 localhost", *names, ""])
        )
        (etc / "ssh" / "ssh_config").write_text(
            f"IdentityFile {self._folder}/user\n"
            "StrictHostKeyChecking no\n"
            "UserKnownHostsFile /dev/null\n"
            "LogLevel ERROR\n"
            f"ServerAliveInterval {SSH_ALIVE_SECONDS}\n"
        )
        (etc / "ssh" / "sshd_config").write_text(
            f"ListenAddress {_address(number)}\n"
            f"HostKey {self._folder}/host\n"
            f"AuthorizedKeysFile {self._folder}/user.pub\n"
            f"PidFile none\n"
            "PermitRootLogin prohibit-password\n"
            "StrictModes no\n"
            f"ClientAliveInterval {SSH_ALIVE_SECONDS}\n"
        )

    def _start_sshd(self, host):
        pathlib.Path("/run/sshd").mkdir(exist_ok=True)
        log = (self._folder / f"{host}.log").open("w")
        with log:
            self._sshd.append(
                self.popen(host, shutil.which("sshd"), "-D", "-e", stderr=log)
            )
        number = self.hosts.index(host) + 1
        end = time.monotonic() + 20
        while self._sshd[-1].poll() is None and time.monotonic() < end:
            try:
                self.run(
                    host, "bash", "-c", f"< /dev/tcp/{_address(number)}/22"
                )
                return
            except subprocess.CalledProcessError:
                time.sleep(0.1)
        raise RuntimeError(
            f"no sshd on {host}: {pathlib.Path(log.name).read_text()}"
        )


def remove_stale():
    """Removes the hosts of killed test runs."""
    for name in namespaces():
        pid = name.removeprefix(PREFIX).partition("-")[0]
        if (
            name.startswith(PREFIX)
            and not pathlib.Path(f"/proc/{pid}").exists()
        ):
            remove_namespace(name)


def namespaces():
    lines = _ip("netns", "list").splitlines()
    return [line.split()[0] for line in lines]


def remove_namespace(name):
    """Kills the processes of a namespace, and removes it."""
    while pids := _ip("netns", "pids", name).split():
        _kill(pids)
    _ip("netns", "delete", name)
    shutil.rmtree(ETC / name, ignore_errors=True)


def _kill(pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.1)


def _address(number):
    return f"10.77.0.{number}"


def _ip(*arguments):
    return _run("ip", *arguments)


def _run(*command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout


def why_not():
    """Returns why this machine cannot have such hosts; None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if " " in str(pathlib.Path(__file__).resolve()):
        return (
            "needs a clone in a folder without a space in its name, because "
            "horovodrun does not quote it for other hosts"
        )
    for program, package in (
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("sshd", "openssh-server"),
        ("ssh", "openssh-client"),
    ):
        if not shutil.which(program):
            return f"needs {program}: apt-get install {package}"
    try:
        cluster = Cluster(2)
    except RuntimeError as error:
        return str(error)
    cluster.remove()
    return None


if __name__ == "__main__":
    sys.exit(why_not())
