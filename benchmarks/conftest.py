"""One process and one thread (or ``OMP_NUM_THREADS``); paths take turns; ratios at the end of the run and in files."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch
from comparison import Comparison, Report, Way
from floors import Speed
from pytest_benchmark.fixture import BenchmarkFixture
from workloads import SADR, THREADS, Lab

torch.set_num_threads(THREADS)

_report = Report()


@pytest.fixture(scope="session")
def report() -> Report:
    return _report


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The demo model, its first runs made."""
    made = Lab.demo()
    for whole in (False, True):
        made.values(made.texts(1), SADR, 2, whole)
    return made


@pytest.fixture(scope="session")
def speed(report: Report) -> Speed:
    """Of this machine."""
    found = Speed.measured()
    report.figures["machine"] = asdict(found)
    return found


@pytest.fixture
def compare(benchmark: BenchmarkFixture, report: Report) -> Callable[..., Comparison]:
    """Times a fast way and plain ones in turn: in every round all plain ones, then the fast one."""

    def run(work: str, unit: str, fast: Way, plain: Mapping[str, Way], rounds: int) -> Comparison:
        done = Comparison(work, unit, [], {label: [] for label in plain})

        def before() -> tuple[tuple[int], dict[str, Any]]:
            i = len(done.fast)
            for label, way in plain.items():
                gc.collect()
                done.plain[label].append(way(i))
            gc.collect()
            return (i,), {}

        benchmark.pedantic(lambda i: done.fast.append(fast(i)), setup=before, rounds=rounds)
        benchmark.extra_info |= asdict(done)
        report.comparisons.append(done)
        return done

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of ratios, on the terminal and in files."""
    if not (_report.comparisons or _report.figures):
        return
    terminalreporter.section("fast path against plain ones")
    for line in _report.lines():
        terminalreporter.write_line(line)
    _report.write()
