"""The commands of the command line, one file each: a thin wrapper around a Python function."""
