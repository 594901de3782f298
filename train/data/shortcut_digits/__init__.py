"""The embedded data set `shortcut_digits`: a tfds builder that downloads nothing."""
