"""A teacher to ask, for the tests of distillation."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def service() -> ModuleType:
    """tests/services/teacher.py as a module."""
    path = Path(__file__).parents[2] / "services" / "teacher.py"
    spec = importlib.util.spec_from_file_location("teacher_service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["teacher_service"] = module
    spec.loader.exec_module(module)
    return module
