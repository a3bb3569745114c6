"""A model and a task of another package, found by its entry point, without any change here."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = '''
"""A ReLU network that starts at the identity (Le et al. 2015), and the adding problem."""
from dataclasses import dataclass
import torch, torch.nn.functional as F
from torch import nn
from rum.cells import Cell, CellConfig, StackConfig, register_model
from rum.tasks import Batch, Task, TaskConfig, register_task
from rum.tasks.copying import CopyingTask, CopyingConfig


class IRNNCell(Cell):
    def __init__(self, input_size, hidden_size, device=None, dtype=None):
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.weight_ih = nn.Parameter(
            torch.randn(hidden_size, input_size, device=device, dtype=dtype)
        )
        self.weight_hh = nn.Parameter(torch.eye(hidden_size, device=device, dtype=dtype))

    def initial_state(self, batch_size, *, device, dtype):
        return (torch.zeros(batch_size, self.hidden_size, device=device, dtype=dtype),)

    def step(self, projected, state, noise):
        new = torch.relu(F.linear(projected, self.weight_ih) + F.linear(state[0], self.weight_hh))
        return new, (new,)


@register_model
@dataclass(kw_only=True)
class IRNNConfig(StackConfig):
    name: str = "irnn"
    hidden_size: int = 8

    def build(self, input_size, *, device=None, dtype=None):
        return IRNNCell(input_size, self.hidden_size, device=device, dtype=dtype)


@register_task
@dataclass(kw_only=True)
class ShortCopyingConfig(CopyingConfig):
    name: str = "short_copying"
    delay: int = 3
'''


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """What an installation of the other package puts on the path."""
    (tmp_path / "rum_irnn.py").write_text(PLUGIN)
    about = tmp_path / "rum_irnn-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: rum-irnn\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rum.plugins]\nirnn = rum_irnn\n")
    return tmp_path


def run(folder: Path, pipeline: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "pipelines" / f"{pipeline}.py"), *overrides],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_a_model_and_a_task_of_another_package_are_trained_and_evaluated(installed: Path) -> None:
    done = run(
        installed,
        "train",
        "model=irnn",
        "task=short_copying",
        "task.batch_size=4",
        "task.steps_per_epoch=2",
        "training.max_epochs=1",
        "name=run",
    )
    assert done.returncode == 0, done.stderr
    parameters = 8 * 10 + 8 * 8 + 9 * 8 + 9
    assert f"{parameters} parameters" in done.stdout
    checkpoint = installed / "outputs" / "runs" / "run" / "step_000000002"

    done = run(installed, "evaluate", f"checkpoint={checkpoint}")
    assert done.returncode == 0, done.stderr
    assert "test/answer_accuracy" in done.stdout


def test_a_plugin_that_cannot_be_imported_is_named(installed: Path) -> None:
    (installed / "rum_irnn.py").write_text("import no_such_package\n")
    done = run(installed, "train", "model=rum")
    assert done.returncode == 1
    expected = "error: plugin 'irnn' (rum_irnn) cannot be loaded: ModuleNotFoundError: No module"
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
