"""What every process reports: logs, metrics, traces."""
