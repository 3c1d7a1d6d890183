"""The documents: what they say of the code is so, and what they point to is there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway import MADE, __version__
from gateway.errors import EndReason
from tests.test_floors import FLOORS, ROOT

DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *(ROOT / name / "README.md" for name in ("certs", "benchmarks")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
ENDINGS = ROOT / "docs" / "endings.md"
PERFORMANCE = ROOT / "docs" / "performance.md"
SCALING = ROOT / "docs" / "scaling.md"


def links(text: str) -> list[str]:
    """Return the targets of a document's links, apart from those that lead to other hosts."""
    targets = re.findall(r"\]\(([^()\s]+)\)", text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """Return what the headings of a document are called in links, as GitHub makes it of them."""
    headings = re.findall(r"^#+ +(.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_spans(text: str) -> list[str]:
    """Return what stands in backticks within lines; blocks of code are drawings and sessions."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def drawn_floors(text: str) -> dict[int, set[str]]:
    """Return the modules and packages on each floor of the map, which is the first drawing."""
    floors: dict[int, set[str]] = {}
    for line in re.search(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1].splitlines():
        if drawn := re.match(r" *(\d+) +((?:\w+(?:\.py|/) *)+)", line):
            names = (name.removesuffix(".py").removesuffix("/") for name in drawn[2].split())
            floors[int(drawn[1])] = {f"gateway.{name}" for name in names}
    return floors


@pytest.mark.parametrize("reason", EndReason)
def test_every_ending_has_its_row(reason: EndReason) -> None:
    """Word, meaning and remedy stand in docs/endings.md as the records and `check` have them."""
    row = f"| `{reason}` | {reason.meaning} | {reason.remedy} |"
    assert row in ENDINGS.read_text().splitlines(), f"docs/endings.md lacks this row, or has another: {row}"


def test_endings_that_are_gone_have_no_row() -> None:
    """Each word has one row, in the order of the code."""
    words = re.findall(r"^\| `([^`]*)` \|", ENDINGS.read_text(), re.MULTILINE)
    assert words == [str(reason) for reason in EndReason]


def test_the_map_has_every_module_on_its_floor() -> None:
    """docs/architecture.md draws what tests/test_floors.py holds the imports to."""
    expected = {len(FLOORS) - 1 - level: names - {"gateway"} for level, names in enumerate(FLOORS)}
    assert drawn_floors(ARCHITECTURE.read_text()) == expected


def test_what_is_needed_is_computed_with_the_figures_measured() -> None:
    """docs/scaling.md takes its figures from docs/performance.md, and its sums are right."""
    measured, scaling = PERFORMANCE.read_text(), SCALING.read_text()
    base = int(re.search(r"Without a session it takes (\d+) MiB", measured)[1])
    idle = int(re.search(r"^\| memory per idle session at 3,000 \| (\d+) \|", measured, re.MULTILINE)[1])
    nginx, ratio = re.search(r"^\| round trip: .*\(nginx: (\d+) µs\) \| ([\d.]+) \|", measured, re.MULTILINE).groups()
    microseconds = round(int(nginx) * float(ratio))
    assert f"| memory | {base} MiB, and {idle} KiB for each idle session |" in scaling
    for count in (1000, 3000, 10_000):
        assert re.search(rf"{count:,} (devices )?need {round(base + count * idle / 1024)} MiB", scaling)
    assert f"{ratio} times nginx's {nginx} µs: {microseconds} µs" in scaling
    for count in (1000, 10_000):
        assert re.search(rf"{count:,} (messages a second )?take {count * microseconds / 10_000:.0f} %", scaling)


def test_the_command_for_one_test_finds_one() -> None:
    """What CONTRIBUTING.md says selects a test that exists."""
    (command,) = (span for span in code_spans(CONTRIBUTING.read_text()) if " -k " in span)
    python, *arguments = shlex.split(command)
    assert python == ".venv/bin/python"
    # CI's own options would have this run write over the results of the one that it is part of.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    collect = [sys.executable, *arguments, "--collect-only", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout  # 5 if nothing was selected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    """The file is there, and so is the heading, if one is named."""
    broken = []
    for link in links(document.read_text()):
        name, _, heading = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (heading and heading not in anchors(target.read_text())):
            broken.append(link)
    assert broken == []


def test_a_broken_link_would_be_found() -> None:
    """The README's links are seen, and headings are called what GitHub calls them."""
    assert {"docs/configuration.md", "LICENSE"} <= set(links((ROOT / "README.md").read_text()))
    assert links("[a](b.md#c) and [d](https://example.com/) and [`e`](../f)") == ["b.md#c", "../f"]
    assert anchors("# What `check` does, and why\n") == {"what-check-does-and-why"}


def test_each_page_is_on_the_site() -> None:
    """The first page of the site lists all others, each once."""
    lists = re.findall(r"```\{toctree\}\n(?:\S*:.*\n)*((?:\n|\S+\n)*?)```", (ROOT / "docs" / "index.md").read_text())
    pages = [page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index"]
    assert sorted(" ".join(lists).split()) == sorted(pages)


@pytest.mark.parametrize("document", [ARCHITECTURE, CONTRIBUTING], ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    """Paths in backticks, on their own or in a command."""
    words = [word for span in code_spans(document.read_text()) for word in span.split()]
    directories = ("tests/", "gateway/", "docs/", "certs/", "benchmarks/", "systemd/")
    named = {word for word in words if word.startswith(directories)}
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    ("place", "pattern"),
    [
        ("pyproject.toml", r'^version = "(.+)"'),
        ("CHANGELOG.md", r"\A# Changelog[^#]*## (\S+), "),
        ("docs/operations.md", r"mqtts-gateway_(.+)-1_amd64\.deb"),
        ("docs/containers.md", r"localhost/mqtts-gateway:(\S+)"),
        ("docs/containers.md", r"newTag: (\S+)"),
        ("docs/examples/compose.yaml", r"image: \S+:(\S+)"),
        ("docs/examples/kubernetes.yaml", r"image: \S+:(\S+)"),
    ],
)
def test_every_place_that_names_the_version_has_the_same(place: str, pattern: str) -> None:
    """What a release has to change, as CONTRIBUTING.md says."""
    assert set(re.findall(pattern, (ROOT / place).read_text(), re.MULTILINE)) == {__version__}


def test_the_day_this_version_was_made_moves_on_with_each_release() -> None:
    """A clock that shows an earlier one is taken for wrong: so it has been, and is not long before the release."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    heading = re.search(r"^## (\S+), (\S+)$", changelog, re.MULTILINE)
    assert heading is not None
    version, day = heading.groups()
    assert version == __version__
    released = datetime.now(UTC) if day == "unreleased" else datetime.fromisoformat(f"{day}T23:59:59+00:00")
    assert released >= MADE
    assert day == "unreleased" or released - MADE < timedelta(days=32)
