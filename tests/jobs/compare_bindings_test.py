"""The comparison of both bindings ends, whatever a trial does."""

from tests.parallel import compare_bindings


def test_trial_without_end_is_said_to_hang(monkeypatch):
    monkeypatch.setattr(compare_bindings, "TIME_LIMIT_S", 1)
    trial = "`get_config`, `from_config`"
    assert compare_bindings.tried(trial, "ours") == {
        "kept": False,
        "text": "hangs: no end within 1 s",
    }
