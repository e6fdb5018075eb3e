"""`python -m fastgrpo`, the same as the command `fastgrpo`."""

import sys

from fastgrpo.cli import main

sys.exit(main())
