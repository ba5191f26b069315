"""The compose file is valid and asks for what it needs. No Docker engine is here to start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

FILE = Path(__file__).parents[1] / "docker-compose.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(YAML(typ="safe").load(FILE))


def test_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FILE)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_service_has_a_health_check_and_a_pinned_image(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"kafka", "valkey", "worker", "jupyter"}
    for name, service in compose["services"].items():
        assert "healthcheck" in service, name
        assert "build" in service or ":" in service["image"], name


def test_named_volumes_keep_what_must_not_be_lost(compose: dict[str, Any]) -> None:
    mounted = {
        volume.split(":")[0] for service in compose["services"].values() for volume in service.get("volumes", ())
    }
    assert mounted == set(compose["volumes"]) == {"kafka", "valkey", "notebooks"}


def test_secret_comes_from_the_environment_and_is_asked_for_when_unset(compose: dict[str, Any]) -> None:
    for name in ("worker", "jupyter"):
        assert compose["services"][name]["environment"]["YADTQ_SECRET"].startswith("${YADTQ_SECRET:?set YADTQ_SECRET")


def test_workers_can_be_scaled(compose: dict[str, Any]) -> None:
    assert not {"container_name", "ports"} & set(compose["services"]["worker"])


def test_ports_are_open_to_this_machine_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_store_keeps_an_append_only_file_and_evicts_nothing(compose: dict[str, Any]) -> None:
    command = " ".join(compose["services"]["valkey"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
