"""Who may use a server of sandboxes, and how much of it."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import msgspec

from upspiral.errors import CapabilityError, ConfigError, SandboxBusyError
from upspiral.sandbox.base import Allow, Limits, SandboxSpec
from upspiral.sandbox.egress.policy import parse_rule

SHORTEST_TOKEN = 16
_QUOTA_RETRY_S = 1.0


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one tenant may have at a time."""

    live: int = 1000
    memory_mb: int = 1_000_000
    """The sum of `memory_of` its live sandboxes."""
    lifetime_s: float = 4 * 3600.0
    """The longest `limits.lifetime_s` that it may ask for."""
    snapshots: int = 256
    egress: bool = False
    """Whether its sandboxes may reach public hosts, by name, from where the server stands."""
    private_hosts: bool = False
    """And whether also addresses and networks of the tenant's choice: whatever the server itself can reach."""


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whoever holds a token."""

    name: str
    quota: Quota

    def check(self, spec: SandboxSpec) -> None:
        """Raises CapabilityError for what this tenant can never have."""
        if spec.limits.lifetime_s > self.quota.lifetime_s:
            raise CapabilityError(
                f"limits.lifetime_s = {spec.limits.lifetime_s:g} is beyond the quota of {self.name}, "
                f"{self.quota.lifetime_s:g} s; ask for less"
            )
        if (memory_mb := memory_of(spec.limits)) > self.quota.memory_mb:
            raise CapabilityError(
                f"limits.memory_mb = {spec.limits.memory_mb} with disk_mb = {spec.limits.disk_mb} takes {memory_mb} MB "
                f"of memory, beyond the quota of {self.name}, {self.quota.memory_mb} MB for all its sandboxes; ask for "
                "less"
            )
        if spec.network != "none":
            self._check_network(spec.network)

    def _check_network(self, network: Allow) -> None:
        if not self.quota.egress:
            raise CapabilityError(f"{self.name} may not have a network; whoever runs the server can set egress = true")
        private = [*network.networks, *filter(_is_address, network.hosts)]
        if private and not self.quota.private_hosts:
            raise CapabilityError(
                f"{self.name} may reach hosts by name, and not {private[0]!r}; whoever runs the server can set "
                "private_hosts = true"
            )


def memory_of(limits: Limits) -> int:
    """The MB of the machine's memory that a sandbox may take: what it writes lies there, too (namespace/backend.py)."""
    return max(limits.memory_mb, limits.disk_mb + limits.memory_mb // 2)


class Usage:
    """What each tenant has now: counted from before a sandbox is made until after it has stopped."""

    def __init__(self) -> None:
        self._live: dict[str, int] = {}
        self._memory_mb: dict[str, int] = {}

    def take(self, tenant: Tenant, memory_mb: int, count: int = 1) -> None:
        """Raises SandboxBusyError when the tenant has no room left, and takes nothing."""
        live = self._live.get(tenant.name, 0) + count
        memory = self._memory_mb.get(tenant.name, 0) + memory_mb * count
        if live > tenant.quota.live or memory > tenant.quota.memory_mb:
            raise SandboxBusyError(
                f"the quota of {tenant.name} is used up: {live - count} of {tenant.quota.live} sandboxes are live with "
                f"{memory - memory_mb * count} of {tenant.quota.memory_mb} MB; stop some first",
                retry_after_s=_QUOTA_RETRY_S,
            )
        self._live[tenant.name], self._memory_mb[tenant.name] = live, memory

    def give_back(self, tenant: Tenant, memory_mb: int) -> None:
        self._live[tenant.name] -= 1
        self._memory_mb[tenant.name] -= memory_mb


class Tenants:
    """Tenants by token. Tokens are kept as digests, so that neither a `repr` nor the time of a look-up tells one."""

    def __init__(self, tokens: Iterable[tuple[str, Tenant]]) -> None:
        self._by_digest = {_digest(token): tenant for token, tenant in tokens}

    @classmethod
    def from_file(cls, path: Path) -> Tenants:
        """From TOML: a table a tenant, with `token` and any field of `Quota`. Raises ConfigError, naming what is
        wrong."""
        try:
            if path.stat().st_mode & 0o077:
                raise ConfigError(f"{path} holds tokens and others may read it; `chmod 600 {path}`")
            tables = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"the file of tenants {path} cannot be read: {error}") from error
        if not tables:
            raise ConfigError(f"{path} names no tenant; give each a table, such as [alice] with token = ...")
        tokens = [_entry(name, table) for name, table in tables.items()]
        if len({token for token, _ in tokens}) < len(tokens):
            raise ConfigError(f"two tenants in {path} have the same token; give each its own")
        return cls(tokens)

    def of_token(self, token: str) -> Tenant | None:
        return self._by_digest.get(_digest(token))


def check_token(token: str, where: str) -> None:
    """Raises ConfigError for what is too short to be secret, or cannot stand in a header."""
    if len(token) < SHORTEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise ConfigError(
            f"{where} must have at least {SHORTEST_TOKEN} printable ASCII characters and no space; it has "
            f"{len(token)} characters. Make a new one: `openssl rand -hex 24`"
        )


def _entry(name: str, table: object) -> tuple[str, Tenant]:
    if not isinstance(table, dict) or not isinstance(table.get("token"), str):
        raise ConfigError(f'tenant {name!r} needs a table with a token: [{name}] and token = "..."')
    token = table["token"]
    check_token(token, f"the token of tenant {name}")
    try:
        quota = msgspec.convert({key: value for key, value in table.items() if key != "token"}, Quota)
    except msgspec.ValidationError as error:
        fields = ", ".join(["token", *Quota.__struct_fields__])
        raise ConfigError(f"tenant {name}: {error}; the keys are {fields}") from error
    return token, Tenant(name, quota)


def _is_address(host: str) -> bool:
    """Of an entry of an allow-list. What is listed as an address can be reached, whatever it is of."""
    name = parse_rule(host).host
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
