"""The only room that knows about devices and processes."""
