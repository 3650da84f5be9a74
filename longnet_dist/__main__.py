"""Run the command `longnet-dist`, as `python -m longnet_dist`."""

import sys

from longnet_dist.cli.app import main

sys.exit(main())
