"""How a plan's tasks get to where they run, one module per kind of site."""
