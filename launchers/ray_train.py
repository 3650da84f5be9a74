"""Train on a Ray cluster from Python. Edit the three settings, then:

RAY_ADDRESS=head:6379 python launchers/ray_train.py
"""

from longnet_dist import TrainConfig
from longnet_dist.integrations.ray import train_on_ray
from longnet_dist.training.config import RayConfig

RANKS = 2  # number of processes in the whole cluster
RAY = RayConfig(cpus_per_rank=1, gpus_per_rank=0, min_ranks=1)  # continues with one rank if nodes are lost
RUN = TrainConfig(run_folder="/shared/runs/first", checkpoint_every=20)  # a folder that every node sees

if __name__ == "__main__":
    print(train_on_ray(RUN, RANKS, RAY))
