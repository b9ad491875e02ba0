"""Compares the data that an aggregator lists with the stored data, and fetches missing data."""
