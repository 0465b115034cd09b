"""The tests of what only a GPU reaches, as a figure beside the others: how many fail. What pytest says of them is printed.

    python benchmarks/gpu_tests.py --device cuda           # tests/test_gpu.py without those that compile
    python benchmarks/gpu_tests.py --device cuda --long    # those that compile
"""

import sys
import time
from pathlib import Path

from common import ROOT, Figure, parser, show

TESTS = ROOT / "tests" / "test_gpu.py"


class Count:
    """A plugin of pytest: tests by their outcome."""

    def __init__(self):
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report) -> None:
        """A test has failed if its set-up or its end has."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = "failed" if "failed" in (report.outcome, self.outcomes.get(report.nodeid)) else report.outcome

    def pytest_collectreport(self, report) -> None:
        """A file that cannot be read is a failure."""
        if report.failed:
            self.outcomes[report.nodeid] = "failed"

    def of(self, outcome: str) -> int:
        """How many."""
        return list(self.outcomes.values()).count(outcome)


def measure(args) -> Figure:
    """Runs them in this process."""
    import pytest

    count, started = Count(), time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "--durations=10", "--tb=short", "-c", str(ROOT / "pyproject.toml"), "-m", "long" if args.long else "not long"]
    code = pytest.main([str(args.tests), *options], plugins=[count])
    if code in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR) and not count.of("failed"):
        sys.exit(f"error: pytest ended with {code!r}")
    what, failed, passed = f"tests that fail, {args.tests.name}{' --long' if args.long else ''}", count.of("failed"), count.of("passed")
    values = {"passed": passed, "skipped": count.of("skipped"), "s": time.monotonic() - started}
    return Figure(what, "none", [float(failed)] if failed + passed else [], 0.0, values=values, note="none could run: is there a GPU?")


def main() -> None:
    """Runs them and prints the table."""
    options = parser(__doc__, rounds=1)
    options.add_argument("--tests", type=Path, default=TESTS, help="the file of tests")
    options.add_argument("--long", action="store_true", help="those that take minutes")
    args = options.parse_args()
    show("the tests of a GPU", [measure(args)], args)


if __name__ == "__main__":
    main()
