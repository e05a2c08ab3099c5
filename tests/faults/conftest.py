"""What the tests of faults share, and the table of all rows: `pytest tests/faults --fault-table`."""

import re
from collections import defaultdict

import pytest
from fault_rows import ROWS
from tiny_run import TINY

OUTCOMES = "failed", "skipped", "passed"  # the first that a test of a row has is the row's


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def pytest_addoption(parser):
    parser.addoption("--fault-table", action="store_true", help="print a row for each fault; one without a test fails")


def pytest_configure(config):
    if config.getoption("--fault-table", False) and not hasattr(config, "workerinput"):  # not in xdist's processes
        config.pluginmanager.register(FaultTable())


class FaultTable:
    """Collect what became of the tests of each row, print it, and fail where a row has no test that ran."""

    def __init__(self):
        self.tests = defaultdict(dict)  # row -> test -> {outcome}
        self.seconds = defaultdict(float)

    def pytest_runtest_logreport(self, report):
        if named := re.search(r"/(\w+\.py::test_row_(\d+)_\w+)", report.nodeid):
            row = int(named[2])
            self.seconds[row] += report.duration
            if report.when == "call" or report.outcome != "passed":
                self.tests[row].setdefault(named[1], set()).add(report.outcome)

    def outcome(self, row):
        outcomes = set().union(*self.tests[row].values())
        return next((outcome for outcome in OUTCOMES if outcome in outcomes), "missing")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if any(self.outcome(row) != "passed" for row in ROWS):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("faults")
        for row, fault in ROWS.items():
            outcome, tests = self.outcome(row), sorted(self.tests[row]) or ["-"]
            shown = tests[0] + (f" and {len(tests) - 1} more" if len(tests) > 1 else "")
            colour = {"green" if outcome == "passed" else "red": True}
            terminalreporter.write(f"{row:2d}  {fault:48s} ")
            terminalreporter.write(f"{outcome:8s}", **colour)
            terminalreporter.write_line(f"{self.seconds[row]:6.1f} s  {shown}")
        passed = sum(self.outcome(row) == "passed" for row in ROWS)
        terminalreporter.write_line(f"{passed} of {len(ROWS)} rows passed")
