"""The studio: a small real world, with a trained tiny pipeline, that ships in the package."""
