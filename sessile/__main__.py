"""`python -m sessile` is the command `sessile`."""

import sys

from sessile.cli import main

sys.exit(main())
