"""What must not be written down: passwords and tokens in URLs, commands that tell people of alerts."""

import re
from typing import Any

_HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_PARAMETER = re.compile(r"([?&][\w-]*(?:token|sig|secret|key|password|credential)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)
_COMMAND = re.compile(r"(?<=alert_command=).+", re.DOTALL)


def without_secrets(value: Any) -> Any:
    """A copy of JSON values in which what may be secret reads `***`: user names, passwords, tokens, signatures in URLs,
    and alert commands whole, for the address of a web hook is itself a key.
    """
    if isinstance(value, dict):
        hidden = {name: _HIDDEN for name, part in value.items() if name == "alert_command" and part}
        return {name: without_secrets(part) for name, part in value.items()} | hidden
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    if not isinstance(value, str):
        return value
    return _COMMAND.sub(_HIDDEN, _PARAMETER.sub(rf"\1{_HIDDEN}", _USER.sub(_HIDDEN, value)))
