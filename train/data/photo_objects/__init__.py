"""The data set `photo_objects`: a tfds builder of photographs that Debian packages."""
