"""The dialect of /v1/responses: items in, items out, and responses that are remembered."""
