"""Recipes resolved against headers: what is done with every tensor, in which units. No tensor is merged here."""
