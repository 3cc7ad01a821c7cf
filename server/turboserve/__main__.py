"""`python -m turboserve` is the `turboserve` command."""

from turboserve.cli.main import main

main()
