"""Loading, versions, publication and export of weights."""
