"""`python -m pointalign` is the command `pointalign`."""

from pointalign.cli import main

main()
