"""Training data: sources, row formats, lengths, mixing, bin packing, preprocessing, disk caches.

    storage -> sources -> formats -> preprocess -> TrainingExample      one sample at a time
    lengths -> bin_planner -> bin_packing -> dataset                    all of them, by headers

`dataset.PackedDataset` puts the two together: any bin of an epoch, in any order, on any rank. The
length of a sample is computed without decoding its media, the sample is preprocessed by the same
Processor that inference uses, and a bad sample is never replaced by another. (Qwen2-VL sec. 2.2,
2.3.)
"""
