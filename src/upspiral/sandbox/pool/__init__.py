"""A pool of sandboxes over any backend: warm ones, fair queues, bounded starts, retries of what infrastructure does."""

from upspiral.sandbox.pool.limits import PoolLimits
from upspiral.sandbox.pool.pool import Pool, PoolStats

__all__ = ["Pool", "PoolLimits", "PoolStats"]
