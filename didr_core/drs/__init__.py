"""Estimators of the Diffused Reward Score, one a file: the file's name is `drp.estimator`."""

from didr_core.drs.problem import Denoise, Estimate, Estimator, Problem, Reward, estimate

__all__ = ["Denoise", "Estimate", "Estimator", "Problem", "Reward", "estimate"]
