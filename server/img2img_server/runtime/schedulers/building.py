"""diffusers' schedulers from their configurations, without importing all others.

diffusers' own `from_config` imports every class that a scheduler is compatible with, and these scipy if it is installed: 570
modules and 0.8 s of CPU time. It needs them only to warn of settings that none of them has; the server logs no such warnings.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def build(kind: Any, config: Mapping[str, Any], **overrides: Any) -> Any:
    """What `kind.from_config(config, **overrides)` makes. Raises the errors of the class, for values that it does not support."""
    defaults = {*config.get("_use_default_values", ()), "_use_default_values"}
    given = {key: value for key, value in config.items() if key not in defaults}
    accepted = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in {**given, **overrides}.items() if key in accepted}
    made = kind(**settings)
    # Settings of other classes stay in the configuration, from which a compatible scheduler may be made.
    others = {key: kind.__name__ if key == "_class_name" else value for key, value in given.items() if key not in settings}
    made.register_to_config(**others)
    return made


def read(kind: Any, folder: Path) -> Any:
    """What `kind.from_pretrained(folder)` loads. Raises OSError for a missing or invalid file, and the errors of build()."""
    return build(kind, kind.load_config(folder, local_files_only=True))
