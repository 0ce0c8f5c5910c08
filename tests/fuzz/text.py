"""Values as one types them."""

from typing import Any


def as_override(item: tuple[str, Any]) -> str:
    return f"{item[0]}={as_text(item[1])}"


def as_text(value: Any) -> str:
    """Return a value as one types it on Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{as_text(k)}: {as_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(as_text, value)) + "]"
    if value.isascii() and value.isalnum() and value not in ("null", "true", "false"):
        return str(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
