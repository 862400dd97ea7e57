"""The ids of commands that rank 0 gives itself: the end of a change on trial, the end of a pause, a preemption.

Each has its own outcome. An operator's command of such an id would take the place of it, so the hub refuses one.
"""

import hashlib
import re
from typing import Final

AUTO_RESUME: Final = "auto-resume-"
_OWN: Final = re.compile(rf".*\.undo(\.\d+)?\Z|{AUTO_RESUME}.*|preemption-\d+(\.\d+)?\Z", re.DOTALL)
_STEM_LENGTH: Final = 85  # an id has at most 100 characters, of which `.undo.` and a number need some
_HASH_LENGTH: Final = 12


def is_own_id(command_id: str) -> bool:
    """Whether an id looks like one that rank 0 gives."""
    return _OWN.match(command_id) is not None


def undoing_id(command_id: str, number: int = 1) -> str:
    """The id under which a change on trial is undone; `number`: the how-many-th proposal of that it is, from 1 on."""
    stem = command_id
    if len(stem) > _STEM_LENGTH:  # two may begin alike
        stem = f"{stem[: _STEM_LENGTH - _HASH_LENGTH - 1]}-{hashlib.sha256(stem.encode()).hexdigest()[:_HASH_LENGTH]}"
    return f"{stem}.undo" + (f".{number}" if number > 1 else "")
