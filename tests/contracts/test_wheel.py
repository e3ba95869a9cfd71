"""The wheel of `contracts/`: it has all it needs, and needs nothing of the server."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "contracts"

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"presence", "quart", "redis", "hypercorn", "aiokafka", "cassandra", "tests"}:
            raise ImportError(f"{name} is not to be had")

sys.meta_path.insert(0, Blocker())
from contracts.cli import main
main()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder in which the wheel is installed, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    # What a build leaves in its source is left in a copy.
    source = shutil.copytree(
        FOLDER, folder / "contracts", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True, timeout=50)
    (wheel,) = folder.glob("presence_contracts-*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True, timeout=50)
    return folder / "site"


def alone(installed, folder, *arguments):
    """Run the command from ``folder`` without any package of the server's."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKER, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_wheel_has_every_file_that_is_no_code(installed):
    of_folder = {
        path.relative_to(FOLDER)
        for path in FOLDER.rglob("*")
        if path.is_file() and not {"__pycache__", "build", "presence_contracts.egg-info"} & set(path.parts)
    }
    missing = {path for path in of_folder if not (installed / "contracts" / path).is_file()}
    assert missing == {Path("pyproject.toml")}
    assert (installed / "bin" / "presence-contracts").is_file()


def test_the_installed_command_works_without_the_server(installed, tmp_path):
    for arguments in (["list"], ["list", "--clauses"], ["show", "WATCH-01"], ["init", "mine.toml"], ["directory"]):
        code, out, err = alone(installed, tmp_path, *arguments)
        assert (code, err) == (0, ""), arguments
    assert "WATCH-01 " in alone(installed, tmp_path, "list", "--clauses")[1]
    assert (tmp_path / "mine.toml").read_text() == (FOLDER / "target.toml").read_text()
    code, out, err = alone(installed, tmp_path, "--version")
    assert (code, out) == (0, "0.1.0\n"), err


def test_the_installed_command_is_the_one_of_the_wheel(installed, tmp_path):
    code, out, _ = alone(installed, tmp_path, "show", "nothing")
    assert (code, out) == (2, "")
    where = subprocess.run(
        [sys.executable, "-c", "import contracts; print(contracts.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(installed)
