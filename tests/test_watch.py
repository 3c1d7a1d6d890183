"""Files that change: noticed once they have come to rest, by whatever way a renewal tool puts them in place."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.config import TLS
from gateway.ops.watch import Watch, differing, states
from gateway.tls.trust import policy_files
from tests.pki import certify_ca


class Watched:
    """Files, and a watch over them."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.watch = Watch(states(paths))

    def look(self) -> list[str]:
        return [path.name for path in self.watch.look(states(self.paths))]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file."""
    path = tmp_path / "cert.pem"
    path.write_text("one")
    return path


def test_a_change_is_told_once_when_two_looks_agree(file: Path) -> None:
    """As long as it goes on it is not told."""
    watched = Watched(file)
    assert watched.look() == []
    for text in ("t", "tw", "two"):
        file.write_text(text)
        assert watched.look() == []
    assert watched.look() == ["cert.pem"]
    assert watched.look() == []


def test_files_that_belong_together_are_told_together(file: Path, tmp_path: Path) -> None:
    """Between a certificate and its key there may be a moment, but then nothing is told yet."""
    key = tmp_path / "key.pem"
    key.write_text("one")
    watched = Watched(file, key)
    file.write_text("two")
    assert watched.look() == []
    key.write_text("two")
    assert watched.look() == []
    assert watched.look() == ["cert.pem", "key.pem"]


def in_place(path: Path) -> None:
    """As an editor or `cp` does, with the same size."""
    path.write_text("two")


def renamed(path: Path) -> None:
    """As step, cert-manager's CSI driver and most tools do."""
    new = path.with_suffix(".new")
    new.write_text("two")
    new.replace(path)


def removed(path: Path) -> None:
    """By mistake."""
    path.unlink()


def unreadable(path: Path) -> None:
    """The mode alone; whether the process may read it decides as much as what is in it."""
    path.chmod(0o000)


def backdated(path: Path) -> None:
    """As `cp -p` and rsync do, which keep the time of the original: here the very time that it had."""
    before = path.stat()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [in_place, renamed, removed, unreadable, backdated])
def test_every_way_to_change_a_file_is_noticed(file: Path, change: Callable[[Path], None]) -> None:
    """Also those that leave the size and the time of modification as they were."""
    watched = Watched(file)
    change(file)
    assert watched.look() == []
    assert watched.look() == ["cert.pem"]


def test_links_are_followed(tmp_path: Path) -> None:
    """Certbot turns the link of the file, Kubernetes that of the directory."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cert.pem").write_text("same")
    (tmp_path / "now").symlink_to("1")
    (tmp_path / "live.pem").symlink_to("1/cert.pem")
    watched = Watched(tmp_path / "now" / "cert.pem", tmp_path / "live.pem")
    for link, target in (("now", "2"), ("live.pem", "2/cert.pem")):
        (tmp_path / "new").symlink_to(target)
        (tmp_path / "new").replace(tmp_path / link)
    assert watched.look() == []
    assert watched.look() == ["cert.pem", "live.pem"]


def test_a_file_that_comes_back_is_a_change(file: Path) -> None:
    """What was refused while it was away is tried again."""
    watched = Watched(file)
    file.unlink()
    watched.look()
    assert watched.look() == ["cert.pem"]
    file.write_text("one")
    watched.look()
    assert watched.look() == ["cert.pem"]


def test_a_change_that_is_taken_back_is_none(file: Path) -> None:
    """Nothing is told when all is as it was; here a link that is turned there and back."""
    other = file.with_name("other.pem")
    other.write_text("two")
    link = file.with_name("link.pem")
    link.symlink_to(file.name)
    watched = Watched(link)
    for target in (other, file):
        link.unlink()
        link.symlink_to(target.name)
        assert watched.look() == []
    assert watched.look() == []


def test_every_file_of_the_configuration_is_watched(tmp_path: Path) -> None:
    """Certificates, keys and lists; those of a directory as they come and go; the platform's when none is named."""
    directory = tmp_path / "ca"
    tls = TLS(
        ca_file=(tmp_path / "ca.pem",),
        ca_dir=directory,
        client_cert=tmp_path / "cert.pem",
        client_key=tmp_path / "key.pem",
        crl_file=(tmp_path / "ca.crl",),
    )
    named = {tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem", "ca.crl")}
    assert set(policy_files(tls)) == named
    directory.mkdir()
    (directory / "README").write_text("no certificate")
    before = states(policy_files(tls))
    assert set(before) == named
    (directory / "one.crt").write_bytes(certify_ca().pem)
    assert differing(before, states(policy_files(tls))) == [directory / "one.crt"]
    (platform,) = policy_files(TLS())
    assert platform.is_file()


def test_what_is_no_longer_known_is_freed_by_the_next_look(tmp_path: Path) -> None:
    """The look is made in a thread; to free the states of tens of thousands of files would hold up the event loop."""

    class States(dict[Path, str]):
        """States that can be referred to weakly."""

    old = States({tmp_path / "a": "1"})
    gone = weakref.ref(old)
    watch = Watch(old)
    watch.know({tmp_path / "a": "2"})
    del old
    assert gone() is not None
    assert watch.look({tmp_path / "a": "2"}) == []
    assert gone() is None
