"""The engine under gevent: the cases are in engine_cases.py, and run where gevent may patch everything."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("engine_cases.py")
CASES = [
    one.name
    for one in ast.parse(SOURCE.read_text()).body
    if isinstance(one, ast.FunctionDef) and not one.args.args and not one.args.kwarg and not one.decorator_list
]


@pytest.mark.parametrize("case", CASES)
def test_the_engine(case: str):
    code = f"from gevent import monkey; monkey.patch_all(); from tests.loadtest import engine_cases as c; c.{case}()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("Traceback") == run.stderr.count("ValueError: on purpose"), run.stderr
