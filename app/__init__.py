"""Headrace: the endpoint, and what it shares with the workers."""
