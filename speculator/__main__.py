"""`python -m speculator`: the same as the `speculator` command."""

from speculator.cli import main

if __name__ == "__main__":
    main()
