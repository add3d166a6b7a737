"""Commands that make the numbers of the README."""
