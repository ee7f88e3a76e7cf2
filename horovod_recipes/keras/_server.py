"""The key-value server of `horovodrun`, through which ranks exchange messages.

Anyone who reaches the server can read it and write to it (docs/security.md).
"""

import contextlib
import http.client
import os
import socket

# Cap on requests per second, over all ranks: one Python process answers.
MAX_REQUESTS_PER_SECOND = 384
# Seconds that the server may take to answer.
TIMEOUT_SECONDS = 1.25
# Bytes of an answer that a rank reads. A stranger may have written more.
MAX_ANSWER_BYTES = 2**20
# Errors of a request that has not reached the server.
NOT_REACHED = (OSError, http.client.HTTPException)
# The name of this rank's host, for the others.
HOST = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()


def address():
    """Returns the host of the server, or None under MPI, which has none."""
    return os.environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")


def request(method, path, body=None):
    """Writes or reads one key.

    Args:
        method: String, "PUT" or "GET".
        path: String, the scope and the key: "/SCOPE/KEY".
        body: Bytes to write.

    Returns:
        Bytes: the value, empty after a "PUT". None if the key has no value.
    """
    port = int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
    connection = http.client.HTTPConnection(
        address(), port, timeout=TIMEOUT_SECONDS
    )
    with contextlib.closing(connection):
        connection.request(method, path, body)
        response = connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES)
    return answer if response.status == http.client.OK else None
