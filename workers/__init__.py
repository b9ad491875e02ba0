"""The workers: everything that touches the database or an aggregator."""
