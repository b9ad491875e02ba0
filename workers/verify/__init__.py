"""Checks of a running stack: what must be stored, the demo, the drill."""
