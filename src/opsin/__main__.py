"""`python -m opsin` and the `opsin` command are the same."""

import sys


def main() -> None:
    from opsin.cli import run

    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
