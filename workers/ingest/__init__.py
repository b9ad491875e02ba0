"""From a message of deliveries to rows: apply, download, replay, and the RabbitMQ pipeline."""
