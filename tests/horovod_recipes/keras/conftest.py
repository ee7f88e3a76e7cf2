"""A server through which the ranks of tests know each other."""

import pytest
from horovod.runner.http.http_server import KVStoreServer


@pytest.fixture
def server(monkeypatch):
    """A server like that of horovodrun."""
    server = KVStoreServer(verbose=0)
    port = server.start_server()
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", str(port))
    yield server
    server.shutdown_server()
