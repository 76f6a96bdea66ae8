"""`python -m tightfit` is the command line."""

from tightfit.cli import main

main()
