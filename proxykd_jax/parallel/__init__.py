"""The mesh of devices, the table of shardings, and the processes of a run."""
