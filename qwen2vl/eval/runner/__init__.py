"""Runs suites: answers in batches, a results file that is resumed, scores, calibration, comparison.

    run_items(suite, items, answer_batch, ...)    batches -> answers -> results            (run.py)
    ResultsFile(path, header)                     appended, resumed after kill -9 (results_file.py)
    SuiteScores(suite, results)                   rows of the table, by part            (scores.py)
    expected_calibration_error(...)               confidence against accuracy      (calibration.py)
    compare_results(new, old)                     paired tests of two results files (comparison.py)

Whatever answers a batch of messages is given: an `LLM`, a server, a test. Nothing here prints.
"""
