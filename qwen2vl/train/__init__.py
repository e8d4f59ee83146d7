"""Training: recipe -> data order -> packed batch -> loss -> optimizer step -> checkpoint.

`loop.py` holds the training loop; `config.py` the configuration of a run; `state.py` the model,
optimizers and step counter of a running one. Which samples a step reads is a pure function
(`loader/data_order.py`), so resuming needs the step number only. A run ends in an ordinary model
folder; training does not import the inference engine. (Qwen2-VL sec. 2.2.)
"""
