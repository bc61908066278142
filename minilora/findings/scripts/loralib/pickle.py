# A layer is its parameters: it can be pickled, as it can with a dropout.
import pickle

import loralib

try:
    pickle.dumps(loralib.Linear(4, 3, r=2))
    found = "pickled"
except (AttributeError, pickle.PicklingError) as error:
    found = f"{type(error).__name__}: {error}"
print("got     ", found)
print("expected", "pickled")
