"""The way of a request through the engine: checked on the way in, told as events on the way out."""
