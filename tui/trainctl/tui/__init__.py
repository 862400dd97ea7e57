"""The cockpit: a live run watched and steered from a terminal."""
