"""Two real tasks end to end: data and models from installed packages, to a result with an interval.

`sentiment`: a BERT with adapters against a head alone on the same frozen model. `summaries`: a
small chat model before and after fine-tuning. Nothing in the packages is executed.
"""
