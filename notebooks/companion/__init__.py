"""What the notebooks are made of: `rails` serves all of them, each other folder its own notebooks.
CONTRIBUTING.md has the map."""
