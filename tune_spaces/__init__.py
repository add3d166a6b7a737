"""Search spaces of `didr sweep`: a file each, with one plain function `space()`. See README.md."""
