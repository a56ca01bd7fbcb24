"""`python -m gramlip` is the `gramlip` command."""

import sys

from gramlip.cli import main

if __name__ == "__main__":
    sys.exit(main())
