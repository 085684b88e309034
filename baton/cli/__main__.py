"""`python -m baton.cli`, the same as `baton`."""

import sys

from baton.cli import main

sys.exit(main())
