"""What monitoring systems are given: alerts for Prometheus, a dashboard for Grafana; held against the metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import Broker, RunningGateway
from tests.tools import require_tool

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
ALERTS = EXAMPLES / "prometheus-alerts.yml"
DASHBOARD = EXAMPLES / "grafana-dashboard.json"


def test_prometheus_accepts_the_alerts_and_raises_them_when_it_should(tmp_path: Path) -> None:
    """Promtool checks the file, and runs it on series in which each alert is due at a known time."""
    promtool = require_tool("promtool")
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    for command in (["check", "rules", ALERTS.name], ["test", "rules", "alerts_test.yml"]):
        result = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_is_tried() -> None:
    """None is there that was never seen to be raised."""
    named = set(re.findall(r"- alert: (\w+)", ALERTS.read_text()))
    tried = set(re.findall(r"alertname: (\w+)", Path(__file__).with_name("alerts_test.yml").read_text()))
    assert named == tried


@pytest.mark.parametrize("path", [ALERTS, DASHBOARD], ids=lambda path: path.name)
def test_what_is_asked_for_is_exported(
    path: Path, start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """Names and labels are those of a gateway that runs."""
    gateway = start_gateway(upstream=start_broker().port, status={"endpoint": "127.0.0.1:0"})
    port = gateway.service.status_port.port.getHost().port
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    exported = {family.name for family in families}
    exported |= {sample.name for family in families for sample in family.samples}
    # Counters that have no sample yet are told of without their suffix.
    exported |= {f"{family.name}_total" for family in families if family.type == "counter"}
    asked = set(re.findall(r"\b(?:mqtts_gateway|process)_\w+", path.read_text()))
    assert len(asked) > 5
    assert asked <= exported


def test_the_dashboard_is_one() -> None:
    """Every panel has a query, and none covers another."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert all(target["expr"] for panel in panels for target in panel["targets"])
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
