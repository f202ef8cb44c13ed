"""`python -m longspan` is the command `longspan`."""

from longspan.cli.main import main

if __name__ == "__main__":
    main()
