"""`python -m fastgrpo.integrations.trl`."""

import sys

from fastgrpo.integrations.trl.script import main

sys.exit(main(sys.argv[1:]))
