"""Checks of a running stack: expected against stored rows, the demo, the drill."""
