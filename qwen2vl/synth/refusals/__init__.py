"""Scenes of the task family `refusals`: pictures with questions that they answer or do not answer.

    scene = sample_shapes(rng, mixture)       a picture, and drafts of questions about it
    scene.drafts                              Draft("asked_color", ("circle",), REFUSAL, ...)

`drafts.py` has the data types and the sentences; `vocabulary.py` what is shown; `pictures.py`
canvases, subjects, labels and lines; `placing.py` places of objects. `shapes.py` and `things.py`
sample scenes of several objects, `subjects.py` those of at most one, `facts.py` notes, and
questions that no picture answers.
"""
