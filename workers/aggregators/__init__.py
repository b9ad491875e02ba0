"""The aggregators: pure modules with the same functions (registry.py), without I/O."""
