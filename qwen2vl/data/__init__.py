"""What training reads: files of conversations, packed text and the world, from sizes to bins.

    storage -> sources -> dialects -> prepare -> Example        one sample at a time
    lengths -> plan -> bins -> corpus                           all of them, by their headers

Start at corpus.py, which puts the two together: any bin of a pass, at any time, for any rank. A
sample is measured without decoding its media, prepared by the very Processor that answers, and
never replaced by another. (Qwen2-VL sec. 2.2, 2.3.)
"""
