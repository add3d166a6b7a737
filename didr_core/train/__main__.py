"""``python -m didr_core.train``: see :mod:`didr_core.train.loop`."""

import sys

from didr_core.train.loop import main

sys.exit(main())
