"""Videos and cameras: what is read, how it is decoded, and how it runs through a detector."""
