"""The models that come with the package."""

from __future__ import annotations

from pathlib import Path

_PRESETS = Path(__file__).parent / "presets"


def embedded_presets() -> list[str]:
    """Names that --model takes and that need no download."""
    return sorted(path.parent.name for path in _PRESETS.glob("*/config.json"))


def resolve_preset(preset: str) -> str:
    """An embedded model's name becomes its directory; everything else is left as it is, for KerasHub."""
    return str(_PRESETS / preset) if preset in embedded_presets() else preset
