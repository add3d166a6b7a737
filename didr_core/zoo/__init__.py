"""The bundled tiny world."""
