"""From a run to a folder that others can trust: merge, write, reload, compare.

`rayswift.export` is also the public function: importing this package binds its name on `rayswift`, so the package
itself can be called and does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See `rayswift.api.export`."""
        from rayswift.export.pipeline import export

        return export(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage
