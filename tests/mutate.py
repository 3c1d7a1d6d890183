"""Mutation: change one thing in a module at a time, and see whether a test notices.

python -m tests.mutate gateway/mqtt/connack.py                          all tests that run one of its lines
python -m tests.mutate gateway/mqtt/connack.py tests/test_mqtt_connack.py --lines 30-60

The tests run once, unchanged, which records the lines that each of them executes and the time that it takes. For each
change, a forked process then runs the tests that execute its line until the first fails: those that noticed most so far
first, then the quickest. Changes of which no test takes notice are printed with their line; each is a test that is
missing, or code that has no effect.

Nothing is written into the tree. In the forked process, which has collected the tests already, the changed function
takes the place of the loaded one. What is executed when a module is loaded (constants, classes, defaults) is changed as
it is loaded, which takes longer. What a test starts in another process (`mqtts-gateway run`) runs the unchanged module.
"""

# ruff: noqa: T201  a command line tool prints

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from bisect import bisect
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import hypothesis
import pytest
from coverage import CoverageData

from tests.mutants import Change, Places, changes, mutant, replace

_EXAMPLES = 10  # of each Hypothesis test, unless `--thorough`
_HERE = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # options, in this process
_NOTICED, _ALIVE, _UNTRIED = 1, 98, 99  # exit statuses of a forked process


class Trial:
    """One change to a module, the function it is in (None: it acts when the module is loaded), and its lines."""

    def __init__(self, module: Path, index: int, change: Change, places: Places) -> None:
        self.module = module
        self.index = index
        self.change = change
        self.function = places.function(change.node)
        self.lines = places.lines(change.node)
        self.left_out = 0
        """So many tests that execute what is changed did not run."""

    def replace(self) -> bool:
        """Change the function that is loaded. Returns False if that cannot be done."""
        path = str(self.module.resolve())
        assert self.function
        return replace(self.function, compile(mutant(self.module.read_text(), self.index), path, "exec"), path)

    def __str__(self) -> str:
        return f"{self.module}:{self.change.words()}"


class Coverage:
    """Which tests execute which lines of the modules, and how long each test takes, from one run without any change."""

    def __init__(self, modules: list[Path], tests: list[str], jobs: int) -> None:
        with TemporaryDirectory(prefix="mutate-") as scratch:
            data, junit, settings = (Path(scratch, name) for name in ("coverage", "junit.xml", "settings"))
            settings.write_text("[run]\ninclude =" + "".join(f"\n    {module}" for module in modules) + "\n")
            options = ["-q", "-n", str(jobs), "--dist", "loadfile", f"--junitxml={junit}", "-p", "no:cacheprovider"]
            options += ["--cov", "--cov-context=test", f"--cov-config={settings}", "--cov-report="]
            environment = os.environ | {"COVERAGE_FILE": str(data)}
            subprocess.run([sys.executable, "-m", "pytest", *options, *tests], env=environment, check=False)
            self.seconds, self.failed = _times(junit)
            self._tests = {module: self._of_lines(data, module) for module in modules}

    def tests(self, trial: Trial) -> set[str]:
        """Return the tests that execute what is changed."""
        of_lines = self._tests[trial.module]
        found = set[str]().union(*(of_lines.get(line, set()) for line in trial.lines))
        return found if found or trial.function else found.union(*of_lines.values())

    def _of_lines(self, path: Path, module: Path) -> dict[int, set[str]]:
        data = CoverageData(basename=str(path))
        data.read()
        of_lines = defaultdict[int, set[str]](set)
        for line, contexts in data.contexts_by_lineno(str(module.resolve())).items():
            for context in contexts:
                test, _, phase = context.rpartition("|")
                if phase == "setup":  # perhaps of a fixture that other tests of the file share
                    file = test.partition("::")[0] + "::"
                    of_lines[line] |= {other for other in self.seconds if other.startswith(file)}
                elif test in self.seconds:
                    of_lines[line].add(test)
        return of_lines


def _times(junit: Path) -> tuple[dict[str, float], list[str]]:
    """Return the seconds of each test that passed, and the names of those that failed."""
    seconds: dict[str, float] = {}
    failed = []
    for case in ElementTree.parse(junit).iter("testcase"):  # noqa: S314 - pytest wrote it
        test = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(test)
        elif case.find("skipped") is None:
            seconds[test] = float(case.attrib["time"])
    return {test: took for test, took in seconds.items() if test not in failed}, failed


Testing = Callable[[Trial | None, list[str], Path], int]


class Trials:
    """Runs the tests of each trial in a forked process, some at a time, and prints what came of it."""

    def __init__(self, coverage: Coverage, jobs: int, most: float) -> None:
        """Take how many processes run at a time, and how long the tests of one took without a change, in seconds."""
        self.counts = Counter[str]()
        self.coverage = coverage
        self._jobs = jobs
        self._most = most
        self._noticed = Counter[str]()  # by test
        self._useless: set[str] = set()  # tests that fail in a forked process without any change, too
        self._running: dict[int, tuple[Trial, TemporaryDirectory[str]]] = {}

    def run(self, trials: Iterable[Trial], test: Testing) -> None:
        """Call `test` in a forked process for each trial, its tests, best first, and a scratch directory.

        It returns an exit status. It is called without a trial to see that nothing but the change makes a test fail.
        """
        waiting = deque(trials)
        while waiting or self._running:
            if waiting and len(self._running) < self._jobs:
                self._start(waiting.popleft(), test)
            elif again := self._wait(test):
                waiting.append(again)

    def hurry(self, test: str) -> None:
        """Have a test end this process if it takes far longer than it did without a change."""
        signal.alarm(int(20 + 10 * self.coverage.seconds.get(test, 0.0)))

    def _start(self, trial: Trial, test: Testing) -> None:
        tests = self.coverage.tests(trial) - self._useless
        if tests:
            seconds = self.coverage.seconds
            order = sorted(tests, key=lambda name: (-self._noticed[name], seconds[name], name))
            took = list(accumulate(seconds[name] for name in order))
            some = order[: 1 + bisect(took, self._most)]
            trial.left_out = len(order) - len(some)
            self._fork(trial, some, test)
        else:
            self._tell(trial, "alive (no test executes it)")

    def _fork(self, trial: Trial | None, tests: list[str], test: Testing) -> int:
        scratch = TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True)
        child = os.fork()
        if not child:
            status = _NOTICED
            try:
                os.setpgid(0, 0)
                _silence()
                status = test(trial, tests, Path(scratch.name))
            finally:
                os._exit(status)
        if trial:
            self._running[child] = trial, scratch
            return 0
        _, waited = os.waitpid(child, 0)
        return self._clean_up(child, waited, scratch)

    def _wait(self, test: Testing) -> Trial | None:
        """Wait for a process to end. Returns its trial if that must run again."""
        child, waited = os.waitpid(-1, 0)
        trial, scratch = self._running.pop(child)
        path = Path(scratch.name, "noticed")
        noticed = path.read_text() if path.exists() else ""
        status = self._clean_up(child, waited, scratch)
        if noticed:
            if not self._noticed[noticed] and self._fork(None, [noticed], test) != _ALIVE:
                self._useless.add(noticed)
                print(f"\n{noticed} fails in a forked process without any change, too, and is left out")
                return trial
            self._noticed[noticed] += 1
        alive = f"alive ({trial.left_out} slower tests did not run)" if trial.left_out else "alive"
        self._tell(trial, {_ALIVE: alive, _UNTRIED: "untried", -signal.SIGALRM: "hung"}.get(status, "noticed"))
        return None

    @staticmethod
    def _clean_up(child: int, waited: int, scratch: TemporaryDirectory[str]) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # brokers that a test which was cut short left behind
        scratch.cleanup()
        return os.waitstatus_to_exitcode(waited)

    def _tell(self, trial: Trial, outcome: str) -> None:
        self.counts[outcome.partition(" ")[0]] += 1
        if outcome == "noticed":
            print(".", end="", flush=True)
        else:
            print(f"\n{outcome} {trial}", flush=True)


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


class _Noticing:
    """A plugin of pytest: the first test that fails is written down, and ends the process."""

    def __init__(self, trials: Trials, scratch: Path) -> None:
        self._trials = trials
        self._scratch = scratch

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._trials.hurry(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            (self._scratch / "noticed").write_text(report.nodeid)
            os._exit(_NOTICED)


class _Collected:
    """A plugin of pytest: runs trials of functions, each in a fork of this process, in place of the collected tests."""

    def __init__(self, trials: Trials, chosen: list[Trial]) -> None:
        self._trials = trials
        self._chosen = chosen

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}

        def test(trial: Trial | None, tests: list[str], scratch: Path) -> int:
            if "twisted.internet.reactor" in sys.modules:  # its epoll descriptor must not be shared
                reactor: Any = sys.modules["twisted.internet.reactor"]
                type(reactor).__init__(reactor)
            os.environ["PYTEST_DEBUG_TEMPROOT"] = str(scratch)
            if trial and not trial.replace():
                return _UNTRIED
            session.config.pluginmanager.register(_Noticing(self._trials, scratch))
            chosen = [items[name] for name in tests if name in items]
            for item, following in zip(chosen, [*chosen[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            return _ALIVE

        self._trials.run(self._chosen, test)
        return True


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module under test, and loads the changed one."""

    def __init__(self, path: Path, tree: ast.Module) -> None:
        self._name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        self._path = path
        self._code = compile(tree, str(path), "exec")

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        spec = importlib.util.spec_from_loader(fullname, self, origin=str(self._path.resolve()))
        assert spec
        spec.has_location = True
        return spec

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)  # noqa: S102 - running it is the purpose


def _change_loaded(trials: Trials, chosen: list[Trial]) -> None:
    """Run trials of functions, in a process of its own that has collected the tests."""
    files = sorted({test.partition("::")[0] for trial in chosen for test in trials.coverage.tests(trial)})
    mine, its = os.pipe()
    child = os.fork()
    if not child:
        # Without a test that executes one of them there is nothing to collect.
        pytest.main([*_HERE, "-s", *(files or ["--ignore-glob=*"])], plugins=[_Collected(trials, chosen)])
        os.write(its, json.dumps(trials.counts).encode())
        os._exit(0)
    os.close(its)
    with os.fdopen(mine) as counts:
        trials.counts.update(json.load(counts))
    os.waitpid(child, 0)


def _load_changed(trials: Trials, chosen: list[Trial]) -> None:
    """Run trials of what is executed when a module is loaded. Nothing of the gateway may be loaded by now."""

    def test(trial: Trial | None, tests: list[str], scratch: Path) -> int:
        if trial:
            sys.meta_path.insert(0, _Changed(trial.module, mutant(trial.module.read_text(), trial.index)))
        signal.alarm(120)  # until the first test starts
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(scratch)
        status = pytest.main([*_HERE, *tests], plugins=[_Noticing(trials, scratch)])
        return _ALIVE if status == pytest.ExitCode.OK else _NOTICED

    trials.run(chosen, test)


def _quick_hypothesis() -> None:
    """Try few examples of each property: most changes fail in the first."""
    from hypothesis.internal.conjecture.engine import ConjectureRunner

    began = ConjectureRunner.__init__

    def begin(self: Any, test: Any, *, settings: Any = None, **others: Any) -> None:
        few = hypothesis.settings(
            settings,
            max_examples=min(settings.max_examples, _EXAMPLES),
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # the simplest failure is of no use here
        )
        began(self, test, settings=few, **others)

    ConjectureRunner.__init__ = begin  # type: ignore[assignment,method-assign]


def _trials(modules: list[Path], lines: str | None, sample: int | None) -> list[Trial]:
    """Return what is to be tried, in the order of the modules."""
    found = []
    for module in modules:
        tree = ast.parse(module.read_text())
        places = Places(tree)
        made = [Trial(module, index, change, places) for index, change in enumerate(changes(tree))]
        found += [trial for trial in made if _wanted(trial.change.line, lines)]
    if sample and sample < len(found):
        kept = set(random.Random(1).sample(range(len(found)), sample))  # noqa: S311 - not for security
        found = [trial for number, trial in enumerate(found) if number in kept]
    return found


def _wanted(line: int, lines: str | None) -> bool:
    """Tell whether a line is among `lines`, for example "34,150-160"."""
    if not lines:
        return True
    spans = [part.partition("-") for part in lines.split(",")]
    return any(int(first) <= line <= int(last or first) for first, _, last in spans)


def main() -> int:
    """Test the changes of modules. Returns 1 if one is alive."""
    parser = argparse.ArgumentParser(description="Change a module in one place at a time; does a test fail?")
    parser.add_argument(
        "paths", nargs="+", help="modules or directories of gateway/, and tests that must notice (none: all)"
    )
    parser.add_argument("--sample", type=int, help="try so many changes, chosen at random but always the same")
    parser.add_argument("--lines", help="try only changes to these lines: 34,150-160")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="so many processes (default: one a processor)"
    )
    parser.add_argument(
        "--seconds", type=float, default=20, help="run only the quickest tests of a change, for so long"
    )
    parser.add_argument("--thorough", action="store_true", help="run Hypothesis tests with all their examples")
    arguments = parser.parse_args()
    tests = [path for path in arguments.paths if path.startswith("tests")]
    given = [Path(path) for path in arguments.paths if path not in tests]
    modules = [module for path in given for module in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    chosen = _trials(modules, arguments.lines, arguments.sample)
    coverage = Coverage(modules, tests, arguments.jobs + 1)
    if coverage.failed:
        print("These fail without any change, and are left out:", *coverage.failed, sep="\n  ")
    if not coverage.seconds:
        print("No test passes without any change.", file=sys.stderr)
        return 2
    if not arguments.thorough:
        _quick_hypothesis()
    trials = Trials(coverage, arguments.jobs, arguments.seconds)
    _change_loaded(trials, [trial for trial in chosen if trial.function])
    _load_changed(trials, [trial for trial in chosen if not trial.function])
    print(f"\n{len(chosen)} changes tried: {dict(trials.counts)}")
    return 1 if trials.counts["alive"] else 0


if __name__ == "__main__":
    sys.exit(main())
