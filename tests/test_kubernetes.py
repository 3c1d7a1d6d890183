"""The manifest for Kubernetes, without a cluster: what it says of the gateway is what the gateway has."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from gateway import __version__
from gateway.config import Config, load_file
from gateway.ops.watch import differing, states
from tests import mqtt_packets as mqtt
from tests.balancers import Program
from tests.harness import Broker, Device, eventually
from tests.pages import files_of
from tests.ports import free_port

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
MANIFEST = EXAMPLES / "kubernetes.yaml"
CONTAINERFILE = EXAMPLES.parent.parent / "Containerfile"
COMPOSE = EXAMPLES / "compose.yaml"
NAME = "mqtts-gateway"
INSTALLED = "/usr/bin/"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The objects by their kind; there is one of each."""
    objects = list(yaml.safe_load_all(MANIFEST.read_text()))
    by_kind = {each["kind"]: each for each in objects if each is not None}
    assert len(by_kind) == len([each for each in objects if each is not None])
    return by_kind


@pytest.fixture(scope="module")
def schemas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with kubernetes-validate, which brings the schemas of all versions."""
    directory = tmp_path_factory.mktemp("schemas")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
    subprocess.run([*pip, "--target", directory, "kubernetes-validate==1.37.0"], check=True)
    return directory


@pytest.fixture
def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["Deployment"]["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture
def config(manifest: dict[str, Any], tmp_path: Path) -> Config:
    """The ConfigMap's configuration, as the gateway reads it."""
    path = tmp_path / "gateway.toml"
    path.write_text(manifest["ConfigMap"]["data"]["gateway.toml"])
    return load_file(path)


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])


def test_the_objects_are_those_of_one_gateway(manifest: dict[str, Any]) -> None:
    """Each by the version of its API that Kubernetes 1.27 has, all by one name, selected by one label."""
    assert {kind: each["apiVersion"] for kind, each in manifest.items()} == {
        "ConfigMap": "v1",
        "Deployment": "apps/v1",
        "Service": "v1",
        "PodDisruptionBudget": "policy/v1",
        "NetworkPolicy": "networking.k8s.io/v1",
    }
    assert {each["metadata"]["name"] for each in manifest.values()} == {NAME}
    label = {"app.kubernetes.io/name": NAME}
    deployment = manifest["Deployment"]["spec"]
    assert deployment["template"]["metadata"]["labels"] == label
    assert deployment["selector"] == {"matchLabels": label}
    assert manifest["Service"]["spec"]["selector"] == label
    assert manifest["PodDisruptionBudget"]["spec"]["selector"] == {"matchLabels": label}
    assert manifest["NetworkPolicy"]["spec"]["podSelector"] == {"matchLabels": label}
    assert deployment["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"] == {"matchLabels": label}


def test_ports_are_those_of_the_configuration(
    manifest: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    """The container's, the Service's, the probes' and the NetworkPolicy's, by their names."""
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    (listener,) = config.listen
    assert ports == {"mqtt": port_of(listener.endpoint), "status": port_of(config.status.endpoint)}
    (service_port,) = manifest["Service"]["spec"]["ports"]
    assert (service_port["port"], service_port["targetPort"]) == (1883, "mqtt")
    probed = [container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")]
    assert probed == ["status", "status"]
    rules = manifest["NetworkPolicy"]["spec"]["ingress"]
    assert [rule["ports"][0]["port"] for rule in rules] == ["mqtt", "status"]
    assert "from" not in rules[0]
    assert rules[1]["from"]
    exposed = re.search(r"^EXPOSE (.*)$", CONTAINERFILE.read_text(), re.MULTILINE)
    assert exposed is not None
    assert set(exposed[1].split()) == {str(port) for port in ports.values()}


def test_every_file_of_the_configuration_is_mounted(
    pod: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    """Under the names that `kubectl create` of the remark at the top gives them."""
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert all(mount["readOnly"] for mount in container["volumeMounts"])
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts.values())
    files = [*config.tls.ca_file, config.tls.client_cert, config.tls.client_key, Path(container["args"][2])]
    assert {str(path.parent) for path in files if path is not None} == set(mounts)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    remark = MANIFEST.read_text().partition("---")[0]
    assert f"create configmap {volumes['ca']['configMap']['name']} --from-file={config.tls.ca_file[0].name}" in remark
    assert f"create secret tls {volumes['client']['secret']['secretName']} --cert=" in remark
    assert config.tls.client_cert is not None
    assert config.tls.client_key is not None
    # What a Secret of that type calls its two files.
    assert (config.tls.client_cert.name, config.tls.client_key.name) == ("tls.crt", "tls.key")
    # Octal, and for nobody beside the group that the volume is given to.
    assert volumes["client"]["secret"]["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_the_time_to_end_is_longer_than_the_drain(
    pod: dict[str, Any], container: dict[str, Any], config: Config
) -> None:
    """What has not ended by then is killed."""
    python, *_, program = container["lifecycle"]["preStop"]["exec"]["command"]
    assert python == f"{INSTALLED}python3"
    seconds = re.fullmatch(r"import time; time\.sleep\((\d+)\)", program)
    assert seconds is not None
    needed = int(seconds[1]) + config.drain.seconds + config.timeouts.close
    assert needed + 10 <= pod["terminationGracePeriodSeconds"]


def test_the_memory_is_enough_for_the_sessions(container: dict[str, Any], config: Config) -> None:
    """By the figures of docs/performance.md, with as much again to spare."""
    measured = (EXAMPLES.parent / "performance.md").read_text()
    base = re.search(r"Without a session it takes (\d+) MiB", measured)
    idle = re.search(r"^\| memory per idle session at 3,000 \| (\d+) \|", measured, re.MULTILINE)
    assert base is not None
    assert idle is not None
    needed = int(base[1]) + config.admission.max_sessions * int(idle[1]) / 1024
    limit = container["resources"]["limits"]["memory"]
    assert limit == container["resources"]["requests"]["memory"]
    assert 1.5 * needed < int(limit.removesuffix("Mi"))


def test_it_may_do_nothing_that_it_need_not(pod: dict[str, Any], container: dict[str, Any]) -> None:
    """What the Pod Security Standard "restricted" demands, and a bit more."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not any("hostPort" in port for port in container["ports"])
    user = re.search(r"^USER (\d+):(\d+)$", CONTAINERFILE.read_text(), re.MULTILINE)
    assert user is not None
    assert [int(user[1]), int(user[2])] == [pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]]


def test_the_image_is_of_this_version(container: dict[str, Any]) -> None:
    """As image.py and the compose file call it, in a registry."""
    assert container["image"] == f"registry.example.com/mqtts-gateway:{__version__}"
    assert yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]["image"].endswith(f"/mqtts-gateway:{__version__}")


def test_the_image_starts_what_the_pod_starts(container: dict[str, Any]) -> None:
    """The Containerfile's own command is the manifest's."""
    entry, arguments = (
        json.loads(re.search(rf"^{word} (.*)$", CONTAINERFILE.read_text(), re.MULTILINE)[1])
        for word in ("ENTRYPOINT", "CMD")
    )  # type: ignore[index]
    assert (entry, arguments) == (container["command"], container["args"])


def test_the_compose_file_gives_no_rights(config: Config) -> None:
    """The same restrictions as in the pod, more time to stop than the drain takes, and the directories of the image."""
    compose = yaml.safe_load(COMPOSE.read_text())
    service = compose["services"]["gateway"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "user", "network_mode"} & service.keys()
    assert int(service["stop_grace_period"].removesuffix("s")) >= config.drain.seconds + config.timeouts.close + 10
    places = [volume.split(":")[1] for volume in service["volumes"]]
    assert places == ["/etc/mqtts-gateway", "/var/lib/mqtts-gateway"]
    assert f"state/ {places[1]}/" in CONTAINERFILE.read_text()
    assert [volume.split(":")[0] for volume in service["volumes"]][1] in compose["volumes"]


def test_the_configuration_for_one_container_is_complete(tmp_path: Path) -> None:
    """That of docs/containers.md loads; its messages go to the volume, its status to the port that is published."""
    (tmp_path / "gateway.toml").write_text(files_of("containers.md")["gateway.toml"])
    config = load_file(tmp_path / "gateway.toml")
    service = yaml.safe_load(COMPOSE.read_text())["services"]["gateway"]
    ports = [config.listen[0].endpoint, config.status.endpoint]
    assert [int(each.rpartition(":")[2]) for each in service["ports"]] == [port_of(each) for each in ports]
    assert str(config.store.directory).startswith("/var/lib/mqtts-gateway/")


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.27", "1.37"])
def test_the_manifest_is_what_the_schema_of_kubernetes_says(version: str, schemas: Path) -> None:
    """No key is unknown and none is missing, in the oldest version that is named and the newest known."""
    environment = {**os.environ, "PYTHONPATH": str(schemas)}
    program = [sys.executable, "-c", "from kubernetes_validate.__main__ import main; main()"]
    command = [*program, "--strict", "--kubernetes-version", version, MANIFEST]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(" passed ") == 5


def test_a_secret_that_changes_is_noticed(tmp_path: Path) -> None:
    """The kubelet writes a new directory beside the old one and turns the link `..data`; no file's own path changes."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tls.crt").write_text("of the same length")
    data, mounted = tmp_path / "..data", tmp_path / "tls.crt"
    data.symlink_to("first")
    mounted.symlink_to("..data/tls.crt")
    before = states([mounted])
    assert differing(before, states([mounted])) == []
    (tmp_path / "..data_tmp").symlink_to("second")
    (tmp_path / "..data_tmp").rename(data)
    assert differing(before, states([mounted])) == [mounted]


# ---- the same, run


@pytest.fixture
def started(
    manifest: dict[str, Any],
    container: dict[str, Any],
    start_broker: Callable[..., Broker],
    ca: trustme.CA,
    ca_file: Path,
    tmp_path: Path,
) -> Iterator[tuple[Program, dict[str, int], Broker]]:
    """The pod's command with the pod's configuration, but for addresses, ports and places of files."""
    broker = start_broker()
    ports = {port["name"]: free_port() for port in container["ports"]}
    certificate = ca.issue_cert("gateway.example")
    chain, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    chain.write_bytes(b"".join(pem.bytes() for pem in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(str(key))
    text = manifest["ConfigMap"]["data"]["gateway.toml"]
    for old, new in {
        '"0.0.0.0:1883"': f'"127.0.0.1:{ports["mqtt"]}"',
        '"0.0.0.0:9883"': f'"127.0.0.1:{ports["status"]}"',
        'host = "broker.example.com"': f'host = "localhost"\nport = {broker.port}',
        "/etc/mqtts-gateway-ca/ca.pem": str(ca_file),
        "/etc/mqtts-gateway-client/tls.crt": str(chain),
        "/etc/mqtts-gateway-client/tls.key": str(key),
        "seconds = 30": "seconds = 2",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    program, *arguments = container["command"]
    installed = Path(sys.executable).with_name(program.removeprefix(INSTALLED))
    assert container["args"][:2] == ["run", "--config"]
    gateway = Program([sys.executable, str(installed), *arguments, "run", "--config", str(path)], tmp_path / "log")
    gateway.wait_for("listening for plain MQTT")
    yield gateway, ports, broker
    gateway.stop()


def asked(port: int, path: str) -> int:
    """Ask as the kubelet does; return the HTTP status."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            status: int = answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return status


def test_the_pods_command_serves_devices_and_probes(
    started: tuple[Program, dict[str, int], Broker], container: dict[str, Any]
) -> None:
    """It is alive and ready, a session stands, and SIGTERM ends it in order."""
    gateway, ports, broker = started
    probes = [container[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")]
    for path in probes:
        eventually(lambda path=path: asked(ports["status"], path) == 200, f"{path} is well")
    with Device(ports["mqtt"]) as device:
        device.send(mqtt.connect())
        assert device.read(4) == mqtt.connack()
        gateway.process.send_signal(signal.SIGTERM)
        device.socket.settimeout(20)
        assert device.read_to_end() == b""
    assert gateway.process.wait(20) in {0, -signal.SIGTERM}
    assert bytes(broker.connection().received) == mqtt.connect()
