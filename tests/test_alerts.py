"""What operators plug in: alerts for Prometheus, a dashboard for Grafana, items for Zabbix, rotation of a log."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.harness import PATIENCE, Broker, RunningGateway, eventually
from tests.tools import require_tool

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
ALERTS = EXAMPLES / "prometheus-alerts.yml"
DASHBOARD = EXAMPLES / "grafana-dashboard.json"
ZABBIX = EXAMPLES / "zabbix-agent.conf"
LOGROTATE = EXAMPLES / "logrotate.conf"


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


def test_a_zabbix_agent_gets_metrics_and_readiness(
    tmp_path: Path, start_gateway: Callable[..., RunningGateway], start_broker: Callable[..., Broker]
) -> None:
    """The real agent, asked for one item at a time; what is not there is an error to it, and not 0."""
    agent = require_tool("zabbix_agentd")
    require_tool("curl")
    gateway = start_gateway(upstream=start_broker().port, status={"endpoint": "127.0.0.1:0"})
    port = gateway.service.status_port.port.getHost().port
    configuration = tmp_path / "zabbix.conf"

    def item(key: str) -> str:
        command = [agent, "-c", str(configuration), "-t", key]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    configuration.write_text("Hostname=box\n" + ZABBIX.read_text().replace("127.0.0.1:9883", f"127.0.0.1:{port}"))
    assert item("mqtts_gateway.metric[upstream_up]").endswith("[t|1]")
    assert item("mqtts_gateway.metric[sessions]").endswith("[t|0]")
    assert item("mqtts_gateway.ready").endswith("[t|1]")
    assert not re.search(r"\[t\|\d+\]$", item("mqtts_gateway.metric[no_such_metric]"))
    configuration.write_text("Hostname=box\n" + ZABBIX.read_text().replace("127.0.0.1:9883", "127.0.0.1:1"))
    assert item("mqtts_gateway.ready").endswith("[t|0]")


def test_a_log_in_a_file_is_rotated_while_the_gateway_writes(tmp_path: Path) -> None:
    """By the real logrotate: the old lines are in the copy, and what comes later begins the file anew."""
    logrotate = require_tool("logrotate")
    log, rules = tmp_path / "gateway.log", tmp_path / "logrotate.conf"
    rules.write_text(LOGROTATE.read_text().replace("/var/log/mqtts-gateway.log", str(log)))
    rules.chmod(0o600)
    console = "import sys; from gateway.cli.main import console; sys.exit(console())"
    with log.open("ab") as output:
        words = [sys.executable, "-c", console, "run", "--upstream", "localhost:1", "--listen", "127.0.0.1:0"]
        running = subprocess.Popen(words, stdout=output, stderr=output)
    try:
        eventually(lambda: "listen" in log.read_text(), "the gateway listens")
        command = [logrotate, "--force", "--state", str(tmp_path / "state"), str(rules)]
        subprocess.run(command, check=True)
        assert "listen" in log.with_name("gateway.log.1").read_text()
        running.terminate()
        running.wait(PATIENCE)
    finally:
        running.kill()
    assert log.read_bytes().startswith(b"20"), "a line that begins with its time"
    assert "stopping" in log.read_text()
    assert "listen" not in log.read_text()


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
