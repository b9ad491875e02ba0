"""Ingestion of deliveries: apply, download, replay, and the RabbitMQ pipeline."""
