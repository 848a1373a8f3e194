"""The process's garbage collector is as it was once nothing is served."""

from __future__ import annotations

import gc

from upspiral.gateway.collector import seldom_collected


def test_the_settings_end_with_the_context() -> None:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with seldom_collected():
        assert gc.get_threshold()[2] > before[2]
        assert gc.get_freeze_count() > frozen
        assert gc.isenabled()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0
