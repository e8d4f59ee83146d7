"""Training data loader: data order, sample preparation in worker processes, sequence packing.

`data_order.py` maps a step to its samples or bins; `dataloader.py` prepares them in workers;
`batch.py` packs them into one Batch.
"""
