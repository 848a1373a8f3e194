"""Joins a Ray cluster, or starts one on this machine for a run."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from upspiral.config.models import ClusterConfig
from upspiral.errors import ConfigError

_CLIENT = "ray://"
_REACHED_WITHIN_S = 10.0
_LEFT_WITHIN_S = 30.0
_NO_SERVER = "Starting Ray client server failed"
"""What Ray's proxy may say while the connection of another client ends, such as that of the same run before it was
interrupted: it forks a server for each client with threads of gRPC about. The next attempt succeeds."""
_log = logging.getLogger(__name__)
_PACKAGE_ROOT = str(Path(__file__).parents[3])


@contextmanager
def joined(cluster: ClusterConfig, ranks: int = 0) -> Iterator[None]:
    """Within it, actors can be placed. `ranks`: of the trainer, if they are actors. Raises ConfigError when Ray is not
    installed, does not answer, or will never have room for what the run wants."""
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise ConfigError("cluster.address needs Ray; pip install 'upspiral[ray]'") from error
    # Ray's own dashboard and usage report are no part of a run; threads are given to actors one by one.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_reachable(cluster.address)
    try:
        _join(cluster, ranks)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f'cluster.address = "{cluster.address}" cannot be joined ({error}); start Ray there with `ray start '
            '--head`, set RAY_AUTH_MODE here as it is there, or use "local"'
        ) from error
    try:
        check_room(cluster, ranks, ray.cluster_resources())
        yield
    finally:
        leave(cluster.address)


def _join(cluster: ClusterConfig, ranks: int) -> None:
    import ray

    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join([_PACKAGE_ROOT, *_inherited()])}}
    if cluster.address == "local":
        ray.init(
            address="local", num_cpus=max(os.cpu_count() or 1, _wanted(cluster, ranks)), include_dashboard=False,
            runtime_env=environment, log_to_driver=True, configure_logging=False,
        )  # fmt: skip
        return
    for may_try_again in (True, False):
        try:
            ray.init(address=cluster.address, runtime_env=environment, log_to_driver=True)
            return
        except ConnectionError as error:
            if not may_try_again or _NO_SERVER not in str(error):
                raise


def leave(address: str | None, *, deadline_s: float = _LEFT_WITHIN_S) -> None:
    """Ray's client waits, here and when the interpreter ends, for its server to end the connection, which may not
    happen (an interrupted run hung so, once in 30). The cluster then ends what was placed when this process is gone."""
    import ray

    if address is None or not address.startswith(_CLIENT):
        return ray.shutdown()
    leaving = threading.Thread(target=ray.shutdown, name="leave-ray", daemon=True)
    leaving.start()
    leaving.join(deadline_s)
    if leaving.is_alive():
        atexit.unregister(ray.shutdown)
        _log.warning("the cluster did not end its connection within %g s; it is left like this", deadline_s)


def _check_reachable(address: str | None) -> None:
    """Raises ConfigError. Ray's own client would try for half a minute, and not say in the end what was wrong."""
    if address is None or not address.startswith(_CLIENT):
        return
    where = f'cluster.address = "{address}"'
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ConfigError(f"{where} lacks a host or a port; write ray://HOST:10001")
    try:
        socket.create_connection((host, port), _REACHED_WITHIN_S).close()
    except OSError as error:
        raise ConfigError(
            f"{where}: nobody answers there ({error}); `ray start --head` on that machine listens for clients at "
            "10001, or where --ray-client-server-port says, and this machine must be let through to it"
        ) from error


def _inherited() -> list[str]:
    """Actors have other working directories."""
    paths = (str(Path(path).absolute()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path)
    return [path for path in paths if path != _PACKAGE_ROOT]


def _wanted(cluster: ClusterConfig, ranks: int) -> int:
    """More than there are cores is no fault on one machine: Ray only counts them."""
    return int(cluster.engines * cluster.engine_cpus + ranks * cluster.rank_cpus + cluster.sandbox_hosts + 4)


def check_room(cluster: ClusterConfig, ranks: int, there: Mapping[str, float]) -> None:
    """Raises ConfigError when all that is placed at the same time takes more than a cluster has of Ray's resources.
    What else runs there may end, so it does not count."""
    engines = f"cluster.engines = {cluster.engines}"
    for name, of_engine, of_rank, others in (
        ("CPU", cluster.engine_cpus, cluster.rank_cpus, {"cluster.sandbox_hosts": cluster.sandbox_hosts, "the run": 1}),
        ("GPU", cluster.engine_gpus, cluster.rank_gpus, {}),
    ):
        key = f"{name.lower()}s"
        asked = {
            f"{engines} with cluster.engine_{key} = {of_engine:g}": cluster.engines * of_engine,
            f"{ranks} ranks with cluster.rank_{key} = {of_rank:g}": ranks * of_rank,
        } | others
        wanted = sum(asked.values())
        if wanted > there.get(name, 0.0):
            by = ", ".join(f"{each:g} for {what}" for what, each in asked.items() if each)
            raise ConfigError(
                f"the run wants {wanted:g} {name}s ({by}), and the cluster has {there.get(name, 0.0):g}; lower them, "
                "or add nodes"
            )
