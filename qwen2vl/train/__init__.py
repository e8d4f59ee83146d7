"""Changes the weights: recipe -> schedule -> packed batch -> loss -> step -> checkpoint.

Start at loop.py, which shows a whole run on one screen. What a run is stands in config.py; which
samples a step sees is a pure function in schedule.py, so resuming is arithmetic. This floor never
imports the engine: a run ends in an ordinary folder, and answering with it is another room's work.
(Qwen2-VL sec. 2.2.)
"""
