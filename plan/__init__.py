"""What a recipe would need on chips that are not here: its own programs, compiled ahead of time, and a roofline."""
