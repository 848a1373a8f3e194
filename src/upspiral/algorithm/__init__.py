"""Credit and loss, one file each."""
