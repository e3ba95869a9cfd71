"""What the tests of the contract run with Node."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import versions

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"


def node(package: str) -> str:
    """The path of Node, which has ``package`` at hand; skips the test without."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("JavaScript of the contract: there is no Node (20 or newer, with npm)")
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.strip()
    if int(version.lstrip("v").partition(".")[0]) < 20:
        pytest.skip(f"JavaScript of the contract: Node {version} is older than 20")
    about = MODULES / package / "package.json"
    if not about.exists():
        pytest.skip(f"JavaScript of the contract: {package} is not installed; `make test` does it where there is npm")
    versions.note("Node", version)
    versions.note(package, json.loads(about.read_text())["version"])
    return program
