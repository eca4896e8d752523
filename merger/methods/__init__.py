"""One file is one method or stage. Importing this package registers them all."""

from importlib import import_module
from pkgutil import iter_modules

for _module in sorted(iter_modules(__path__), key=lambda m: m.name):
    if not _module.name.startswith("_"):
        import_module(f"{__name__}.{_module.name}")
