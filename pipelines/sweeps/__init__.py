"""The parts of `didr sweep`; `pipelines/sweep.py` puts them together. See ../README.md."""
