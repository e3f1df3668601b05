"""An HTML page about a folder of runs. Independent of the systems."""
