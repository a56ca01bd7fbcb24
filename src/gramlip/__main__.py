"""`python -m gramlip` is the `gramlip` command."""

from gramlip.cli import run

if __name__ == "__main__":
    run()
