"""Arguments of the Python API: accepted forms, their validation, and names of other libraries.

Each function returns one normal form, or raises an error that names argument, value and remedy.
"""
