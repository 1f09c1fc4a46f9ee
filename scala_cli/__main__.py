"""Where the `scala` command begins."""

import sys


def main() -> None:
    """Runs the command. Its modules take a tenth of a second to import, in which Ctrl-C is heard too."""
    try:
        from scala_cli.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
