"""`python -m turboserve` and the `turboserve` command, up to where the command line itself takes over.

Written so that older Pythons can read it, and are told which one is needed.
"""

import sys

OLDEST = (3, 11)


def main() -> object:
    """Entry point; docs/cli.md has the exit statuses."""
    if sys.version_info < OLDEST:
        needed, found = (".".join(str(part) for part in version[:3]) for version in (OLDEST, sys.version_info))
        sys.exit(
            f"turboserve: Python {needed} or newer is needed, and this is {found}: "
            "make a virtual environment with a newer one, such as `python3.12 -m venv .venv`"
        )
    try:
        from turboserve.cli.main import main as command
    except KeyboardInterrupt:  # imports take half a second
        sys.stderr.write("turboserve: interrupted by Ctrl-C before anything was begun\n")
        sys.exit(130)
    except ImportError as exc:
        sys.exit(f"turboserve: a package is missing or broken ({exc}): pip install --force-reinstall turboserve")
    return command()


if __name__ == "__main__":
    main()
