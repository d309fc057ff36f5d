"""A module of granite-switch up to 0.1.1; importing it names the replacement."""

raise ImportError(
    "granite_switch.hf.switch was removed after granite-switch 0.1.1. MultiSwitch and create_switch have no "
    "replacement: the model routes by itself (docs/migrate.md)"
)
