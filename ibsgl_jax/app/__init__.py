"""The command ``ibsgl``: explain photos, list models and layers, export a function."""
