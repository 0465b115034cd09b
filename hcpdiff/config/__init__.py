"""Config files: `load` reads and checks one before torch is imported, `build` makes the objects that it names."""
