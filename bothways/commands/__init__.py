"""The commands of the command line, one file each: a thin face over a Python function."""
