"""Where arrays live: the mesh of devices, the table of shardings, and the processes of a run."""
