"""The tables of the trajectory store, and nouns to rows and back."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from upspiral.types import Message, Node, Rollout, RolloutStatus

SCHEMA_VERSION = 3
"""Kept in SQLite's user_version. Raise it when a table changes, and say in MIGRATIONS how an older file catches up."""

MIGRATIONS = {2: "BEGIN IMMEDIATE; ALTER TABLE nodes ADD COLUMN routes BLOB; PRAGMA user_version = 3; COMMIT;"}
"""By the version that a file has: what makes it one of the next."""

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS rollouts (
    id TEXT PRIMARY KEY, task_id TEXT NOT NULL, group_id TEXT NOT NULL, split TEXT NOT NULL, step INTEGER NOT NULL,
    status TEXT NOT NULL, reason TEXT NOT NULL, reward REAL, answer TEXT NOT NULL, instruction TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS rollouts_by_step ON rollouts (split, step);
CREATE TABLE IF NOT EXISTS nodes (
    rollout_id TEXT NOT NULL REFERENCES rollouts (id), id INTEGER NOT NULL, parent INTEGER, role TEXT NOT NULL,
    reason TEXT NOT NULL,
    token_ids BLOB NOT NULL,    -- int32, little-endian
    sampled BLOB NOT NULL,      -- uint8, 0 or 1
    logprobs BLOB NOT NULL,     -- float32, NaN where not sampled
    versions BLOB NOT NULL,     -- int32
    message TEXT,               -- JSON
    finish_reason TEXT, delivered INTEGER NOT NULL, auxiliary TEXT NOT NULL, num_sampled INTEGER NOT NULL,
    routes BLOB,                -- int16: layers, experts of a token, then those of each token by layer
    PRIMARY KEY (rollout_id, id)
);
CREATE TABLE IF NOT EXISTS edges (
    rollout_id TEXT NOT NULL, kind TEXT NOT NULL, source INTEGER NOT NULL, target INTEGER NOT NULL,
    evidence TEXT NOT NULL,
    PRIMARY KEY (rollout_id, kind, source, target),
    FOREIGN KEY (rollout_id, source) REFERENCES nodes (rollout_id, id),
    FOREIGN KEY (rollout_id, target) REFERENCES nodes (rollout_id, id)
);
CREATE TABLE IF NOT EXISTS credits (
    rollout_id TEXT PRIMARY KEY REFERENCES rollouts (id), step INTEGER NOT NULL, group_id TEXT NOT NULL,
    token_weight REAL NOT NULL, masked TEXT,
    withheld TEXT NOT NULL      -- JSON: reason -> sampled tokens
);
CREATE INDEX IF NOT EXISTS credits_by_step ON credits (step);
CREATE TABLE IF NOT EXISTS node_credits (
    rollout_id TEXT NOT NULL, node_id INTEGER NOT NULL, step INTEGER NOT NULL, positive REAL NOT NULL,
    negative REAL NOT NULL,
    PRIMARY KEY (rollout_id, node_id), FOREIGN KEY (rollout_id, node_id) REFERENCES nodes (rollout_id, id)
);
CREATE INDEX IF NOT EXISTS node_credits_by_step ON node_credits (step);
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""

ROLLOUT_COLUMNS = "id, task_id, group_id, split, step, status, reason, reward, answer, instruction"
INSERT_ROLLOUT = f"INSERT INTO rollouts ({ROLLOUT_COLUMNS}) VALUES ({', '.join('?' * 10)})"

NODE_COLUMNS = (
    "id, parent, role, reason, token_ids, sampled, logprobs, versions, message, finish_reason, delivered, auxiliary, "
    "routes"
)
INSERT_NODE = f"INSERT INTO nodes (rollout_id, {NODE_COLUMNS}, num_sampled) VALUES ({', '.join('?' * 15)})"

EDGE_COLUMNS = "kind, source, target, evidence"
INSERT_EDGE = f"INSERT OR IGNORE INTO edges (rollout_id, {EDGE_COLUMNS}) VALUES (?, ?, ?, ?, ?)"

LEDGER_QUERY = f"""
SELECT {ROLLOUT_COLUMNS}, (SELECT COUNT(*) FROM credits WHERE rollout_id = rollouts.id),
    (SELECT masked FROM credits WHERE rollout_id = rollouts.id),
    (SELECT withheld FROM credits WHERE rollout_id = rollouts.id),
    (SELECT COALESCE(SUM(num_sampled), 0) FROM nodes WHERE rollout_id = rollouts.id),
    (SELECT COALESCE(SUM(num_sampled), 0) FROM nodes JOIN node_credits
        ON nodes.rollout_id = node_credits.rollout_id AND nodes.id = node_credits.node_id
        WHERE nodes.rollout_id = rollouts.id)
FROM rollouts{{where}}
"""


def rollout_row(rollout: Rollout) -> tuple[Any, ...]:
    return (
        rollout.id, rollout.task_id, rollout.group_id, rollout.split, rollout.step, rollout.status.value,
        rollout.reason, rollout.reward, rollout.answer, rollout.instruction,
    )  # fmt: skip


def rollout_of(row: tuple[Any, ...]) -> Rollout:
    rollout_id, task_id, group_id, split, step, status, reason, reward, answer, instruction = row
    return Rollout(
        rollout_id, task_id, group_id, split, step, RolloutStatus(status), reason, reward, answer, instruction
    )


def node_row(rollout_id: str, node: Node) -> tuple[Any, ...]:
    return (
        rollout_id, node.id, node.parent, node.role, node.reason,
        node.token_ids.astype("<i4").tobytes(), node.sampled.astype("u1").tobytes(),
        node.logprobs.astype("<f4").tobytes(), node.versions.astype("<i4").tobytes(),
        None if node.message is None else msgspec.json.encode(node.message).decode(),
        node.finish_reason, node.delivered, node.auxiliary, _routes_blob(node.routes), node.num_sampled,
    )  # fmt: skip


def node_of(row: tuple[Any, ...]) -> Node:
    """Raises ValueError for a row that cannot have been written by `node_row`."""
    node_id, parent, role, reason, token_ids, sampled, logprobs, versions, message, *ending = row
    finish_reason, delivered, auxiliary, routes = ending
    return Node(
        id=node_id,
        parent=parent,
        role=role,
        reason=reason,
        token_ids=np.frombuffer(token_ids, "<i4"),
        sampled=np.frombuffer(sampled, "u1").astype(np.bool_),
        logprobs=np.frombuffer(logprobs, "<f4"),
        versions=np.frombuffer(versions, "<i4"),
        message=None if message is None else msgspec.json.decode(message, type=Message),
        finish_reason=finish_reason,
        delivered=bool(delivered),
        auxiliary=auxiliary,
        routes=None if routes is None else _routes_of(routes),
    )


def _routes_blob(routes: NDArray[np.int16] | None) -> bytes | None:
    if routes is None:
        return None
    return np.concatenate([np.array(routes.shape[1:]), routes.ravel()]).astype("<i2").tobytes()


def _routes_of(blob: bytes) -> NDArray[np.int16]:
    layers, experts, *_ = np.frombuffer(blob, "<i2", 2).tolist()
    return np.frombuffer(blob, "<i2", offset=4).reshape(-1, layers, experts)
