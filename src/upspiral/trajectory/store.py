"""The trajectory store: rollouts, nodes and credits of one run in one SQLite file.

What a method of this class wrote before it returned survives kill -9 (write-ahead log, synchronous=NORMAL; a power
cut may lose the last moments but never corrupts). Arrays are little-endian blobs; see `schema` for the tables.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upspiral.errors import StoreError
from upspiral.trajectory import rows
from upspiral.trajectory.graph import TrajectoryGraph
from upspiral.trajectory.ledger import account, account_uncredited
from upspiral.types import Edge, Ledger, Node, NodeCredit, Rollout, RolloutCredit, RolloutStatus

BUSY_TIMEOUT_S = 10.0
"""How long a write waits for another process that is writing to the same file."""


class TrajectoryStore:
    """One per run. Methods may be called from any thread; each holds a lock only while it talks to SQLite.

    Every method raises StoreError, naming the file, when SQLite cannot read or write it.
    """

    def __init__(self, path: str | Path, *, create: bool = True) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        if not create and not self.path.is_file():
            raise StoreError(f"no trajectory store at {self.path}; give the folder of a run that has started")
        with self._explained("open"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None
            )
            self._prepare()

    def create_rollout(self, rollout: Rollout) -> None:
        """Records a rollout before its first token. StoreError when the id is taken."""
        with self._transaction(f"create rollout {rollout.id!r}") as connection:
            connection.execute(rows.INSERT_ROLLOUT, rows.rollout_row(rollout))

    def commit(self, rollout_id: str, nodes: Sequence[Node], edges: Sequence[Edge] = ()) -> None:
        """Adds nodes and causal edges to a rollout: all or none."""
        with self._transaction(f"commit nodes of rollout {rollout_id!r}") as connection:
            connection.executemany(rows.INSERT_NODE, [rows.node_row(rollout_id, node) for node in nodes])
            values = [(rollout_id, edge.kind, edge.source, edge.target, edge.evidence) for edge in edges]
            connection.executemany(rows.INSERT_EDGE, values)

    def finish_rollout(
        self,
        rollout_id: str,
        *,
        status: RolloutStatus,
        reason: str = "",
        reward: float | None = None,
        answer: str = "",
    ) -> None:
        """Records how a rollout ended. `reward` None means that no verifier judged it."""
        with self._transaction(f"finish rollout {rollout_id!r}") as connection:
            cursor = connection.execute(
                "UPDATE rollouts SET status = ?, reason = ?, reward = ?, answer = ? WHERE id = ?",
                (status.value, reason, reward, answer, rollout_id),
            )
            if cursor.rowcount == 0:
                raise StoreError(f"{self.path} has no rollout {rollout_id!r}; create it before it is finished")

    def rollout(self, rollout_id: str) -> Rollout:
        """Raises StoreError when there is none of that id."""
        found = self.find_rollout(rollout_id)
        if found is None:
            raise StoreError(f"{self.path} has no rollout {rollout_id!r}")
        return found

    def find_rollout(self, rollout_id: str) -> Rollout | None:
        found = self._select(f"SELECT {rows.ROLLOUT_COLUMNS} FROM rollouts WHERE id = ?", (rollout_id,))
        return rows.rollout_of(found[0]) if found else None

    def rollouts(
        self, *, split: str | None = None, step: int | None = None, status: RolloutStatus | None = None
    ) -> list[Rollout]:
        """Rollouts in the order of their creation; None does not filter."""
        where, values = _filters({"split": split, "step": step, "status": status and status.value})
        found = self._select(f"SELECT {rows.ROLLOUT_COLUMNS} FROM rollouts{where} ORDER BY rowid", values)
        return [rows.rollout_of(row) for row in found]

    def graph(self, rollout_id: str) -> TrajectoryGraph:
        """Everything committed so far; empty for a rollout that has no nodes yet."""
        graph = TrajectoryGraph(rollout_id)
        query = f"SELECT {rows.NODE_COLUMNS} FROM nodes WHERE rollout_id = ? ORDER BY id"
        with self._explained(f"read rollout {rollout_id!r}"):
            for row in self._select(query, (rollout_id,)):
                graph.append(rows.node_of(row))
            edges = f"SELECT {rows.EDGE_COLUMNS} FROM edges WHERE rollout_id = ? ORDER BY rowid"
            for row in self._select(edges, (rollout_id,)):
                graph.connect(Edge(*row))
        return graph

    def shape(self) -> tuple[dict[str, int], dict[str, int]]:
        """How many nodes of all rollouts hang where they do for each reason, and how many causal edges of each kind
        join them."""
        reasons = self._select("SELECT reason, COUNT(*) FROM nodes GROUP BY reason ORDER BY 2 DESC", ())
        kinds = self._select("SELECT kind, COUNT(*) FROM edges GROUP BY kind ORDER BY 2 DESC", ())
        return dict(reasons), dict(kinds)

    def sampled_tokens(self) -> dict[str, int]:
        """Committed sampled tokens by rollout id; rollouts without nodes are left out."""
        return dict(self._select("SELECT rollout_id, SUM(num_sampled) FROM nodes GROUP BY rollout_id", ()))

    def cancel_running(self, reason: str) -> int:
        """Marks every rollout that is still running as cancelled, in one transaction. Returns how many there were."""
        with self._transaction("cancel the running rollouts") as connection:
            values = (RolloutStatus.CANCELLED.value, reason, RolloutStatus.RUNNING.value)
            return connection.execute("UPDATE rollouts SET status = ?, reason = ? WHERE status = ?", values).rowcount

    def record_step(self, step: int, credits: Sequence[RolloutCredit]) -> None:
        """Records what each rollout gave to a step: all or nothing, replacing what the step had recorded before (a
        resumed run repeats steps). StoreError when another step has credited one of the rollouts: a sampled token
        enters the loss once."""
        with self._transaction(f"record the credits of step {step}") as connection:
            connection.execute("DELETE FROM node_credits WHERE step = ?", (step,))
            connection.execute("DELETE FROM credits WHERE step = ?", (step,))
            for credit in credits:
                self._insert_credit(connection, step, credit)

    def credits(self, *, step: int | None = None, rollout_id: str | None = None) -> list[RolloutCredit]:
        """Recorded credits in the order of recording; None does not filter."""
        where, values = _filters({"step": step, "rollout_id": rollout_id})
        nodes: dict[str, list[NodeCredit]] = {}
        node_rows = self._select(
            f"SELECT rollout_id, node_id, positive, negative FROM node_credits{where} ORDER BY rollout_id, node_id",
            values,
        )
        for owner, node_id, positive, negative in node_rows:
            nodes.setdefault(owner, []).append(NodeCredit(node_id, positive, negative))
        credit_rows = self._select(
            f"SELECT rollout_id, group_id, token_weight, masked, withheld FROM credits{where} ORDER BY rowid", values
        )
        return [
            RolloutCredit(owner, group_id, tuple(nodes.get(owner, ())), token_weight, masked, json.loads(withheld))
            for owner, group_id, token_weight, masked, withheld in credit_rows
        ]

    def ledger(self, *, step: int | None = None, split: str | None = None) -> Ledger:
        """The ledger over all rollouts that `step` and `split` leave, or over the run. Rollouts that no step credited
        count as evaluation, running or cancelled by what they are; anything else shows as a difference."""
        where, values = _filters({"split": split, "step": step})
        found = self._select(rows.LEDGER_QUERY.format(where=where), values)
        total = Ledger()
        for row in found:
            rollout, (credited, masked, withheld, sampled, trained) = rows.rollout_of(row[:-5]), row[-5:]
            if credited:
                total += account(sampled, trained, masked, json.loads(withheld))
            else:
                total += account_uncredited(rollout, sampled)
        return total

    def close(self) -> None:
        """Safe to call twice. Nothing may use the store afterwards."""
        with self._lock:
            self._connection.close()

    def _prepare(self) -> None:
        """Creates the tables of a new file, or brings those of an old one to our schema."""
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = NORMAL")
        version = self._version()
        while version in rows.MIGRATIONS:
            self._connection.executescript(rows.MIGRATIONS[version])
            version = self._version()
        if version not in (0, rows.SCHEMA_VERSION):
            raise StoreError(
                f"{self.path} has schema version {version}, this upspiral reads version {rows.SCHEMA_VERSION}; "
                "use the upspiral that wrote it, or start a run in a new folder"
            )
        if version == 0:
            self._connection.executescript(rows.SCHEMA)
        self._connection.execute("PRAGMA foreign_keys = ON")

    def _version(self) -> int:
        return self._connection.execute("PRAGMA user_version").fetchone()[0]

    def _insert_credit(self, connection: sqlite3.Connection, step: int, credit: RolloutCredit) -> None:
        try:
            connection.execute(
                "INSERT INTO credits (rollout_id, step, group_id, token_weight, masked, withheld) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (
                    credit.rollout_id, step, credit.group_id, credit.token_weight, credit.masked,
                    json.dumps(dict(credit.withheld)),
                ),
            )  # fmt: skip
        except sqlite3.IntegrityError as error:
            raise StoreError(
                f"rollout {credit.rollout_id!r} cannot be credited at step {step}: it is unknown to {self.path} or has "
                f"been credited before, and a sampled token enters the loss once ({error})"
            ) from error
        connection.executemany(
            "INSERT INTO node_credits (rollout_id, node_id, step, positive, negative) VALUES (?, ?, ?, ?, ?)",
            [(credit.rollout_id, node.node_id, step, node.positive, node.negative) for node in credit.nodes],
        )

    def _select(self, query: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._lock, self._explained("read"):
            return self._connection.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self, what: str) -> Iterator[sqlite3.Connection]:
        """One write, rolled back whole on any error."""
        with self._lock, self._explained(what):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite rolls back by itself on some errors (a full disk); then there is nothing left to roll back.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turns what SQLite and the file system say into what a person can do about it."""
        try:
            yield
        except StoreError:
            raise
        except (sqlite3.Error, OSError, ValueError) as error:
            raise StoreError(f"cannot {what} in {self.path}: {error}; {_remedy(error)}") from error


def _remedy(error: Exception) -> str:
    if isinstance(error, sqlite3.IntegrityError):
        return "the same id was given twice, or what it belongs to was never recorded"
    text = str(error)
    if "full" in text or "disk I/O" in text or "No space" in text:
        return "the disk is full or failing: free space there and resume the run; nothing committed is lost"
    if "locked" in text:
        return f"another process has held the file for {BUSY_TIMEOUT_S:g} s; stop it and resume the run"
    if isinstance(error, ValueError) or "not a database" in text or "malformed" in text:
        return "the file is damaged: move it away and restore a copy, or start a run in a new folder"
    if isinstance(error, sqlite3.ProgrammingError):
        return "the store has been closed"
    return "check that the folder exists and may be written to"


def _filters(columns: dict[str, Any]) -> tuple[str, list[Any]]:
    wanted = {column: value for column, value in columns.items() if value is not None}
    clause = " AND ".join(f"{column} = ?" for column in wanted)
    return (f" WHERE {clause}" if clause else "", list(wanted.values()))
