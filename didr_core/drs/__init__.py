"""Estimators of the Diffused Reward Score, one a file: the file's name is `drp.estimator`."""

from didr_core.drs.problem import Calls, Estimate, Estimator, Problem, estimate

__all__ = ["Calls", "Estimate", "Estimator", "Problem", "estimate"]
