"""Recipes: a module here holds `recipes`, a dict from name to Recipe."""
