"""The account of a merge: its result, and the model card."""
