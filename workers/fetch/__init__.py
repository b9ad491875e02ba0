"""HTTP requests to aggregators and subscribers: clients, retry decisions, shared rate limits."""
