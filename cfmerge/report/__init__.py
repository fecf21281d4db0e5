"""What a merge tells: its result, and the model card."""
