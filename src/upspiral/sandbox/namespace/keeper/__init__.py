"""The keeper: a small process of one thread that forks sandboxes and holds the layers that they share.

Standard library only, and little of it: its memory is copied into every sandbox.
"""

MAX_MESSAGE_BYTES = 128 * 1024
"""Of one message between host and keeper."""
