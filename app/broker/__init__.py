"""The broker: lanes, the Celery application, publishing, and the Redis transport."""
