"""Results that are not one checkpoint: the base, and what each expert adds to it."""
