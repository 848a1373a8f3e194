"""Training on many ranks by torch's own means: FSDP2, tensor parallel and expert parallel, on transformers' modules."""
