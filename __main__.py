"""`python -m medct` is the command `medct`."""

from medct.cli import run

if __name__ == "__main__":
    run()
