"""Dilated attention: the function, its operators, the exchanges and kernels that they use, and the oracle."""
