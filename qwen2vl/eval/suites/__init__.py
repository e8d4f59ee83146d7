"""Suites: frozen lists of questions about images and clips, with their accepted answers.

    suite = open_suite("easy-vqa")                             (registry.py)
    items = suite.items(blind=True)                            each with another item's picture
    suite.messages(items[0])                                   its picture is drawn or named now
    score_answer(items[0], "yes")                              (scoring.py)

`suite.py` has the interface, and one module each suite; what is frozen stands in JSON files beside
them. `qwen2vl.eval.runner` runs a suite. No model is imported here.
"""
