"""The endpoint: verifies webhooks and publishes them, nothing else."""
