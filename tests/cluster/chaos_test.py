"""Six faults of `make chaos`, done to a job of four ranks on four hosts."""

from tests.cluster import chaos

FAULTS = (
    "SIGSTOP of a rank, 5 s",
    "second job on the workdir",
    "SIGKILL of a rank",
    "full disk",
    "link cut, for good",
    "SIGTERM to a rank",
)


def test_nothing_is_lost():
    """Each is named, and the weights equal those of an undisturbed job."""
    rows = chaos.run(seed=0, static=FAULTS, elastic=[], epochs=40)
    assert [row["fault"] for row in rows] == list(FAULTS)
    assert [row for row in rows if row["outcome"] == "FAILED"] == []
