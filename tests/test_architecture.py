"""Who may import whom, and what must not be there, read from the syntax trees."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "rum").rglob("*.py"))
PLATFORM = {"ray", "optuna", "mlflow"}


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def ours(path: Path) -> set[str]:
    """What a file imports of this package: the part after `rum.`."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("rum.")}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_platform_imports_ray_optuna_and_mlflow(path: Path) -> None:
    if "tune" not in path.parts:
        assert not packages(path) & PLATFORM
    if name_of(path) != "rum/configs.py":
        assert not packages(path) & {"hydra", "omegaconf"}


LOW = {"functional", "kernels", "checks", "errors", "seeding", "parameters"}
MAY_IMPORT = {
    "functional.py": set(),
    "kernels": {"functional", "kernels", "errors"},
    "cells": {"cells", "functional", "kernels", "checks", "errors"},
    "layers.py": {"cells", "checks"},
    "replicas.py": {"cells", "layers"},
    "models.py": {"cells", "layers", "checks", "errors"},
    "memory_network.py": {"cells", "checks", "errors"},
    "diagnostics.py": {"cells"},
    "plugins.py": {"errors"},
    "interop.py": {"cells", "layers"},
    "data": {"data", "errors"},
    "tasks": {"tasks", "data", "checks", "errors", "seeding"},
    "training": {"training", "tasks", "diagnostics", "checks", "errors"},
    "experiment.py": {
        "cells",
        "models",
        "memory_network",
        "plugins",
        "tasks",
        "training",
        *LOW,
    },
    "lanes.py": {"cells", "experiment", "models", "replicas", "tasks", "training", *LOW},
    "setting.py": {"checks"},
    "train.py": {"experiment", "setting", "tasks", "training", *LOW},
}


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_go_down_only(part: str) -> None:
    place = ROOT / "rum" / part
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        assert ours(path) <= MAY_IMPORT[part], name_of(path)


def test_training_names_no_task_and_no_cell() -> None:
    for path in (ROOT / "rum" / "training").glob("*.py"):
        concrete = {name for name in imports(path) if name.startswith("rum.tasks.")}
        assert concrete <= {f"rum.tasks.base{rest}" for rest in ("", ".Task", ".Totals")}


def test_nothing_imports_the_pipelines() -> None:
    for path in FILES:
        assert "pipelines" not in packages(path)


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=name_of)
def test_pipelines_are_glue(path: Path) -> None:
    assert packages(path) <= {"hydra", "omegaconf", "rum"}
    assert len(path.read_text().splitlines()) < 30


@pytest.mark.parametrize("folder", ["cells", "tasks"])
def test_every_cell_and_task_is_imported_by_its_package(folder: str) -> None:
    package = ROOT / "rum" / folder
    imported = imports(package / "__init__.py")
    for path in package.glob("*.py"):
        if "@register_" in path.read_text():
            assert f"rum.{folder}.{path.stem}" in imported


def test_the_folder_mlflow_does_not_shadow_the_package() -> None:
    assert not list((ROOT / "mlflow").rglob("*.py"))


def test_no_pickles_are_loaded() -> None:
    for path in FILES:
        assert not packages(path) & {"pickle", "cloudpickle", "dill", "joblib"}
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options["weights_only"] == "True", name_of(path)


def test_no_import_hides_behind_type_checking() -> None:
    for path in FILES:
        assert "TYPE_CHECKING" not in path.read_text(), name_of(path)


def test_the_library_needs_torch_alone() -> None:
    code = (
        "import sys, rum, rum.interop, rum.models, rum.experiment, rum.train, rum.tune.config\n"
        "heavy = {'ray', 'optuna', 'mlflow', 'hydra', 'omegaconf', 'triton', 'torch._dynamo'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
