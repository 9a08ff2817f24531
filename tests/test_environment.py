"""The lock, environment.yml, pyproject.toml, the Makefile and README say the same."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LINE = re.compile(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*")


@pytest.fixture(scope="module")
def project(root):
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def lock(root):
    lines = [
        line
        for line in (root / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    wrong = [line for line in lines if not LINE.fullmatch(line)]
    assert not wrong, f"expected name==version with no local part: {wrong}"
    versions = {
        canonicalize_name(name): version for name, version in (line.split("==") for line in lines)
    }
    assert len(versions) == len(lines)
    return versions


@pytest.fixture(scope="module")
def conda(root):
    return yaml.safe_load((root / "environment.yml").read_text())


def requirements(project):
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = [Requirement(each) for group in groups for each in group]
    return [each for each in found if each.name != project["name"]]  # an extra may name another


def test_the_lock_satisfies_the_project(project, lock):
    for requirement in requirements(project):
        if requirement.name == "triton":  # torch's CUDA builds pin their own
            continue
        version = lock.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in the lock"
        assert version in requirement.specifier, (
            f"the lock has {version}, pyproject.toml asks for {requirement}"
        )


def test_the_lock_can_build_the_project(root, lock):
    for each in tomllib.loads((root / "pyproject.toml").read_text())["build-system"]["requires"]:
        requirement = Requirement(each)
        assert lock[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_lock_is_what_is_installed(lock):
    from importlib.metadata import version

    installed = {name: version(name).split("+")[0] for name in lock}
    assert installed == lock


def test_the_imports_are_declared(root, project):
    """What a module of the library imports when it is loaded is required; what a function imports
    may be in an extra."""
    required = {canonicalize_name(Requirement(each).name) for each in project["dependencies"]}
    declared = {canonicalize_name(requirement.name) for requirement in requirements(project)}
    wrong = []
    for path in sorted((root / "jumprelu").rglob("*.py")):
        for package, at_top in imported_packages(ast.parse(path.read_text(encoding="utf-8"))):
            name = canonicalize_name({"yaml": "pyyaml"}.get(package, package))
            if name not in (required if at_top else declared):
                wrong.append(f"{path.relative_to(root)}: {package}")
    assert wrong == [], "imported by the library, and not among its dependencies"


def imported_packages(node, at_top=True):
    """(package, whether when the module is loaded), of packages that are neither Python's nor
    ours."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            names = [] if child.level else [child.module]
        elif isinstance(child, ast.If | ast.Try):  # for types alone, or where it is installed
            yield from imported_packages(child, at_top=False)
            continue
        else:
            inside = isinstance(child, ast.FunctionDef | ast.Lambda)
            yield from imported_packages(child, at_top and not inside)
            continue
        packages = {name.partition(".")[0] for name in names}
        yield from ((p, at_top) for p in packages - {"jumprelu"} - sys.stdlib_module_names)


def test_the_wheel_holds_the_library_alone(root, tmp_path):
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    for name in ("jumprelu", "notebooks/companion"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, copy], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {
        path.relative_to(copy).as_posix()
        for path in (copy / "jumprelu").rglob("*")
        if path.is_file() and path.name != ".DS_Store"
    }
    assert {"jumprelu/py.typed", "jumprelu/__main__.py"} < expected
    assert any(name.startswith("jumprelu/subject/") for name in expected)
    assert any(name.startswith("jumprelu/latents/assets/") for name in expected)
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_environment_is_the_lock_and_the_project(project, conda):
    python, pip_name, pip = conda["dependencies"]
    assert (
        conda["name"] == project["name"]
        and conda["channels"] == ["conda-forge"]
        and pip_name == "pip"
    )
    assert re.fullmatch(r"python=\d+\.\d+", python)
    assert python.split("=")[1] in Requirement("python" + project["requires-python"]).specifier
    assert pip == {"pip": ["-r requirements.lock", "-e ."]}


def test_make_has_the_targets_that_readme_and_help_name(root):
    makefile, readme = (root / "Makefile").read_text(), (root / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))
    shown = subprocess.run(
        ["make", "-C", str(root)], capture_output=True, text=True, check=True
    ).stdout  # help is the default
    assert targets and all(f"make {target}" in shown for target in targets)
    named = set(re.findall(r"`make ([a-z-]+)", readme)) | set(
        re.findall(r"^make ([a-z-]+)", readme, re.MULTILINE)
    )
    assert named <= targets, f"README names targets that the Makefile lacks: {named - targets}"
    assert {"reproduce", "test"} <= named


def test_ci_runs_the_test_command_of_readme_and_every_notebook(root):
    script = (root / ".ci/run").read_text()
    assert os.access(root / ".ci/run", os.X_OK)
    assert re.findall(r"^make .*", script, re.MULTILINE) == [
        "make test </dev/null",
        "make test-notebooks MINUTES=45 </dev/null",
    ]


def test_the_makefile_runs_what_is_there(root, tmp_path):
    """Every module and test file that it names; and its environment finds the companion."""
    makefile = (root / "Makefile").read_text()
    modules = set(re.findall(r"-m (companion[\w.]+)", makefile))
    assert {"companion.rails.reproduce", "companion.rails.checks"} <= modules
    for module in modules:
        assert (root / "notebooks" / (module.replace(".", "/") + ".py")).exists(), module
    for path in set(re.findall(r"\btests/[\w/.]+", makefile)):
        assert (root / path).exists(), path
    code = 'import companion, os; print(companion.__file__, os.environ["OMP_WAIT_POLICY"])'
    probe = tmp_path / "probe.mk"
    probe.write_text(f"include Makefile\nprobe:\n\t@{sys.executable} -c '{code}'\n")
    inherited = ("PYTHONPATH", "OMP_WAIT_POLICY")
    settings = {name: value for name, value in os.environ.items() if name not in inherited}
    command = ["make", "-C", str(root), "--no-print-directory", "-f", str(probe), "probe"]
    shown = subprocess.run(command, capture_output=True, text=True, env=settings)
    assert shown.stdout.split() == [str(root / "notebooks/companion/__init__.py"), "PASSIVE"]


def test_an_old_python_is_named(root, tmp_path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", "-C", str(root), "install", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    tried = subprocess.run(command, capture_output=True, text=True)
    assert (
        tried.returncode != 0
        and f"Python 3.11 or later is needed, and {old} is not one" in tried.stderr
    )
    assert not (tmp_path / "venv").exists()


@pytest.mark.network
def test_a_fresh_environment_imports_the_package(root, tmp_path, conda):
    """What conda does with environment.yml: its pip section as a requirements file, beside the file
    itself."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "requirements.lock", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    shutil.copytree(
        root / "jumprelu", copy / "jumprelu", ignore=shutil.ignore_patterns("__pycache__")
    )
    (copy / "pip.txt").write_text("\n".join(conda["dependencies"][-1]["pip"]) + "\n")
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings["PIP_NO_COMPILE"] = "1"  # half the time
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-r", "pip.txt"], check=True, cwd=copy, env=settings
    )
    code = (
        "import jumprelu, torch; from importlib import metadata; "
        "print(jumprelu.__file__, metadata.version('torch'))"
    )
    shown = subprocess.run(
        [python, "-c", code], check=True, cwd=tmp_path, env=settings, capture_output=True, text=True
    ).stdout
    assert shown.startswith(str(copy)) and shown.split()[-1].startswith(
        dict(lock_lines(root))["torch"]
    )
    subprocess.run([python, "-m", "pip", "check"], check=True, env=settings)


def lock_lines(root):
    return [
        line.split("==")
        for line in (root / "requirements.lock").read_text().splitlines()
        if LINE.fullmatch(line)
    ]
