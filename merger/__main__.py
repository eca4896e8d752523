"""`python -m merger` is `merger`."""

from merger.cli import main

main()
