"""The studio on photographs, as far as it is built: it replaces the modules of the same names once its teachers are trained.

Scenes on photographs, general edits, effects, and the first stages of the build: autoencoder, text encoder, base, teachers.
"""
