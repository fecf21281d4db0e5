"""`python -m cfmerge`: the command line."""

from cfmerge.cli import main

if __name__ == "__main__":
    main()
