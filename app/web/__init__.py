"""The endpoint: only verifies and publishes webhooks."""
