"""``python -m fpnumba``: the same as the ``fpnumba`` command."""

import sys

from fpnumba.cli import main

if __name__ == "__main__":
    sys.exit(main())
