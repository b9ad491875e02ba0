"""Everything that touches the database or a provider."""
