"""Recipes resolved against headers: the action on every tensor, and its cost. No tensor is merged here."""
