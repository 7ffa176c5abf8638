"""Two hundred thousand rows through the bench that runs on ten million."""

from __future__ import annotations

import sys
from importlib import util
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench" / "t5_data.py"


@pytest.mark.slow
def test_memory_stays_flat_and_access_does_not_depend_on_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_HOME", str(BENCH.parents[1]))
    spec = util.spec_from_file_location("t5_data", BENCH)
    bench = util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "t5_data", bench)
    spec.loader.exec_module(bench)
    figures = bench.measure(200_000, 2000, tmp_path)
    assert figures.peak_rss_gib < 1.5
    assert figures.opening_ms < 1000
    # Other tests run beside this one, so a factor is all that can be asked of a time.
    assert figures.late_batch_ms < 3 * figures.first_batch_ms + 5
    assert figures.row_group_us > 100 * figures.row_us
