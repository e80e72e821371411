"""python -m maskbeam: the same as the command maskbeam."""

import sys

from maskbeam.pipeline.cli import main

if __name__ == "__main__":
    sys.exit(main())
