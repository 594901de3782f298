"""The embedded data set `photo_digits`: a tfds builder that downloads nothing."""
