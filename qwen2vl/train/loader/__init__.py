"""The training data loader: data order, sample preparation, packing into batches.

`data_order.py` maps a step number to samples; `dataloader.py` prepares them in worker processes.
"""
