"""The quickstart runs as a reader would run it, on both stacks, and keeps what it has shown."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import nbformat
import pytest
from stacks import MakeCluster

sys.path.append(str(Path(__file__).parents[1] / "notebooks"))

import demo  # after its folder is on the path


@pytest.mark.timeout(300)
def test_quickstart_runs_and_keeps_its_card_table_and_plot(
    make_cluster: MakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_bytes(msgspec.json.encode(make_cluster(queue="default").config))
    monkeypatch.setenv("YADTQ_CONFIG", str(config))
    kept = tmp_path / "kept.ipynb"
    assert demo.main(kept) == 0
    notebook = nbformat.read(kept, as_version=4)
    card = demo.text_of(notebook, "card")
    assert "succeeded  96 of 96" in card
    assert "accuracy" in demo.text_of(notebook, "frame")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in output.data for output in outputs)
    assert any("96 of 96" in output.data.get("text/html", "") for output in outputs)
