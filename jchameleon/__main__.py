"""Run the command line as `python -m jchameleon`."""

import sys

from jchameleon.cli import main

if __name__ == "__main__":
    sys.exit(main())
