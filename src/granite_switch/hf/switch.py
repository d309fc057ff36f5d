"""Of granite-switch up to 0.1.1; importing it says what there is instead."""

raise ImportError(
    "granite_switch.hf.switch was of granite-switch up to 0.1.1. MultiSwitch and create_switch are gone: "
    "the model routes by itself (docs/migrate.md)"
)
