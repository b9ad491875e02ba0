"""Requests to aggregators: one HTTP client, retry decisions, shared rate limits."""
