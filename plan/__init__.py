"""What a recipe would need on a target topology: its own programs, compiled ahead of time, and a roofline."""
