"""The run's configuration: what it may say (`schema`, `sections`), how it is read (`load`), how components are found (`registry`)."""

from didr_core.config.load import RECIPES as RECIPES
from didr_core.config.load import dump as dump
from didr_core.config.load import flatten as flatten
from didr_core.config.load import load as load
from didr_core.config.load import recorded as recorded
from didr_core.config.load import validate as validate
from didr_core.config.passwords import redacted as redacted
from didr_core.config.registry import WORLD as WORLD
from didr_core.config.registry import Component as Component
from didr_core.config.registry import Strict as Strict
from didr_core.config.registry import build as build
from didr_core.config.registry import bundled as bundled
from didr_core.config.registry import component as component
from didr_core.config.registry import locate as locate
from didr_core.config.schema import Config as Config
from didr_core.config.sections import DRP as DRP
from didr_core.config.sections import Anchor as Anchor
from didr_core.config.sections import Dtype as Dtype
from didr_core.config.sections import Kind as Kind
from didr_core.config.sections import Optim as Optim
from didr_core.config.sections import Recompute as Recompute
from didr_core.config.sections import Roles as Roles
from didr_core.config.sections import Tracking as Tracking
from didr_core.config.sections import Workers as Workers
