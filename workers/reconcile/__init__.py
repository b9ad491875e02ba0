"""Compares what an aggregator says it has with what is stored, and fetches what is missing."""
