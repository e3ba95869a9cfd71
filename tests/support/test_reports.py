"""Skips are told, and are failures where nothing may be skipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROBE = """
import pytest
def test_skipped(): pytest.skip("no such client")
@pytest.mark.xfail
def test_expected(): assert False
"""
PROBE_MODULE = 'import pytest; pytest.skip("no such client", allow_module_level=True)'


def run(tmp_path: Path, source: str, require: str, *options: str) -> tuple[int, str]:
    """Run a test file of its own under the conftest of the project."""
    probe = tmp_path / "test_probe.py"
    probe.write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "--rootdir",
        str(ROOT),
        "-c",
        str(ROOT / "pyproject.toml"),
    ]
    env = {**os.environ, "PRESENCE_TEST_REQUIRE": require}
    env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *options, str(probe)], env=env, capture_output=True, text=True, timeout=50, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_a_skip_is_told_with_its_reason(tmp_path):
    code, out = run(tmp_path, PROBE, "")
    assert code == 0, out
    assert "1 skipped, 1 xfailed" in out
    assert "no such client" in out


@pytest.mark.parametrize(("source", "outcome"), [(PROBE, "1 failed, 1 xfailed"), (PROBE_MODULE, "1 error")])
def test_a_skip_is_a_failure_where_nothing_may_be_skipped(tmp_path, source, outcome):
    code, out = run(tmp_path, source, "all")
    assert code != 0
    assert outcome in out
    assert "no such client" in out
