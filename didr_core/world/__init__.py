"""The bundled tiny world: renderer, captions, checker, measures, trained weights and the command that makes them.

Start with ``assess.assess`` (measure pictures), ``build`` (make the world again) and ``README.md``.
``WORLD`` is the folder of committed weights.
"""

from pathlib import Path

WORLD = Path(__file__).parent / "files"
