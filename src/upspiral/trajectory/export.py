"""A run's trajectories as JSONL (one rollout a line) or Parquet (one node a row), for other programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import orjson

from upspiral.errors import StoreError
from upspiral.trajectory.store import TrajectoryStore
from upspiral.types import Node, NodeCredit, Rollout

ROWS_PER_GROUP = 4096
"""Nodes held in memory while writing Parquet, and the size of its row groups."""


def export_jsonl(store: TrajectoryStore, path: str | Path) -> int:
    """Writes one JSON object per rollout: its fields, its credit (or null) and its nodes; log-probabilities of tokens
    that nobody sampled are null. Returns the number of rollouts. Raises StoreError when `path` cannot be written."""
    count = 0
    try:
        with Path(path).open("wb") as file:
            for rollout in store.rollouts():
                file.write(orjson.dumps(_rollout_object(store, rollout), option=orjson.OPT_APPEND_NEWLINE))
                count += 1
    except OSError as error:
        raise _unwritable(path, error) from error
    return count


def export_parquet(store: TrajectoryStore, path: str | Path) -> int:
    """Writes one row per node with its rollout's fields beside it; NaN where a token has no log-probability.
    Returns the number of nodes. Raises StoreError when `path` cannot be written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    try:
        with pq.ParquetWriter(path, _schema(pa)) as writer:
            for batch in _batched(_node_rows(store), ROWS_PER_GROUP):
                writer.write_table(pa.Table.from_pylist(batch, schema=_schema(pa)))
                count += len(batch)
    except OSError as error:
        raise _unwritable(path, error) from error
    return count


def _schema(pa: Any) -> Any:
    text, int32, float32, float64 = pa.string(), pa.int32(), pa.float32(), pa.float64()
    return pa.schema({
        "rollout_id": text, "task_id": text, "group_id": text, "split": text, "step": int32, "status": text,
        "status_reason": text, "reward": float64, "masked": text, "token_weight": float64,
        "node_id": int32, "parent": int32, "role": text, "reason": text, "finish_reason": text,
        "delivered": pa.bool_(), "message": text, "positive": float64, "negative": float64,
        "token_ids": pa.list_(int32), "sampled": pa.list_(pa.bool_()), "logprobs": pa.list_(float32),
        "versions": pa.list_(int32),
    })  # fmt: skip


def _node_rows(store: TrajectoryStore) -> Iterator[dict[str, Any]]:
    for rollout in store.rollouts():
        credit = next(iter(store.credits(rollout_id=rollout.id)), None)
        credit_of = {} if credit is None else {node.node_id: node for node in credit.nodes}
        about_rollout = {
            "rollout_id": rollout.id, "task_id": rollout.task_id, "group_id": rollout.group_id,
            "split": rollout.split, "step": rollout.step, "status": rollout.status.value,
            "status_reason": rollout.reason, "reward": rollout.reward,
            "masked": credit and credit.masked, "token_weight": credit and credit.token_weight,
        }  # fmt: skip
        for node in store.graph(rollout.id).nodes:
            yield about_rollout | _node_row(node, credit_of.get(node.id))


def _node_row(node: Node, credit: NodeCredit | None) -> dict[str, Any]:
    return {
        "node_id": node.id, "parent": node.parent, "role": node.role, "reason": node.reason,
        "finish_reason": node.finish_reason, "delivered": node.delivered,
        "message": None if node.message is None else msgspec.json.encode(node.message).decode(),
        "positive": credit and credit.positive, "negative": credit and credit.negative,
        "token_ids": node.token_ids, "sampled": node.sampled, "logprobs": node.logprobs, "versions": node.versions,
    }  # fmt: skip


def _rollout_object(store: TrajectoryStore, rollout: Rollout) -> dict[str, Any]:
    credit = next(iter(store.credits(rollout_id=rollout.id)), None)
    return msgspec.to_builtins(rollout) | {
        "credit": None if credit is None else msgspec.to_builtins(credit),
        "nodes": [_node_object(node) for node in store.graph(rollout.id).nodes],
    }


def _node_object(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "parent": node.parent,
        "role": node.role,
        "reason": node.reason,
        "token_ids": node.token_ids.tolist(),
        "sampled": node.sampled.tolist(),
        "logprobs": [None if math.isnan(value) else value for value in node.logprobs.tolist()],
        "versions": node.versions.tolist(),
        "message": None if node.message is None else msgspec.to_builtins(node.message),
        "finish_reason": node.finish_reason,
        "delivered": node.delivered,
    }


def _batched(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _unwritable(path: str | Path, error: OSError) -> StoreError:
    return StoreError(f"cannot write {path}: {error}; check that its folder exists and has free space")
