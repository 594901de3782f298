"""The embedded data set `photo_textures`: a tfds builder that downloads nothing."""
