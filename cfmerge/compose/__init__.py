"""Results that are not one checkpoint."""
