"""`python -m wsm_ext`: the command `wsm`, where its script is not on the path."""

import sys

from .commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
