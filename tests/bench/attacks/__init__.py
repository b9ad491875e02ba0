"""Attacks on a complete stack while good deliveries arrive: `python -m tests.bench.attacks`."""
