"""Entry point of `python -m contrib.demo`."""

import sys

from contrib.demo.demo import main

sys.exit(main())
