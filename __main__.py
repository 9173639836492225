"""`python -m medct` is the command `medct`."""

import sys

from medct.cli import main

if __name__ == "__main__":
    sys.exit(main())
