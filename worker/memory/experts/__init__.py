"""Single experts that do not stay on the device: in slots, fetched when chosen or foreseen."""
