"""A module of granite-switch up to 0.1.1; importing it names the replacement."""

raise ImportError(
    "granite_switch.hf.core was removed after granite-switch 0.1.1. SwitchedLoRALinear has no replacement: "
    "the base's own linears add the updates (docs/migrate.md)"
)
