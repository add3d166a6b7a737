"""Search spaces for `didr sweep`, one `def space() -> dict` a file."""
