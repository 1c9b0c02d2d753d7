"""What handlers find as pip: it installs nothing and says so, as the archives of a server share its libraries."""

import sys


def main(arguments: list[str] | None = None) -> int:
    """Install nothing."""
    print("pip: nothing is installed here; the code runs with the libraries of the server", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
