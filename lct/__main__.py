"""`python -m lct`, as `torchrun -m lct train …` needs it."""

import sys

from lct.cli import main

if __name__ == "__main__":
    sys.exit(main())
