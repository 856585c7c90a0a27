"""What every folder may use: the error for people, the recipe, the run directory."""
