"""One file is one method or stage, as is a module that an installed package names as its entry point.

Importing this package registers them all; a broken file is left out.
"""

from pkgutil import iter_modules

from merger.methods._importing import import_file, import_installed

for _module in sorted(iter_modules(__path__), key=lambda m: m.name):
    if not _module.name.startswith("_"):
        import_file(f"{__name__}.{_module.name}")
import_installed()
