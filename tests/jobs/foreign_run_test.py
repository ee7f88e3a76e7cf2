"""The commands that load the models of a stranger's work folder."""

import pytest

from horovod_recipes.configs import demo
from horovod_recipes.configs import simclr
from tests import malicious_models
from tests.jobs.launcher import TRAIN
from tests.jobs.launcher import python
from tests.jobs.launcher import run


@pytest.mark.parametrize(
    "make",
    [malicious_models.bytecode, malicious_models.system],
    ids=lambda f: f.__name__,
)
def test_resume_runs_no_code_of_a_checkpoint(tmp_path, make):
    folder, mark = tmp_path / "run" / "checkpoints", tmp_path / "mark"
    folder.mkdir(parents=True)
    config = demo.get_config()
    (tmp_path / "run" / "config.json").write_text(config.to_json())
    make(folder / "step-00000005.keras", mark)
    (folder / "step-00000005.json").write_text("{}")
    result = run(
        *(*TRAIN, "--config=demo", "--resume"),
        f"--config.hang_seconds={config.hang_seconds}",
        f"--workdir={tmp_path}/run",
    )
    assert result.returncode == 1
    assert "error: cannot load " in result.stderr
    assert not mark.exists()


def test_evaluate_runs_no_code_of_an_encoder(tmp_path):
    mark = tmp_path / "mark"
    config = simclr.get_config("digits")
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "summary.json").write_text('{"top1": 50.0}')
    malicious_models.bytecode(tmp_path / "encoder.keras", mark)
    result = run(*python("horovod_recipes.evaluate", f"--workdir={tmp_path}"))
    assert result.returncode == 1
    assert "error: cannot load " in result.stderr
    assert not mark.exists()
