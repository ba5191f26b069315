"""The quickstart runs as a reader would run it, on both stacks, and keeps what it has shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import nbformat
import pytest
from stacks import ROOT, MakeCluster


@pytest.mark.timeout(300)
def test_quickstart_runs_and_keeps_its_card_table_and_plot(make_cluster: MakeCluster, tmp_path: Path) -> None:
    config, kept = tmp_path / "config.json", tmp_path / "kept.ipynb"
    config.write_bytes(msgspec.json.encode(make_cluster(queue="default").config))
    done = subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "demo.py"), str(kept)],
        env={**os.environ, "YADTQ_CONFIG": str(config)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "succeeded  96 of 96" in done.stdout
    assert "accuracy" in done.stdout
    cells = nbformat.read(kept, as_version=4).cells
    shown = [output.data for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in data for data in shown)
    assert any("96 of 96" in data.get("text/html", "") for data in shown)
