"""Configuration: `settings` reads the environment, `types` checks each value."""
