"""adaptis."""
