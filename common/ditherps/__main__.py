"""`python -m ditherps` is `ditherps`."""

import sys

from ditherps.cli import main

sys.exit(main())
