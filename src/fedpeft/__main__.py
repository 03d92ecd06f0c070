"""`python -m fedpeft`: the same as the command `fedpeft`."""

from fedpeft.cli import main

if __name__ == "__main__":
    main()
