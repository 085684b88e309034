"""NCCL between GPUs' memory."""
