"""Short videos of composite pictures, for the task family `clips`.

`names.py` and `tracks.py` have objects over time: names, paths, frames. `movements.py` and
`events.py` sample what happens in a clip, and `offers.py` has the questions that may be asked about
it.
"""
