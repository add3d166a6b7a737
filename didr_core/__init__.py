"""DIDR's core: the method in pure PyTorch. Never imports ray or mlflow; trains in one process on a CPU."""
