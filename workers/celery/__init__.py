"""The Celery worker: application, tasks, consumer, Flower."""
