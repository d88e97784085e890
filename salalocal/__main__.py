"""python -m salalocal."""

from salalocal.cli import main

main()
