"""History: backfills are fetched page by page."""
