"""`python -m launcher` is `leviathan`."""

from launcher.cli import main

main()
