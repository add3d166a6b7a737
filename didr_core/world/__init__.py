"""The bundled tiny world: renderer, captions, checker, the utility that measures pictures, trained weights (``files``)."""
