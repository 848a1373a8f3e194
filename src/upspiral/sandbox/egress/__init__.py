"""The only way out of a sandbox: an HTTP proxy with an allow-list that logs every connection."""

from upspiral.sandbox.egress.proxy import EgressProxy, proxy_environment
from upspiral.sandbox.egress.record import EgressLimits, EgressLog, EgressRecord
from upspiral.sandbox.egress.way_out import way_out

__all__ = ["EgressLimits", "EgressLog", "EgressProxy", "EgressRecord", "proxy_environment", "way_out"]
