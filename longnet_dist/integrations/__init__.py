"""Other software that runs longnet_dist, or in which it runs: each has a file or folder, which alone imports it."""
