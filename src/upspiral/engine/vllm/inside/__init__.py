"""What runs in vLLM's environment. It stands alone: nothing of upspiral is installed there."""
