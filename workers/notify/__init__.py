"""Notifications: signed webhooks that announce changes of the feed to subscribers."""
