"""HTTP: the front that every request passes, the routes behind it, and the server process."""
