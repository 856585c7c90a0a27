"""`python -m bothways`: the command line."""

import sys

from bothways.cli import command

sys.exit(command())
