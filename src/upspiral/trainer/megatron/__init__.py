"""Training on Megatron-core: its tensor-parallel layers, with our batches, loss, names and optimizer around them."""
