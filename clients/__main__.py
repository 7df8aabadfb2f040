"""`python -m clients` is the `prefixserve` command."""

from clients.cli import main

main()
