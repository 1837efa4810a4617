"""``python -m clora`` is the command ``clora``."""

from clora.cli import main

if __name__ == "__main__":
    main()
