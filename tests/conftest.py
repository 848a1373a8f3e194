"""What every test run shares: which tests need something this machine may lack, and how many were left out for it."""

from __future__ import annotations

import os
from collections import Counter

import pytest

# Tests run side by side: more torch threads would only fight over the cores. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests that take minutes")
    parser.addoption("--network", action="store_true", help="run tests that need a package index or the hub")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": None if config.getoption("--slow") else "slow: give --slow",
        "network": None if config.getoption("--network") else "needs the network: give --network",
        "gpu": None,
    }
    if any(item.get_closest_marker("gpu") for item in items) and not _has_gpu():
        reasons["gpu"] = "needs a CUDA device"
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line that counts what was left out, by reason: a green run says what it did not look at."""
    skipped = terminalreporter.stats.get("skipped", [])
    counts = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if counts:
        listed = "; ".join(f"{count} x {reason}" for reason, count in counts.most_common())
        terminalreporter.write_line(f"skipped {len(skipped)}: {listed}")


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
