"""One file is one method or stage. Importing this package registers them all; a broken file is left out."""

from pkgutil import iter_modules

from merger.methods._importing import import_methods

for _module in sorted(iter_modules(__path__), key=lambda m: m.name):
    if not _module.name.startswith("_"):
        import_methods(f"{__name__}.{_module.name}")
