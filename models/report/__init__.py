"""One HTML page about a folder of runs. Names no system."""
