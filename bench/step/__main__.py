"""`python -m bench.step` is `python -m bench.step.run`."""

import sys

from bench.step.run import main

sys.exit(main())
