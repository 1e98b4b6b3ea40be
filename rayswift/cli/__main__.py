"""`python -m rayswift.cli`: the command line without an installed entry point."""

from rayswift.cli import main

main()
