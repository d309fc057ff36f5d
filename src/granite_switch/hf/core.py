"""Of granite-switch up to 0.1.1; importing it says what there is instead."""

raise ImportError(
    "granite_switch.hf.core was of granite-switch up to 0.1.1. SwitchedLoRALinear is gone: linears stay what they are "
    "in the base, and hooks add the updates (docs/migrate.md)"
)
