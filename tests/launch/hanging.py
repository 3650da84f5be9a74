"""`longnet-dist train`, in which rank 1 sleeps past every time limit in its third step."""

import os
import sys
import time

from longnet_dist import cli
from longnet_dist.train import _Trainer

windows = _Trainer._windows


def oversleep(self, step, micro, every=False):
    if step == 3 and os.environ["RANK"] == "1":
        time.sleep(20)
    return windows(self, step, micro, every)


if __name__ == "__main__":
    _Trainer._windows = oversleep
    sys.exit(cli.main(sys.argv[1:]))
