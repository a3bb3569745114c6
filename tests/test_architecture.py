"""Who may import whom, read from the syntax tree; see CONTRIBUTING for the reasons."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUM = sorted((ROOT / "rum").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
PLATFORM = ("ray", "optuna", "mlflow", "psutil", "sqlalchemy")
COMPOSITION = ("hydra", "omegaconf")


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it: `from a.b import c` gives a.b.c."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def is_below(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def importers(*modules: str) -> set[str]:
    """Files of rum/ and pipelines/ that import any of `modules` or something below them."""
    return {
        shown(path)
        for path in (*RUM, *PIPELINES)
        if any(is_below(name, *modules) for name in imports(path))
    }


def files_below(*packages: str) -> Iterator[Path]:
    for path in RUM:
        if any(shown(path).startswith((f"{p}/", f"{p}.py")) for p in packages):
            yield path


@pytest.mark.parametrize("package", PLATFORM)
def test_only_rum_tune_imports_the_platform(package: str) -> None:
    found = importers(package)
    assert found, f"nothing imports {package}: this test looks for the wrong name"
    assert {path for path in found if not path.startswith("rum/tune/")} == set()


@pytest.mark.parametrize("package", COMPOSITION)
def test_only_configs_and_pipelines_import_hydra(package: str) -> None:
    expected = {"rum/configs.py", *map(shown, PIPELINES)}
    assert importers(package) == expected


def test_the_library_needs_torch_and_numpy_alone() -> None:
    foreign = {
        (shown(path), name.split(".")[0])
        for path in RUM
        if not shown(path).startswith("rum/tune/") and shown(path) != "rum/configs.py"
        for name in imports(path)
        if name.split(".")[0] not in {*sys.stdlib_module_names, "rum", "torch", "numpy"}
    }
    assert foreign == set()


# Layer by layer: files, and what of rum they may not import (or, alone, may).
FORBIDDEN = {
    ("rum/cells", "rum/layers", "rum/models"): (
        "rum.tasks",
        "rum.data",
        "rum.training",
        "rum.experiment",
        "rum.train",
        "rum.configs",
        "rum.tune",
    ),
    ("rum/tasks", "rum/data"): (
        "rum.cells",
        "rum.layers",
        "rum.models",
        "rum.kernels",
        "rum.training",
        "rum.experiment",
        "rum.train",
        "rum.configs",
        "rum.tune",
    ),
    ("rum/training",): (
        "rum.layers",
        "rum.models",
        "rum.data",
        "rum.experiment",
        "rum.train",
        "rum.configs",
        "rum.tune",
    ),
    ("rum/experiment", "rum/train"): ("rum.configs", "rum.tune", "pipelines"),
    ("rum/tune",): ("rum.configs", "pipelines"),
}


@pytest.mark.parametrize("layer", FORBIDDEN, ids=lambda layer: layer[0])
def test_a_layer_imports_nothing_above_it(layer: tuple[str, ...]) -> None:
    paths = list(files_below(*layer))
    assert len(paths) >= len(layer)
    wrong = {
        (shown(path), name)
        for path in paths
        for name in imports(path)
        if is_below(name, *FORBIDDEN[layer])
    }
    assert wrong == set()


def test_functions_and_kernels_import_nothing_of_rum_but_each_other() -> None:
    paths = list(files_below("rum/functional", "rum/kernels"))
    assert len(paths) >= 2
    wrong = {
        (shown(path), name)
        for path in paths
        for name in imports(path)
        if is_below(name, "rum") and not is_below(name, "rum.functional", "rum.kernels")
    }
    assert wrong == set()


def test_training_knows_cells_and_tasks_by_their_contracts_alone() -> None:
    wrong = {
        (shown(path), name)
        for path in files_below("rum/training")
        for name in imports(path)
        if is_below(name, "rum.cells", "rum.tasks")
        and not is_below(name, "rum.cells.base", "rum.tasks.base")
    }
    assert wrong == set()


def test_pipelines_import_hydra_omegaconf_and_rum_alone() -> None:
    assert len(PIPELINES) >= 4
    for path in PIPELINES:
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= {"hydra", "omegaconf", "rum"}, path
        assert "hydra" in roots


def test_pipelines_hold_no_branch_and_no_loop() -> None:
    for path in PIPELINES:
        (main,) = (node for node in tree(path).body if isinstance(node, ast.FunctionDef))
        branches = (ast.If, ast.For, ast.While, ast.Try, ast.IfExp, ast.comprehension)
        assert [node for node in ast.walk(main) if isinstance(node, branches)] == [], path


def test_no_import_is_relative() -> None:
    relative = {
        (shown(path), ast.unparse(node))
        for path in (*RUM, *PIPELINES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    }
    assert relative == set()


def test_no_import_is_for_types_only() -> None:
    found = {
        shown(path)
        for path in (*RUM, *PIPELINES)
        for node in ast.walk(tree(path))
        if "TYPE_CHECKING" in {getattr(node, key, "") for key in ("id", "attr", "name")}
    }
    assert found == set()


def test_the_folder_mlflow_holds_no_python() -> None:
    folder = ROOT / "mlflow"
    assert folder.is_dir()
    assert list(folder.rglob("*.py")) == []


def test_no_top_level_folder_is_a_package_but_rum() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"rum"}


@pytest.mark.parametrize("package", ["cells", "tasks"])
def test_every_file_of_a_registry_is_imported_by_its_package(package: str) -> None:
    folder = ROOT / "rum" / package
    reached: set[Path] = set()
    waiting = [folder / "__init__.py"]
    while waiting:
        path = waiting.pop()
        reached.add(path)
        for name in imports(path):
            if is_below(name, f"rum.{package}"):
                file = folder / f"{name.split('.')[2]}.py" if name.count(".") > 1 else path
                if file.is_file() and file not in reached:
                    waiting.append(file)
    assert reached == set(folder.glob("*.py"))


def test_importing_the_library_pulls_in_nothing_of_the_platform() -> None:
    code = f"import sys, rum; print([m for m in {(*PLATFORM, *COMPOSITION)} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_nothing_imports_what_unpickles() -> None:
    assert importers("pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib") == set()
    assert importers("ray.cloudpickle") == set()


def test_torch_load_is_called_in_one_place_and_for_weights_only() -> None:
    calls = [
        (shown(path), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for path in RUM
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "load")
    ]
    assert [path for path, _ in calls] == ["rum/training/checkpoint.py"]
    assert calls[0][1]["weights_only"] == "True"
