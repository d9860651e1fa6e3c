"""Where arrays live: the mesh of devices and the one table of shardings."""
