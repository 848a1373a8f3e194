"""Our own compiled code: what torch's kernels for CPU cannot do, with a twin in torch for every part of it."""
