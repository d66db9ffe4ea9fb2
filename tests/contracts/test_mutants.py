"""The contract suite fails for a family that is wrong: each mutant is a family with one inserted error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutants import MUTANTS

SUITE = Path(__file__).with_name("test_identity.py")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_suite_fails_with(mutant):
    command = [sys.executable, "-m", "pytest", "-q", str(SUITE), "-k"]
    tests = "(exact_for_one_camera and dtype0) or rounding_for_several or prefix_is_shorter"
    command += [f"({tests}) and (tiny_smolvla or pi0) and not fast and not pi05"]
    environment = os.environ | {"GRIDS_MUTANT": mutant}
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert result.returncode == 1, result.stdout[-2000:]
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    for family in ("tiny_smolvla", "pi0"):
        for test in MUTANTS[mutant]:
            assert any(test in line and family in line for line in failed), (family, test, failed)
    # Broken, not unrunnable.
    assert "ERROR" not in result.stdout
