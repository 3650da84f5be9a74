"""`python -m longnet_dist` is the command `longnet-dist`."""

import sys

from longnet_dist.cli.app import main

sys.exit(main())
