"""What a reload prepares: what did not change is neither read nor built again."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from attrs import evolve

from gateway.config import Config, DeviceRule, changed_keys, from_mapping, load_file
from gateway.config import directory as rule_files
from gateway.config.directory import RuleFiles
from gateway.errors import ConfigError, EndReason, Refusal
from gateway.mqtt.connect import parse_connect
from gateway.mqtt.packets import PacketType
from gateway.mqtt.reader import PacketReader
from gateway.ops.watch import Watch
from gateway.pieces import in_order, merging_at_once, no_pause
from gateway.prepared import Prepared, free, prepare
from gateway.rules import credentials
from gateway.rules.rules import Caller
from gateway.tls import trust
from tests import mqtt_packets as mqtt
from tests.pki import CLIENT, certify, certify_ca

RULES = 5


class Files:
    """A configuration with a directory of rules, each with a certificate of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.known = RuleFiles()
        ca = certify_ca()
        ca.write(directory / "ca.pem")
        (directory / "devices").mkdir()
        for number in range(RULES):
            path = directory / "devices" / f"d{number}.pem"
            certify(ca, subject=f"d{number}", names=(), purposes=(CLIENT,)).write(path)
            (directory / "devices" / f"d{number}.toml").write_text(f'client_cert = "d{number}.pem"')
        (directory / "gateway.toml").write_text(
            '[[upstream]]\nhost = "localhost"\n[tls]\nca_file = "ca.pem"\n[devices]\ndirectory = "devices"\n'
        )

    def load(self) -> Config:
        """Load the configuration, as a reload does."""
        return load_file(self.directory / "gateway.toml", known=self.known)

    def prepare(self, before: Prepared | None = None) -> Prepared:
        """Prepare the configuration of this moment."""
        return prepare(self.load(), lambda: 0.5, before=before)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """Files that were written long ago."""
    monkeypatch.setattr(rule_files, "_UNSETTLED", 0.0)
    return Files(tmp_path)


def test_what_did_not_change_is_not_read_again(files: Files) -> None:
    """Neither rules nor keys, nor is anything built anew."""
    before = files.prepare()
    with (
        patch.object(rule_files, "read_table", side_effect=AssertionError("a rule is read")),
        patch.object(credentials, "read_client_identity", side_effect=AssertionError("a key is read")),
        patch.object(trust, "read_roots", side_effect=AssertionError("the roots are read")),
    ):
        after = files.prepare(before)
    assert after.is_equivalent
    assert not after.changed
    assert after.policy is before.policy
    assert list(after.policies.all) == list(before.policies.all)
    assert [id(device) for device in after.config.device] == [id(device) for device in before.config.device]
    assert list(after.rules) == list(before.rules)


def test_of_many_rules_only_the_changed_one_is_read(files: Files) -> None:
    """Its certificate was renewed; the others keep what they have."""
    before = files.prepare()
    renewed = files.directory / "devices" / "d3.pem"
    certify(certify_ca(), subject="d3", names=(), purposes=(CLIENT,)).write(renewed)
    with patch.object(credentials, "read_client_identity", wraps=credentials.read_client_identity) as read:
        after = files.prepare(before)
    assert read.call_count == 1
    assert not after.is_equivalent
    assert after.changed == [str(renewed)]
    same = [after.policies.get(device) is before.policies.get(device) for device in before.config.device]
    assert same == [True, True, True, False, True]


def test_a_changed_rule_is_read_again(files: Files) -> None:
    """A new one, one that is gone and one that is another."""
    files.load()
    directory = files.directory / "devices"
    (directory / "d0.toml").unlink()
    (directory / "d1.toml").write_text("max_qos = 1")
    (directory / "d9.toml").write_text("max_qos = 0")
    with patch.object(rule_files, "read_table", wraps=rule_files.read_table) as read:
        config = files.load()
    assert sorted(call.args[0].name for call in read.call_args_list) == ["d1.toml", "d9.toml"]
    assert {device.name: device.max_qos for device in config.device} == {"d1": 1, "d2": 2, "d3": 2, "d4": 2, "d9": 0}


def test_sessions_are_not_judged_as_before_if_a_named_broker_changed(files: Files) -> None:
    """What changed is told by its name; it is a broker all the same."""
    path = files.directory / "gateway.toml"
    named = path.read_text().replace("[[upstream]]", '[[upstream]]\nname = "cloud"')
    path.write_text(named)
    before = files.prepare()
    path.write_text(named.replace('name = "cloud"', 'name = "cloud"\nport = 1'))
    after = files.prepare(before)
    assert after.changed == ['upstream "cloud".port']
    assert not after.is_equivalent


def test_a_rule_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """It could be written once more within the precision of its times, with the same size."""
    files = Files(tmp_path)
    files.load()
    with patch.object(rule_files, "read_table", wraps=rule_files.read_table) as read:
        files.load()
    assert read.call_count == RULES


def test_another_profile_makes_other_rules(files: Files) -> None:
    """Its values are in each of them."""
    files.load()
    config = files.directory / "gateway.toml"
    config.write_text(config.read_text() + 'profile = "aws-iot"\n')
    assert {device.max_qos for device in files.load().device} == {1}


def test_a_file_that_was_given_its_old_date_is_read_again(files: Files) -> None:
    """The time of its last change says so."""
    before = files.prepare()
    path = files.directory / "devices" / "d0.pem"
    times = path.stat()
    certify(certify_ca(), subject="d0", names=(), purposes=(CLIENT,)).write(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.prepare(before).changed == [str(path)]


def test_pieces_are_sorted_like_the_whole() -> None:
    """Across the bounds of the pieces, and what is equal stays in its order."""
    things = [(number * 7919 % 1009, number) for number in range(2500)]
    assert in_order(things, no_pause) == sorted(things)
    assert in_order([], no_pause) == []


BROKEN = (
    ("max_qos = 7", ["d1"]),
    ("max_qos =", ["d1"]),
    ("", ["d1"]),
    ('match_client_id = ["pump-*", "x"]\nmax_qos', ["pump-7", "x"]),
    ('match_client_id = [\n"x",\n]\ncolour = 1', ["x"]),
    ('match_client_id = "x"\nupstream = "nowhere"', ["x"]),
    ('match_client_id = "x"\nmatch_listener = "nowhere"', ["x"]),
)


@pytest.mark.parametrize(("text", "refused"), BROKEN)
def test_a_broken_rule_file_is_its_own_devices_matter(files: Files, text: str, refused: list[str]) -> None:
    """They are refused, whatever else would match them, and all others go by their rules."""
    path = files.directory / "devices" / "d1.toml"
    path.write_text(text)
    prepared = files.prepare()
    (problem,) = prepared.refused.values()
    assert str(path) in problem
    for name in refused:
        assert matched(prepared, name) in prepared.refused
    for name in ("d0", "d2", "d4"):
        assert matched(prepared, name) not in prepared.refused
    assert matched(prepared, "stranger") is None
    with pytest.raises(ConfigError):
        load_file(files.directory / "gateway.toml")


@pytest.mark.parametrize(("text", "refused"), BROKEN)
def test_a_rule_file_that_breaks_is_no_reason_to_refuse_a_reload(files: Files, text: str, refused: list[str]) -> None:
    """Nor is its repair: either takes effect with the next reload, whatever the rule said before."""
    path = files.directory / "devices" / "d1.toml"
    path.write_text('publish = ["a/#"]\nsubscribe = ["a/#"]\nmax_packet_size = 1000\n')
    right = files.prepare()
    path.write_text(text)
    broken = files.prepare(before=right)
    assert all(matched(broken, name) in broken.refused for name in refused)
    path.write_text('publish = ["a/#"]')
    repaired = files.prepare(before=broken)
    assert not repaired.refused
    rule = matched(repaired, "d1")
    assert rule is not None
    assert rule.publish == ("a/#",)
    assert broken.changed[0].startswith("device")
    assert repaired.changed[0].startswith("device")


@pytest.mark.parametrize("name", ["d1.toml", "d1.pem"])
def test_what_is_no_regular_file_is_its_own_devices_matter(files: Files, name: str) -> None:
    """A FIFO in the place of a rule or a certificate does not block the reload."""
    before = files.prepare()
    path = files.directory / "devices" / name
    path.unlink()
    os.mkfifo(path)
    (files.directory / "devices" / "d2.toml").write_text("enabled = false")
    prepared = files.prepare(before)
    assert [f"{path}" in problem and "it is a FIFO" in problem for problem in prepared.refused.values()] == [True]
    assert matched(prepared, "d0") not in prepared.refused
    assert matched(prepared, "d1") in prepared.refused
    with pytest.raises(Refusal, match="device-disabled"):
        matched(prepared, "d2")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"match_client_id = [", b"match_client_id = 5\n"])
def test_a_file_that_does_not_say_whom_it_is_for_may_be_for_anybody(files: Files, content: bytes) -> None:
    """Devices that no other file names are refused: one of them may be meant."""
    (files.directory / "devices" / "d1.toml").write_bytes(content)
    prepared = files.prepare()
    assert matched(prepared, "d0") not in prepared.refused
    assert matched(prepared, "d2") not in prepared.refused
    for name in ("d1", "stranger"):
        assert matched(prepared, name) in prepared.refused


def test_of_two_files_for_the_same_devices_the_first_counts(files: Files) -> None:
    """The second is named."""
    (files.directory / "devices" / "d1-copy.toml").write_text('match_client_id = "d1"')
    prepared = files.prepare()
    (problem,) = prepared.refused.values()
    assert "d1-copy.toml" in problem or "d1.toml" in problem


def test_a_mistake_in_the_configuration_itself_is_refused(files: Files) -> None:
    """It concerns everybody."""
    config = files.directory / "gateway.toml"
    config.write_text(config.read_text() + 'unknown = "maybe"\n')
    with pytest.raises(ConfigError, match=r"devices\.unknown"):
        files.load()


def matched(prepared: Prepared, name: str) -> DeviceRule | None:
    """Return the rule that a device of this name goes by."""
    reader = PacketReader(frozenset({PacketType.CONNECT}), 65536, EndReason.NOT_MQTT)
    reader.feed(mqtt.connect(name))
    packet = reader.next_packet()
    assert packet is not None
    found = prepared.rules.match(parse_connect(packet), Caller("10.0.0.1", ""))
    return None if found is None else found.rule.device


def test_the_configuration_before_is_freed_bit_by_bit(tmp_path: Path) -> None:
    """Thousands of rules freed in one go would hold up the event loop; at the end nothing of it is left."""
    (tmp_path / "ca.pem").write_bytes(certify_ca().pem)

    def configured(max_qos: int) -> Config:
        rules = [{"match_client_id": f"d{number}", "max_qos": max_qos} for number in range(200)]
        return from_mapping(
            {"upstream": [{"host": "localhost"}], "tls": {"ca_file": [str(tmp_path / "ca.pem")]}, "device": rules}
        )

    before = prepare(configured(1), lambda: 0.5)
    after = prepare(configured(2), lambda: 0.5, before=before)
    left = [weakref.ref(each) for each in (*before.rules, before)]
    del before
    alive = [len(left)]
    free(after, lambda: alive.append(sum(each() is not None for each in left)))
    assert alive[-1] == 0
    assert max(now - then for then, now in pairwise(reversed(alive))) <= 20


def test_the_states_of_files_before_are_freed_bit_by_bit() -> None:
    """The watch may be the last to hold them: tens of thousands."""

    class File:
        pass

    files: Any = {File(): "1 2 3" for _ in range(200)}
    left = [weakref.ref(file) for file in files]
    watch = Watch(files)
    del files
    watch.know({})
    alive = [len(left)]
    watch.look({}, lambda: alive.append(sum(each() is not None for each in left)))
    assert alive[-1] == 0
    assert max(now - then for then, now in pairwise(reversed(alive))) <= 20


class OneByOne(dict[Any, Any]):
    """A dictionary of which each value that is taken is a call of a function."""

    def values(self) -> Any:
        yield from super().values()


def stretches(directory: Path, rules: int) -> dict[str, int]:
    """Reload so many rules that have all changed; return how much is done between two pauses, by where they are.

    Counted are calls of functions, and blocks of memory that are allocated or freed.
    """
    directory.mkdir()
    (directory / "devices").mkdir()
    certify(certify_ca(), purposes=(CLIENT,)).write(directory / "own.pem")
    (directory / "gateway.toml").write_text(
        '[[upstream]]\nhost = "localhost"\n[tls]\nca_file = "own.pem"\n[devices]\ndirectory = "devices"\n'
    )
    found: dict[str, int] = {}
    calls, blocks, place = 0, 0, ""

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    def pause() -> None:
        nonlocal calls, blocks, place
        code = sys._getframe(1).f_code
        before, place = place, f"{Path(code.co_filename).name} {code.co_name}"
        for what, amount in (("calls", calls), ("blocks", abs(sys.getallocatedblocks() - blocks))):
            key = f"{what} from {before} to {place}"
            found[key] = max(found.get(key, 0), amount)
        calls, blocks = 0, sys.getallocatedblocks()

    def write(text: str) -> None:
        for number in range(rules):
            (directory / "devices" / f"d{number}.toml").write_text(text)

    known = RuleFiles(pause)
    write('client_cert = "../own.pem"')
    now = load_file(directory / "gateway.toml", known=known)
    before = prepare(now, lambda: 0.5)
    before = evolve(before, files=OneByOne(before.files), keys=OneByOne(before.keys))
    write('client_cert = "../own.pem"  # changed')
    gc.disable()
    pause()
    found.clear()
    sys.setprofile(lambda frame, event, _: count() if event == "call" else None)
    try:
        config = load_file(directory / "gateway.toml", known=known)
        changed_keys(now, config, pause)
        prepared = prepare(config, lambda: 0.5, before=before, pause=pause)
        del before, now
        free(prepared, pause)
        pause()
    finally:
        sys.setprofile(None)
        gc.enable()
    assert len(list(prepared.rules.parts)) == rules + 1
    return found


def test_no_stretch_between_two_pauses_grows_with_the_number_of_rules(tmp_path: Path) -> None:
    """The event loop may run only in pauses, and whenever it lets go of the interpreter it waits for the next one."""
    few, many = stretches(tmp_path / "few", 20), stretches(tmp_path / "many", 200)
    # Twice, since other threads of this process allocate memory, too.
    again = stretches(tmp_path / "again", 200)
    assert {where for where in many if min(many[where], again.get(where, 0)) > few.get(where, 0) + 60} == set()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc")
def test_memory_is_merged_as_it_is_freed() -> None:
    """Otherwise glibc keeps small chunks, and merges all of them in one go that holds up all threads."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    class Usage(ctypes.Structure):
        _fields_ = [(f"other{number}", ctypes.c_size_t) for number in range(6)] + [
            ("fsmblks", ctypes.c_size_t),
            ("others", ctypes.c_size_t * 3),
        ]

    libc.mallinfo2.restype = Usage

    def kept() -> int:
        chunks = [libc.malloc(100) for _ in range(1000)]
        before = int(libc.mallinfo2().fsmblks)
        for chunk in chunks:
            libc.free(chunk)
        return int(libc.mallinfo2().fsmblks) - before

    with merging_at_once():
        assert kept() <= 0
    assert kept() > 50_000
