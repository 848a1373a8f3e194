"""The trajectory graph of a rollout, its store, ledger and export."""
