"""Makes golden_metrics.json: what the field's packages say of the random features of tests/toy_features.py.

Not a test and not run by them; in an environment of its own (any CPU build of torch):

    python -m venv golden
    golden/bin/pip install torch==2.13.0 torchmetrics==1.9.0 prdc==0.2 scikit-learn==1.9.1 scipy==1.17.1
    golden/bin/python tests/evaluate/make_golden_metrics.py

FID and KID are torchmetrics' own functions on float64 moments and features (its classes keep float32 features), precision to coverage are
prdc's. CMMD has no package: it is written here from the paper's formula with scikit-learn's kernel.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from toy_features import SETS, sets  # noqa: E402

PACKAGES = ("torch", "torchmetrics", "prdc", "scikit-learn", "scipy", "numpy")


def values(real: np.ndarray, made: np.ndarray) -> dict[str, float]:
    """Every metric by its package."""
    import prdc
    import torch
    from sklearn.metrics.pairwise import rbf_kernel
    from torchmetrics.image.fid import _compute_fid
    from torchmetrics.image.kid import poly_mmd

    a, b = torch.from_numpy(real), torch.from_numpy(made)
    out: dict[str, Any] = {"fid": float(_compute_fid(a.mean(0), a.T.cov(), b.mean(0), b.T.cov()))}
    few = min(len(a), len(b))  # it takes sets of one size
    out["kid of the first"] = float(poly_mmd(a[:few], b[:few]))
    x, y = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (real, made))
    means = [rbf_kernel(p, q, gamma=1 / 200).mean() for p, q in ((x, x), (y, y), (x, y))]
    out["cmmd"] = 1000 * (means[0] + means[1] - 2 * means[2])
    return out | {k: float(v) for k, v in prdc.compute_prdc(real, made, nearest_k=5).items()}


if __name__ == "__main__":
    tree = {
        "made by": "tests/evaluate/make_golden_metrics.py",
        "packages": {name: version(name) for name in PACKAGES},
        "values": {name: values(*sets(name)) for name in SETS},
    }
    (HERE / "golden_metrics.json").write_text(json.dumps(tree, indent=1) + "\n")
