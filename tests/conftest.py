"""One thread for all tests: the problems are small, and on a busy machine threads that wait for each other are slow."""

import torch

torch.set_num_threads(1)
