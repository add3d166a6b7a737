"""Components (algorithms, backbones, rewards) as the configuration sees them: found by name, each with its own small ``Config``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from didr_core import registry

WORLD = Path(__file__).parent / "zoo" / "world"


class Strict(BaseModel):
    """Base of every section: frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def component(kind: str) -> BeforeValidator:
    """For a field that names a component of ``kind``: turns a name, or a mapping with ``name``, into that component's own Config."""

    def validate(value: Any) -> Any:
        if isinstance(value, BaseModel) or value is None:
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or "name" not in value:
            raise ValueError(f"expected a name or a mapping with 'name', got {value!r}")
        try:
            return (own := registry.find(kind, value["name"]).Config)(**value)
        except ValidationError as error:
            raise ValueError("; ".join(_explain_own(e, own, value["name"]) for e in error.errors())) from None

    return BeforeValidator(validate)


def _explain_own(error: Any, own: type[BaseModel], name: str) -> str:
    key, value = ".".join(str(p) for p in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        known = [k for k in own.model_fields if k != "name"]
        near = difflib.get_close_matches(key.rpartition(".")[2], known, 1, 0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known) or 'no options'}."
        return f"{name} has no key {key!r} (value {value!r}). {hint}"
    got = "" if isinstance(value, Mapping) else f" (got {value!r})"
    return f"{name}: {key}: {error['msg'].removeprefix('Value error, ')}{got}"


class Component(Strict):
    """Base of a component's own Config: its key and its options."""

    name: str

    def exported(self, folder: Path) -> Self:
        """A backbone's config, with what its `export` wrote into ``folder`` as the generator: by default a whole pipeline."""
        return self.model_copy(update={"pipeline": str(folder), "generator": None})


def build(kind: str, config: Component) -> Any:
    """The component that ``config`` describes."""
    return registry.find(kind, config.name)(config)


def locate(path: str) -> Path:
    """``zoo://x`` is inside the bundled world; anything else is a path as it stands."""
    return WORLD / path.removeprefix("zoo://") if path.startswith("zoo://") else Path(path).expanduser()
